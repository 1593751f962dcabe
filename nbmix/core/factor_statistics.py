"""Sufficient statistics of the mixture with shared axes, ``nbmix.core.factor``, by fold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nbmix.core.batch import Basis, CellBatch, SomeGenes, rows_of
from nbmix.core.kernels.blocks import GENES_AT_ONCE
from nbmix.core.kernels.factor import Memberships, UsedPairs, statistics_rows
from nbmix.core.kernels.threads import over_rows
from nbmix.core.statistics import SufficientStatistics

LEAST_SHARE = 1e-8  # of a cell: what statistics take of smaller responsibilities is beyond float32


class FactorStatistics:
    """Statistics of K components at L M nodes, level by level, of the cells of each fold.

    Args:
        basis: of the cells.
        n_components: K.
        folds: 2 or more.
        n_levels: L.
        genes: that statistics are of; None: of all.
    """

    def __init__(
        self, basis: Basis, n_components: int, folds: int, n_levels: int, genes: SomeGenes | None = None
    ) -> None:
        self.basis, self.n_levels, self.genes = basis, n_levels, genes
        self.of_fold = [
            SufficientStatistics.zeros(basis, n_components, "cpu", genes, n_levels) for _ in range(folds)
        ]

    def zero_(self) -> FactorStatistics:
        """Forget all cells."""
        for statistics in self.of_fold:
            for tensor in statistics.tensors():
                tensor.zero_()  # new memory would cost more than filling it
        return self

    def add(self, batch: CellBatch, responsibilities: Tensor) -> None:
        """Add cells with responsibilities (cells, K, L) to those of their fold."""
        levels = self.basis.levels
        seen = self.of_fold[batch.fold]
        q, weights = responsibilities.double(), node_weights(batch)
        rows, component = torch.nonzero(q.flatten(1) > LEAST_SHARE, as_tuple=True)
        n_low = int(torch.searchsorted(batch.used, levels.n_low))
        turned = batch.turned()
        of_pairs = (
            torch.searchsorted(batch.used[:n_low], levels.first),
            n_low + torch.searchsorted(batch.used[n_low:], levels.n_low + levels.high_first),
            batch.used,
            levels.count[batch.used],
            turned.indptr,
            turned.indices,
        )
        first = torch.searchsorted(rows, torch.arange(batch.n_cells + 1))
        of_cells = (first, component, q.flatten(1)[rows, component], weights)
        pairs = UsedPairs(*(t.contiguous().numpy() for t in of_pairs))
        members = Memberships(*(t.contiguous().numpy() for t in of_cells))
        rate = seen.rate.view(len(seen.rate), q[0].numel(), weights.shape[1])  # (rows, K L, nodes)
        arguments = (pairs, rows_of(self.genes), members, self.n_levels, rate.numpy(), seen.pair.numpy())
        over_rows(statistics_rows, levels.n_genes, GENES_AT_ONCE, *arguments)
        seen.node += torch.einsum("ikl,im->klm", q, weights).flatten(1)
        seen.weight += q.sum((0, 2))

    def total(self) -> SufficientStatistics:
        """Of all cells."""
        total = self.of_fold[0]
        for statistics in self.of_fold[1:]:
            total = total + statistics
        return total

    def of(self, fold: int) -> SufficientStatistics:
        """Those of a fold."""
        return self.of_fold[fold]

    def without(self, fold: int, total: SufficientStatistics) -> SufficientStatistics:
        """``total`` less a fold."""
        return total - self.of_fold[fold]

    def sum_over_ranks_(self, total: SufficientStatistics, fitters: Sequence[int]) -> None:
        """A search is of one rank."""
        raise NotImplementedError


def node_weights(batch: CellBatch) -> Tensor:
    """(cells, nodes) interpolation from the nodes of the whole data."""
    return batch.weights @ batch.to_own

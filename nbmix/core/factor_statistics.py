"""Sufficient statistics of the mixture with shared axes, ``nbmix.core.factor``, by fold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.cellwise import add_cells_, node_weights
from nbmix.core.statistics import SufficientStatistics


class FactorStatistics:
    """Statistics of K components at L M nodes, level by level, of the cells of each fold.

    Args:
        basis: of the cells.
        n_components: K.
        folds: 2 or more.
        n_levels: L.
    """

    def __init__(self, basis: Basis, n_components: int, folds: int, n_levels: int) -> None:
        self.basis, self.n_levels = basis, n_levels
        self.of_fold = [
            SufficientStatistics.zeros(basis, n_components, "cpu", n_levels) for _ in range(folds)
        ]

    def zero_(self) -> FactorStatistics:
        """Forget all cells."""
        for statistics in self.of_fold:
            for tensor in statistics.tensors():
                tensor.zero_()  # new memory would cost more than filling it
        return self

    def add(self, batch: CellBatch, responsibilities: Tensor) -> None:
        """Add cells with responsibilities (cells, K, L) to those of their fold."""
        seen, q = self.of_fold[batch.fold], responsibilities.double()
        add_cells_(seen.rate, batch, self.basis, q, pair=seen.pair)
        seen.node += torch.einsum("ikl,im->klm", q, node_weights(batch)).flatten(1)
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

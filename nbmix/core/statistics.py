"""Sufficient statistics of the M step: they add over batches, folds and ranks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.kernels.blocks import GENES_AT_ONCE
from nbmix.core.kernels.sparse import gathered_rows
from nbmix.core.kernels.threads import over_rows
from nbmix.core.tables import rows_in_lines


@dataclass
class SufficientStatistics:
    """All that the M step needs to know of cells weighted by q, on the ``Basis`` of their data.

    The expected log likelihood of any components is a function of these sums alone, so its cost does not
    depend on the number of cells.

    Attributes:
        rate: (genes, K, nodes) float64, A = sum_i w_im q_ik x_ij.
        pair: (pairs, K) float64, B = sum_i q_ik [x_ij = c].
        node: (K, nodes) float64, R = sum_i w_im q_ik; (genes, K, nodes) where genes have nodes of their own
            (``nbmix.core.offsets``).
        weight: (K,) float64, sum_i q_ik, in cells.
    """

    rate: Tensor
    pair: Tensor
    node: Tensor
    weight: Tensor

    @classmethod
    def zeros(
        cls,
        basis: Basis,
        n_components: int,
        device: torch.device | str,
        n_levels: int = 1,
    ) -> SufficientStatistics:
        """Zeros; with nodes level by level where there are levels."""
        n_nodes, levels = n_levels * basis.nodes.log_nodes.numel(), basis.levels
        make = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(
            make(levels.n_genes, n_components, n_nodes),
            make(levels.n_pairs, n_components),
            make(n_components, n_nodes),
            make(n_components),
        )

    @classmethod
    def collect(
        cls, batch: CellBatch, basis: Basis, q: Tensor, dtype: torch.dtype = torch.float32
    ) -> SufficientStatistics:
        """Statistics of one batch with cell weights ``q`` (cells, K); the products run in ``dtype``."""
        return cls.zeros(basis, q.shape[1], q.device).add_batch_(batch, basis, q, dtype)

    def add_batch_(
        self,
        batch: CellBatch,
        basis: Basis,
        q: Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> SufficientStatistics:
        """Add a batch's: its pairs are summed at its own nodes, which then spread to those of the basis."""
        n_components, n_own = q.shape[1], batch.weights.shape[1]
        spread = q.double()[:, :, None] * batch.weights[:, None, :]  # (cells, K, own nodes)
        of_cells = spread.flatten(1)
        if dtype == torch.float32:
            of_cells = rows_in_lines(q, *of_cells.shape)
            of_cells[:, : n_components * n_own] = spread.flatten(1)
        summed = batch.turned().matmul(of_cells)  # (used, K own nodes or more)
        if q.device.type == "cpu":
            self._gather(batch, basis, summed)
        else:
            self._gather_in_torch(batch, basis, summed[:, : n_components * n_own])
        self.node += spread.sum(0) @ batch.to_own
        self.weight += q.double().sum(0)
        return self

    def _gather(self, batch: CellBatch, basis: Basis, summed: Tensor) -> None:
        """Add ``summed`` (used, K own nodes or more) to its genes and pairs."""
        levels = basis.levels
        sums = (summed.contiguous().numpy(), batch.to_own.contiguous().numpy())
        into = (self.rate.numpy(), self.pair.numpy())
        arguments = (batch.used.numpy(), levels.places(), *sums, *into)
        over_rows(gathered_rows, levels.n_genes, GENES_AT_ONCE, *arguments)

    def _gather_in_torch(self, batch: CellBatch, basis: Basis, summed: Tensor) -> None:
        """As ``_gather``, of (used, K own nodes)."""
        n_genes, n_components = self.rate.shape[:2]
        gene, count = basis.levels.gene[batch.used], basis.levels.count[batch.used]
        # the weights of a cell sum to 1
        self.pair[batch.used] += summed.unflatten(1, (n_components, -1)).sum(2)
        by_gene = summed.new_zeros(n_genes, summed.shape[1])
        by_gene.index_add_(0, gene, summed * count[:, None].to(summed.dtype))
        own = by_gene.view(n_genes * n_components, -1) @ batch.to_own.to(summed.dtype)
        self.rate += own.view_as(self.rate)

    def tensors(self) -> list[Tensor]:
        """The four sums, for an all_reduce or a checkpoint."""
        return [getattr(self, f.name) for f in fields(self)]

    def add_(self, other: SufficientStatistics) -> SufficientStatistics:
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.add_(theirs)
        return self

    def __add__(self, other: SufficientStatistics) -> SufficientStatistics:
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return SufficientStatistics(*(a + b for a, b in pairs))

    def __sub__(self, other: SufficientStatistics) -> SufficientStatistics:
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return SufficientStatistics(*(a - b for a, b in pairs))

    def __mul__(self, factor: float) -> SufficientStatistics:
        return SufficientStatistics(*(t * factor for t in self.tensors()))

    def pooled(self) -> SufficientStatistics:
        """All components added up: the same shapes with one component."""
        return SufficientStatistics(
            self.rate.sum(1, keepdim=True),
            self.pair.sum(1, keepdim=True),
            self.node.sum(-2, keepdim=True),
            self.weight.sum(0, keepdim=True),
        )

    def others(self) -> SufficientStatistics:
        """Of each component those of all others, added up."""
        pairs = zip(self.pooled().tensors(), self.tensors(), strict=True)
        return SufficientStatistics(*(total - own for total, own in pairs))

    def summed(self, members: Tensor) -> SufficientStatistics:
        """Of each set of components those of its members, added up; ``members`` (sets, K) are 1 or 0."""
        return SufficientStatistics(
            torch.einsum("jkm,sk->jsm", self.rate, members),
            self.pair @ members.T,
            torch.einsum("...km,sk->...sm", self.node, members),
            members @ self.weight,
        )

    def moved(self, mine: Basis, other: Basis, genes: Tensor) -> SufficientStatistics:
        """The same sums on a basis that reaches further than ``mine``, in size factors, counts and genes.

        A function of ln s at the nodes of ``mine`` is interpolated from those of ``other``, as that of a cell
        is from nodes: the sums follow linearly.

        Args:
            mine: that these are on.
            other: of the same cells and others.
            genes: (genes,) int64, where those of ``mine`` stand among its.
        """
        to = other.nodes.weights(torch.exp(mine.nodes.log_nodes))  # (nodes, other nodes)
        if torch.equal(mine.nodes.log_nodes, other.nodes.log_nodes):
            to = torch.eye(len(to), dtype=torch.float64)
        moved = self.zeros(other, self.weight.numel(), self.weight.device)
        moved.rate[genes] = self.rate @ to
        moved.pair[other.levels.places_of(genes[mine.levels.gene], mine.levels.count)] = self.pair
        moved.node, moved.weight = self.node @ to, self.weight.clone()
        return moved

    def all_reduce_(self) -> SufficientStatistics:
        """Sum over the ranks of the default process group, in place."""
        for tensor in self.tensors():
            torch.distributed.all_reduce(tensor)
        return self

    def reduce_(self, rank: int) -> SufficientStatistics:
        """Sum over the ranks on one of them, in place; others must not use theirs any more."""
        for tensor in self.tensors():
            torch.distributed.reduce(tensor, rank)
        return self

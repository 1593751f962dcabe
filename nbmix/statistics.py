"""Sufficient statistics of the M step: they add over batches, folds and ranks."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nbmix.products import Basis, CellBatch


@dataclass
class SufficientStatistics:
    """All that the M step needs to know of cells weighted by q, on the ``Basis`` of their data.

    The expected log likelihood of any components is a function of these sums alone, so its cost does not
    depend on the number of cells.

    Attributes:
        rate: (nodes, K, genes) float64, A = sum_i w_im q_ik x_ij.
        pair: (pairs, K) float64, B = sum_i q_ik [x_ij = c].
        node: (nodes, K) float64, R = sum_i w_im q_ik.
        weight: (K,) float64, sum_i q_ik, in cells.
    """

    rate: Tensor
    pair: Tensor
    node: Tensor
    weight: Tensor

    @classmethod
    def zeros(cls, basis: Basis, n_components: int, device: torch.device | str) -> SufficientStatistics:
        n_nodes, levels = basis.nodes.log_nodes.numel(), basis.levels
        make = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)  # noqa: E731
        return cls(
            make(n_nodes, n_components, levels.n_genes),
            make(levels.n_pairs, n_components),
            make(n_nodes, n_components),
            make(n_components),
        )

    @classmethod
    def collect(
        cls, batch: CellBatch, basis: Basis, q: Tensor, dtype: torch.dtype = torch.float32
    ) -> SufficientStatistics:
        """Statistics of one batch with cell weights ``q`` (cells, K); the products run in ``dtype``."""
        weights = basis.nodes.weights(batch.size_factors)
        n_components = q.shape[1]
        spread = (weights[:, :, None] * q.double()[:, None, :]).flatten(1)  # (cells, M K)
        rate = batch.counts_t.matmul(spread.to(dtype))
        return cls(
            rate.T.double().reshape(weights.shape[1], n_components, -1),
            batch.pairs_t.matmul(q.to(dtype)).double(),
            weights.T @ q.double(),
            q.double().sum(0),
        )

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
            self.node.sum(1, keepdim=True),
            self.weight.sum(0, keepdim=True),
        )

    def all_reduce_(self) -> SufficientStatistics:
        """Sum over the ranks of the default process group, in place."""
        for tensor in self.tensors():
            torch.distributed.all_reduce(tensor)
        return self

"""Sufficient statistics by fold: what a copy of the components may see is the total less one fold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.statistics import SufficientStatistics


@dataclass
class FoldStatistics:
    """Statistics of the cells of each fold that this rank has met.

    Attributes:
        basis: of the cells.
        n_components: K.
        folds: of the cells; with 1 the batches' own fold is of no account.
        dtype: of the bulk products.
        of_fold: the statistics of folds of which there were cells.
    """

    basis: Basis
    n_components: int
    folds: int
    dtype: torch.dtype
    of_fold: dict[int, SufficientStatistics] = field(default_factory=dict)

    def add(self, batch: CellBatch, responsibilities: Tensor) -> None:
        """Add a batch's to those of its fold."""
        if self.folds > 1 and not 0 <= batch.fold < self.folds:
            raise ValueError(f"a batch of fold {batch.fold} in a fit of {self.folds} folds")
        if batch.fold not in self.of_fold:
            self.of_fold[batch.fold] = self._zeros()
        self.of_fold[batch.fold].add_batch_(batch, self.basis, responsibilities, self.dtype)

    def total(self) -> SufficientStatistics:
        """Of all cells that this rank has met, made anew."""
        total = self._zeros()
        for statistics in self.of_fold.values():
            total.add_(statistics)
        return total

    def of(self, fold: int) -> SufficientStatistics | None:
        """Those of a fold, or None where no cell of it was met."""
        return self.of_fold.get(fold)

    def without(self, fold: int, total: SufficientStatistics) -> SufficientStatistics:
        """``total`` less a fold."""
        return total - (self.of_fold.get(fold) or self._zeros())

    def sum_over_ranks_(self, total: SufficientStatistics, fitters: Sequence[int]) -> None:
        """Sum ``total`` over ranks, and each fold on the rank that fits its copy, if another has cells of it.

        Args:
            total: of this rank's cells; changed in place.
            fitters: the rank that fits each copy.
        """
        total.all_reduce_()
        if self.folds == 1:
            return
        met = total.weight.new_zeros(self.folds, torch.distributed.get_world_size())
        met[list(self.of_fold), torch.distributed.get_rank()] = 1
        torch.distributed.all_reduce(met)
        for fold, of_rank in enumerate(met.tolist()):
            of_rank[fitters[fold]] = 0
            if any(of_rank):
                self.of_fold.setdefault(fold, self._zeros()).reduce_(fitters[fold])

    def _zeros(self) -> SufficientStatistics:
        device = self.basis.nodes.log_nodes.device
        return SufficientStatistics.zeros(self.basis, self.n_components, device)

"""Statistics of the genes of origins that may be worth an offset, see ``nbmix.core.offsets``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.cellwise import add_cells_, node_weights
from nbmix.core.offsets import OriginCells
from nbmix.core.origin_genes import OriginGenes


class OriginStatistics:
    """Of some genes of some origins, by fold.

    Args:
        basis: of the cells.
        genes: which.
        shape: (folds, K, L).
        room: new memory costs more than filling some that was used before.

    Attributes:
        rate: (folds, rows, K, L M) float64, A = sum_i w_im q_ikl x_ij over the cells of the row's origin.
        node: (folds, origins, K, L M) float64, R = sum_i w_im q_ikl.
    """

    def __init__(
        self, basis: Basis, genes: OriginGenes, shape: tuple[int, int, int], room: Tensor | None = None
    ) -> None:
        self.basis, self.genes = basis, genes
        (folds, n_components, n_levels), log_nodes = shape, basis.nodes.log_nodes
        width = n_levels * log_nodes.numel()
        size = folds * genes.n_rows * n_components * width
        if room is None or room.numel() < size:
            room = log_nodes.new_zeros(size)
        self.room = room
        self.rate = room[:size].zero_().view(folds, genes.n_rows, n_components, width)
        self.node = log_nodes.new_zeros(folds, len(genes.row), n_components, width)

    def add(self, batch: CellBatch, responsibilities: Tensor) -> None:
        """Add cells with responsibilities (cells, K), or (cells, K, L), to those of their fold."""
        fold = batch.fold if len(self.rate) > 1 else 0
        q, weights = responsibilities.double(), node_weights(batch)
        q = q[..., None] if q.ndim == 2 else q
        spread = (q[..., None] * weights[:, None, None]).flatten(2)  # (cells, K, L M)
        assert batch.origins is not None
        self.node[fold].index_add_(0, batch.origins, spread)
        if q.device.type == "cpu":
            add_cells_(self.rate[fold], batch, self.basis, q, genes=self.genes)
        else:
            self._add_in_torch(self.rate[fold], batch, spread.flatten(1))

    def _add_in_torch(self, rate: Tensor, batch: CellBatch, spread: Tensor) -> None:
        """As ``add_cells_``, by one sparse product; ``spread`` (cells, K L M)."""
        assert batch.origins is not None
        indices, row = batch.pairs.indices, self.genes.row.to(batch.pairs.indices.device)
        cell = torch.repeat_interleave(batch.pairs.indptr.long().diff(), output_size=indices.numel())
        pair = batch.used[indices]
        place = row[batch.origins[cell], self.basis.levels.gene[pair]].long()
        has_row = place >= 0
        at, count = torch.stack([place, cell])[:, has_row], self.basis.levels.count[pair[has_row]]
        size = (len(rate), batch.n_cells)
        matrix = torch.sparse_coo_tensor(at, count, size, check_invariants=False)
        rate += torch.sparse.mm(matrix, spread).view_as(rate)

    def sum_over_ranks_(self) -> None:
        """Sum over all ranks, in place."""
        for tensor in (self.rate, self.node):
            torch.distributed.all_reduce(tensor)

    def seen_without(self, folds: Sequence[int | None]) -> OriginCells:
        """What copies see that do not see these folds, on the CPU; None: a copy of all cells."""
        total = self.node.sum(0)
        node = torch.stack([total if fold is None else total - self.node[fold] for fold in folds])
        without = torch.tensor([-1 if fold is None else fold for fold in folds])
        return OriginCells(self.genes, self.basis.nodes.to("cpu"), self.rate.cpu(), node.cpu(), without)

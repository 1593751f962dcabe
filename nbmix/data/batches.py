"""Cells cut out of the counts as batches that are ready for the products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.csr import CsrMatrix
from nbmix.core.kernels.threads import side_by_side
from nbmix.data.counts import CountData


def label_codes(data: CountData) -> np.ndarray | None:
    """(cells,) int64 numbers of the known labels, or None."""
    if data.labels is None:
        return None
    return np.unique(data.labels, return_inverse=True)[1].astype(np.int64)


def origins_of(data: CountData, rows: np.ndarray) -> np.ndarray | None:
    """(rows,) the batch of the experiment that each cell comes from; None where nothing is known of any."""
    return None if data.origins is None else data.origins[rows].astype(np.int64)


class CellBatches(Dataset[CellBatch]):
    """Cuts any set of cells out of the CSR matrix as one ``CellBatch``; never dense."""

    def __init__(self, data: CountData, basis: Basis) -> None:
        self.data, self.basis, self.codes = data, basis, label_codes(data)

    def __getitem__(self, rows: np.ndarray) -> CellBatch:
        return self.batch(rows, keep=True)

    def batch(self, rows: np.ndarray, fold: int = -1, *, keep: bool = False) -> CellBatch:
        """The cells at positions ``rows``, all of one fold; ``keep`` if the batch will be used again."""
        data = self.data
        return CellBatch.build(
            data.counts,
            data.size_factors,
            self.basis,
            pick=rows,
            fold=fold,
            keep=keep,
            prior=None if data.prior is None else data.prior[rows],
            labels=None if self.codes is None else self.codes[rows],
            origins=origins_of(data, rows),
        )


class CellsOnDevice(Dataset[CellBatch]):
    """All cells on a device as one CSR matrix, 4 bytes a nonzero; batches are cut there, by a few gathers.

    They list the pairs and have the nodes of the whole data: to find those that occur in some cells, a GPU
    would have to be waited for.

    Args:
        data: with its counts in memory.
        basis: of ``data``, on the CPU.
        device: where the batches will be.
    """

    def __init__(self, data: CountData, basis: Basis, device: torch.device | str) -> None:
        whole = CellBatch.build(
            data.counts,
            data.size_factors,
            basis,
            prior=data.prior,
            labels=label_codes(data),
            origins=data.origins,
        )
        self._begin = whole.pairs.indptr.numpy().astype(np.int64)  # on the CPU, which knows sizes
        self._whole = whole.to(device)

    def __getitem__(self, rows: np.ndarray) -> CellBatch:
        whole, begin = self._whole, self._begin[rows]
        indptr = np.concatenate([[0], np.cumsum(self._begin[rows + 1] - begin)])
        told = np.concatenate([rows, begin - indptr[:-1], indptr])  # all that the device is told, in one copy
        told_there = torch.from_numpy(told).to(whole.pairs.indices.device)
        own, shift, indptr_there = told_there.split([rows.size, rows.size, rows.size + 1])
        places = torch.arange(indptr[-1], device=own.device)
        places += torch.repeat_interleave(shift, indptr_there.diff(), output_size=int(indptr[-1]))
        indices = whole.pairs.indices[places]
        return replace(
            whole,
            rows=own,
            pairs=CsrMatrix(indptr_there.to(indices.dtype), indices, whole.pairs.n_columns),
            size_factors=whole.size_factors[own],
            weights=whole.weights[own],
            constant=whole.constant[own],
            log_prior=None if whole.log_prior is None else whole.log_prior[own],
            labels=None if whole.labels is None else whole.labels[own],
            origins=None if whole.origins is None else whole.origins[own],
        )


class PreparedBatches(Dataset[CellBatch]):
    """Batches that are the same every epoch, made together at first use; ``keep`` their transposes, too."""

    def __init__(
        self, cells: CellBatches, blocks: Sequence[tuple[int, np.ndarray]], *, keep: bool = True
    ) -> None:
        self.cells, self.blocks, self.keep = cells, blocks, keep
        self.made: list[CellBatch] = []

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> CellBatch:
        return self.all()[index]

    def __iter__(self) -> Iterator[CellBatch]:
        return iter(self.all())

    def all(self) -> list[CellBatch]:
        """Every batch."""
        missing = self.blocks[len(self.made) :]
        self.made += side_by_side(
            lambda i: self.cells.batch(missing[i][1], missing[i][0], keep=self.keep), len(missing)
        )
        return self.made

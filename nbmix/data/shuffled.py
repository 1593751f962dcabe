"""Random batches of cells that stay in their file: blocks in random order, cells shuffled among a few."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from torch.utils.data import Dataset, Sampler

from nbmix.core.batch import Basis, CellBatch
from nbmix.data.backed import BackedCounts, Slab
from nbmix.data.batches import label_codes, origins_of
from nbmix.data.counts import CountData
from nbmix.data.sampler import BLOCKS_AT_ONCE, ShuffledBatches


class PlannedBatch(NamedTuple):
    """A batch, and what has to be read before it.

    Attributes:
        rows: (cells,) of this rank.
        reads: ascending positions of cells to be read first, in this batch and later ones; may be empty.
        ahead: those that will be read next.
        is_first: of its epoch.
    """

    rows: np.ndarray
    reads: np.ndarray
    ahead: np.ndarray
    is_first: bool


class PlannedBatches(Sampler[PlannedBatch]):
    """The batches of ``ShuffledBatches`` with ``blocks``, and when which cells are to be read."""

    def __init__(self, batches: ShuffledBatches) -> None:
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PlannedBatch]:
        yield from self._plan()  # at the first batch: Lightning sets a resumed epoch after iter()

    def _plan(self) -> list[PlannedBatch]:
        """Of this epoch: a round is read before the first batch that has a cell of it."""
        batches, rounds = self.batches.with_rounds()
        own = np.concatenate(batches)
        reads = {number: np.sort(own[rounds[own] == number]) for number in np.unique(rounds[own]).tolist()}
        none = np.empty(0, np.int64)
        planned: list[PlannedBatch] = []
        for rows in batches:
            last = rounds[rows].max(initial=-1)
            due = [reads.pop(number) for number in list(reads) if number <= last]
            ahead = next(iter(reads.values()), none) if due else none
            planned.append(PlannedBatch(rows, np.sort(np.concatenate([none, *due])), ahead, not planned))
        return planned


class ShuffledCells(Dataset[CellBatch]):
    """Cuts planned batches out of the cells that have been read; the next are read while these are in use.

    In memory are the cells of a round, those of the next one, and what batches that are to come need of
    earlier ones.

    Args:
        data: with backed counts.
        basis: of the data.
    """

    def __init__(self, data: CountData, basis: Basis) -> None:
        self.data, self.basis, self.codes = data, basis, label_codes(data)
        self.counts, self.blocks = cut_into_blocks(data)
        self._reader = ThreadPoolExecutor(1)
        self._coming: tuple[np.ndarray, Future[Slab]] | None = None
        self._forget()

    def _forget(self) -> None:
        self._pool = Slab(np.empty(0, np.int64), sp.csr_matrix((0, self.data.n_genes), dtype=np.float32))
        self._is_left = np.empty(0, bool)

    def __getitem__(self, batch: PlannedBatch) -> CellBatch:
        data, rows = self.data, batch.rows
        if batch.is_first:
            self._forget()
        if batch.reads.size:
            self._take(batch.reads)
        if batch.ahead.size:
            self._coming = batch.ahead, self._reader.submit(self._read, batch.ahead)
        pick = np.searchsorted(self._pool.rows, rows)
        self._is_left[pick] = False
        return CellBatch.build(
            self._pool.counts,
            data.size_factors[self._pool.rows],
            self.basis,
            pick=pick,
            rows=rows,
            prior=None if data.prior is None else data.prior[rows],
            labels=None if self.codes is None else self.codes[rows],
            origins=origins_of(data, rows),
            keep=True,
        )

    def _take(self, rows: np.ndarray) -> None:
        """Have cells at hand, beside those that are still to come of those before."""
        coming = self._coming
        is_coming = coming is not None and np.array_equal(coming[0], rows)
        read = coming[1].result() if coming is not None and is_coming else self._read(rows)
        self._coming = None
        pool = _joined([Slab(self._pool.rows[self._is_left], self._pool.counts[self._is_left]), read])
        self._pool, self._is_left = pool, np.ones(pool.rows.size, bool)

    def _read(self, rows: np.ndarray) -> Slab:
        """Ascending positions, block by block."""
        parts = np.split(rows, np.flatnonzero(np.diff(self.blocks[rows])) + 1)
        return _joined([self.counts.read(part) for part in parts])


def cut_into_blocks(data: CountData) -> tuple[BackedCounts, np.ndarray]:
    """The counts of backed cells, to be read in small blocks, and the block (cells,) of each cell."""
    assert isinstance(data.counts, BackedCounts)
    counts = replace(data.counts, slab_nonzeros=max(1, data.counts.slab_nonzeros // BLOCKS_AT_ONCE))
    sizes = [block.size for block in counts.plan()]
    return counts, np.repeat(np.arange(len(sizes)), sizes)


def _joined(slabs: list[Slab]) -> Slab:
    """Cells of several slabs, ascending."""
    rows, counts = np.concatenate([s.rows for s in slabs]), sp.vstack([s.counts for s in slabs], format="csr")
    if (np.diff(rows) < 0).any():
        order = np.argsort(rows)
        rows, counts = rows[order], counts[order]
    return Slab(rows, counts)

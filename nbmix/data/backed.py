"""Counts that stay in their .h5ad file and are read a slab of cells at a time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import h5py
import numpy as np
import scipy.sparse as sp
from torch.utils.data import Dataset

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.folds import by_origin, fold_shares, packs_of
from nbmix.core.kernels.threads import side_by_side
from nbmix.core.levels import CountCensus, CountLevels
from nbmix.core.memory import give_back
from nbmix.core.raw_counts import check_counts
from nbmix.data.batches import label_codes, origins_of
from nbmix.data.counts import CountData
from nbmix.data.files import check_structure, reading
from nbmix.errors import InputError

SLAB_NONZEROS = 8_000_000  # read at once: 64 MB


class Slab(NamedTuple):
    """Neighbouring cells: positions in the data, and their counts."""

    rows: np.ndarray
    counts: sp.csr_matrix


@dataclass(frozen=True)
class BackedCounts:
    """A (cells, genes) CSR matrix in an HDF5 file, or some of its rows and columns.

    Attributes:
        path: the file.
        element: the matrix in it, "X" or "layers/name".
        indptr: (file rows + 1,) of the file.
        n_file_genes: its columns.
        rows: (cells,) ascending rows of the file that belong to the data; None for all.
        columns: (genes,) columns that belong to the data; None for all.
        census: of all its counts.
        slab_nonzeros: of the file, that are read at once, but for a row that has more.
    """

    path: str
    element: str
    indptr: np.ndarray
    n_file_genes: int
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    census: CountCensus | None = field(default=None, repr=False)
    slab_nonzeros: int = SLAB_NONZEROS

    def __getattr__(self, name: str) -> Any:
        """Whoever wants to compute with the matrix itself cannot have it."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise InputError(
            "data.backed=true: this setting needs all counts in memory; choose start=random, subsample or "
            "labels, or set data.backed=false"
        )

    @property
    def shape(self) -> tuple[int, int]:
        n_rows = self.indptr.size - 1 if self.rows is None else self.rows.size
        return n_rows, self.n_file_genes if self.columns is None else self.columns.size

    def plan(self) -> list[np.ndarray]:
        """Positions of the cells of every slab."""
        rows = np.arange(self.shape[0]) if self.rows is None else self.rows
        slab = self.indptr[rows] // self.slab_nonzeros
        return np.split(np.arange(rows.size), np.flatnonzero(np.diff(slab)) + 1)

    def read(self, positions: np.ndarray) -> Slab:
        """Ascending positions; what lies between them in the file is read, too."""
        rows = positions if self.rows is None else self.rows[positions]
        first, last = int(rows[0]), int(rows[-1]) + 1
        begin, end = int(self.indptr[first]), int(self.indptr[last])
        with reading(f"data.path={self.path}"), h5py.File(self.path, "r") as file:
            group = file[self.element]
            data, indices = group["data"][begin:end], group["indices"].astype(np.int32)[begin:end]
            indptr = (self.indptr[first : last + 1] - begin).astype(np.int32)
            counts = sp.csr_matrix((data, indices, indptr), shape=(last - first, self.n_file_genes))
            if self.census is None:
                check_structure(counts)  # HDF5 turns what does not fit into int32 into its largest
        if self.census is not None:  # has been checked
            counts.data = counts.data.astype(np.float32, copy=False)
        counts.sort_indices()
        if rows.size < last - first:
            counts = counts[rows - first]
        if self.columns is not None:
            counts = counts[:, self.columns]
            counts.sort_indices()
        return Slab(positions, counts)

    def slabs(self) -> Iterator[Slab]:
        """All cells in order; the next slab is read while one is in use."""
        plan = self.plan()
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self.read, plan[0])
            for positions in [*plan[1:], None]:
                slab = coming.result()
                if positions is not None:
                    coming = reader.submit(self.read, positions)
                yield slab

    def __getitem__(self, positions: np.ndarray) -> BackedCounts:
        """The cells at ascending ``positions``, still in the file."""
        if (np.diff(positions) <= 0).any():
            raise ValueError("cells of a backed matrix can only be picked in ascending order")
        return replace(self, rows=positions if self.rows is None else self.rows[positions])

    def select_columns(self, columns: np.ndarray) -> BackedCounts:
        """Some genes."""
        return replace(self, columns=columns if self.columns is None else self.columns[columns])

    def levels(self) -> CountLevels:
        """The pairs of gene and count that may occur."""
        assert self.census is not None
        return self.census.levels(self.columns)

    def empty_rows(self) -> np.ndarray:
        """(cells,) bool."""
        empty = np.ones(self.shape[0], bool)
        for rows, counts in self.slabs():
            empty[rows] = np.diff(counts.indptr) == 0
        return empty

    def gene_totals(self) -> np.ndarray:
        """(genes,) float64."""
        total = np.zeros(self.shape[1])
        for slab in self.slabs():
            total += np.asarray(slab.counts.sum(axis=0, dtype=np.float64)).ravel()
        return total

    def load(self) -> sp.csr_matrix:
        """All of it in memory."""
        return sp.vstack([slab.counts for slab in self.slabs()], format="csr")


def open_backed(
    file: h5py.File,
    element: str,
    where: str,
    shape: tuple[int, int],
    slab_nonzeros: int = SLAB_NONZEROS,
) -> BackedCounts:
    """Look at a matrix of raw counts in an open file, without reading it.

    Args:
        shape: cells and genes that the file names.
        slab_nonzeros: to read at once.

    Raises:
        InputError: it is not there, or not a CSR matrix.
        ValueError: its parts do not fit together.
    """
    group = file.get(element)
    if not isinstance(group, h5py.Group) or group.attrs.get("encoding-type") != "csr_matrix":
        raise InputError(
            f"{where}: {element} is not a CSR matrix, which data.backed=true needs; store it as one "
            "(adata.X = scipy.sparse.csr_matrix(adata.X)), or set data.backed=false"
        )
    if absent := {"data", "indices", "indptr"} - set(group):
        raise ValueError(f"{element} has no {min(absent)}")
    if any(group[name].dtype.kind not in "iu" for name in ("indices", "indptr")):
        raise ValueError(f"indices or indptr of {element} are not whole numbers")
    indptr = group["indptr"][:].astype(np.int64)
    n_entries = group["data"].shape[0]
    stored, cells_and_genes = group["indices"].shape, tuple(group.attrs["shape"])
    if cells_and_genes != shape or indptr.shape != (shape[0] + 1,):
        raise ValueError(f"{element} is a matrix of {cells_and_genes} for {shape[0]} cells, {shape[1]} genes")
    if stored != (n_entries,) or indptr[0] != 0 or indptr[-1] > n_entries or (np.diff(indptr) < 0).any():
        raise ValueError(f"the rows of {element} do not follow each other")
    return BackedCounts(file.filename, element, indptr, shape[1], slab_nonzeros=slab_nonzeros)


class Survey(NamedTuple):
    """What one pass over a backed matrix finds: (cells,) and (genes,) totals, and the pairs that occur."""

    cell_totals: np.ndarray
    gene_totals: np.ndarray
    census: CountCensus


def survey(counts: BackedCounts, where: str, cells: np.ndarray, genes: np.ndarray) -> Survey:
    """Check every count as ``check_counts`` does, and add up.

    Raises:
        InputError: something that is no raw count.
    """
    cell_totals, gene_totals = np.zeros(counts.shape[0]), np.zeros(counts.shape[1])
    census, names = CountCensus(counts.shape[1]), genes.tolist()
    for rows, slab in counts.slabs():
        checked = check_counts(slab, where, cells=cells[rows].tolist(), genes=names)
        if checked.nnz != slab.nnz:
            raise InputError(
                f"{where} stores zeros or repeated entries; with data.backed=true it must be canonical: "
                "adata.X.sum_duplicates(); adata.X.eliminate_zeros()"
            )
        cell_totals[rows] = np.asarray(checked.sum(axis=1, dtype=np.float64)).ravel()
        gene_totals += np.asarray(checked.sum(axis=0, dtype=np.float64)).ravel()
        census.add(checked)
    return Survey(cell_totals, gene_totals, census)


class StreamedBatches(Dataset[CellBatch]):
    """Batches cut out of one slab after the other, every epoch anew and in the same order.

    Args:
        data: with backed counts.
        basis: of the data.
        fold: (cells,) fold of each cell, -1 for none, OUTSIDE for cells that are left out.
        batch_size: cells at most.
        rank, world_size: every rank reads each slab and takes its share of it (see ``fold_shares``).
        keep: whether batches need their transpose.
    """

    OUTSIDE = -2

    def __init__(
        self,
        data: CountData,
        basis: Basis,
        fold: np.ndarray,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        keep: bool = True,
    ) -> None:
        assert isinstance(data.counts, BackedCounts)
        self.data, self.basis, self.codes, self.keep = data, basis, label_codes(data), keep
        self.slabs = data.counts.plan()
        self.blocks: list[tuple[int, int, np.ndarray]] = []  # slab, fold, positions
        folds = int(fold.max(initial=0)) + 1
        packs = data.origins
        # without folds any model may have made the fit, see the module
        if packs is not None and (fold >= 0).any():
            packs = packs_of(np.bincount(packs))[packs]
        for slab, rows in enumerate(self.slabs):
            for of_pack in by_origin(rows, None if packs is None else packs[rows]):
                for number in np.unique(fold[of_pack]):
                    if number == self.OUTSIDE:
                        continue
                    members = of_pack[fold[of_pack] == number]
                    sizes, part = data.size_factors[members], int(number)
                    shares = fold_shares(members, sizes, batch_size, rank, world_size, fold=part, folds=folds)
                    self.blocks += [(slab, part, share) for share in shares]
        self._made: dict[int, CellBatch] = {}  # of one slab, each until it is asked for
        self._coming: tuple[int, Future[Slab]] | None = None
        self._reader = ThreadPoolExecutor(1)

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[CellBatch]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> CellBatch:
        if index not in self._made:
            self._make(self.blocks[index][0])
        return self._made.pop(index)

    def _make(self, number: int) -> None:
        """Cut one slab into its batches; the next one is read while they are in use."""
        self._made.clear()
        if number == self.blocks[0][0]:
            give_back()
        coming = self._coming if self._coming and self._coming[0] == number else self._submit(number)
        self._coming = None
        slab = coming[1].result()
        indices = [index for index, block in enumerate(self.blocks) if block[0] == number]
        batches = side_by_side(lambda i: self._cut(slab, *self.blocks[indices[i]][1:]), len(indices))
        self._made.update(zip(indices, batches, strict=True))
        if number < self.blocks[-1][0]:
            self._coming = self._submit(number + 1)

    def _submit(self, number: int) -> tuple[int, Future[Slab]]:
        assert isinstance(self.data.counts, BackedCounts)
        return number, self._reader.submit(self.data.counts.read, self.slabs[number])

    def _cut(self, slab: Slab, fold: int, rows: np.ndarray) -> CellBatch:
        data = self.data
        return CellBatch.build(
            slab.counts,
            data.size_factors[slab.rows],
            self.basis,
            pick=np.searchsorted(slab.rows, rows),
            rows=rows,
            fold=fold,
            prior=None if data.prior is None else data.prior[rows],
            labels=None if self.codes is None else self.codes[rows],
            origins=origins_of(data, rows),
            keep=self.keep,
        )

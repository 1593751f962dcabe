"""The .h5ad file that cells were read from, and a copy of it that holds these cells."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem, sparse_dataset, write_elem

from nbmix.data.files import check_links
from nbmix.errors import in_one_line

SLAB_ROWS = 4_096  # of a sparse matrix that are copied at once

SLAB_BYTES = 2**26  # of a dense one

LIGHT = {"compression": "gzip", "compression_opts": 1}  # 100,000 cells take seconds, not a minute

_OF_CELLS = ("obsm", "layers", "obsp", "obs", "X", "raw")  # what has a row for each cell

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceFile:
    """Where cells and genes stand in the file that they were read from.

    Attributes:
        path: of the file.
        state: its size and time of change when it was read.
        cells: (cells,) rows.
        genes: (genes,) rows of ``var_element``.
        n_file_cells: cells of the file.
        var_element: "var", or "raw/var" where the counts are those of raw.
    """

    path: Path
    state: tuple[int, int]
    cells: np.ndarray
    genes: np.ndarray
    n_file_cells: int
    var_element: str = "var"

    @classmethod
    def of(cls, path: Path, cells: np.ndarray, shape: tuple[int, int], var_element: str) -> SourceFile:
        """All genes, and some cells, of a file of that shape."""
        n_cells, n_genes = shape
        return cls(path.absolute(), _state(path), cells, np.arange(n_genes), n_cells, var_element)

    def select_cells(self, rows: np.ndarray) -> SourceFile:
        return replace(self, cells=self.cells[rows])

    def select_genes(self, columns: np.ndarray) -> SourceFile:
        return replace(self, genes=self.genes[columns])

    @property
    def is_unchanged(self) -> bool:
        """Whether the file is still there, as it was read."""
        try:
            return _state(self.path) == self.state
        except OSError:
            return False

    def copy_to(self, path: Path) -> None:
        """Copy the file, byte for byte; where some of its cells were picked, what belongs to these.

        No matrix is in memory as a whole, but for what is not stored by rows, and graphs of cells.
        """
        if np.array_equal(self.cells, np.arange(self.n_file_cells)):
            shutil.copyfile(self.path, path)
            return
        with (
            h5py.File(self.path, "r") as source,
            h5py.File(path, "w") as target,
            ad.settings.override(allow_write_nullable_strings=True),
        ):
            target.attrs.update(source.attrs)
            for name in source:
                if name in _OF_CELLS:
                    _copy_cells(source[name], target, name, self.cells)
                else:
                    source.copy(source[name], target, name)


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _copy_cells(source: h5py.Group | h5py.Dataset, target: h5py.Group, name: str, rows: np.ndarray) -> None:
    """Copy an element of the file's root that has a row for each cell."""
    kind = source.attrs.get("encoding-type")
    if name in ("obsm", "layers", "obsp"):
        into = _group_like(source, target, name)
        for key in source:
            with _sparing(name, key):
                _copy_rows(source[key], into, key, rows, name == "obsp")
    elif name == "raw" and kind != "null":
        into = _group_like(source, target, name)
        for key in source:
            if key == "X":
                with _sparing(name, key):
                    _copy_rows(source["X"], into, "X", rows, False)
            else:
                source.copy(source[key], into, key)
    else:
        _copy_rows(source, target, name, rows, False)


def _group_like(source: h5py.Group, parent: h5py.Group, name: str) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs.update(source.attrs)
    return group


@contextmanager
def _sparing(name: str, key: str) -> Iterator[None]:
    """Make a warning of what cannot be read, or be picked from."""
    try:
        yield
    except Exception as error:  # h5py and anndata raise all kinds
        log.warning("%s[%r] cannot be copied, and is left out: %s", name, key, in_one_line(error))


def _copy_rows(
    element: h5py.Group | h5py.Dataset, target: h5py.Group, name: str, rows: np.ndarray, both_axes: bool
) -> None:
    """Copy ascending rows, and the same columns where ``both_axes`` are cells."""
    kind = element.attrs.get("encoding-type")
    if isinstance(element, h5py.Group):
        check_links(element)
    if kind == "null":
        element.file.copy(element, target, name)
    elif both_axes:
        write_elem(target, name, read_elem(element)[rows][:, rows], dataset_kwargs=LIGHT)
    elif kind == "csr_matrix":
        matrix = sparse_dataset(element)
        for slab, some in _slabs(rows, SLAB_ROWS):
            part = sp.csr_matrix(matrix[slab])[some]
            if name in target:
                sparse_dataset(target[name]).append(part)
            else:
                write_elem(target, name, part, dataset_kwargs=LIGHT)
    elif isinstance(element, h5py.Dataset) and element.ndim and element.dtype.kind in "biuf":
        made = target.create_dataset(name, (rows.size, *element.shape[1:]), element.dtype, **LIGHT)
        made.attrs.update(element.attrs)
        n_bytes, filled = element.dtype.itemsize * int(np.prod(element.shape[1:])), 0
        for slab, some in _slabs(rows, max(1, SLAB_BYTES // max(1, n_bytes))):
            made[filled : filled + some.size] = element[slab][some]
            filled += some.size
    else:
        whole = read_elem(element)
        picked = whole.iloc[rows] if isinstance(whole, pd.DataFrame) else whole[rows]
        write_elem(target, name, picked, dataset_kwargs=LIGHT)


def _slabs(rows: np.ndarray, n_rows: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Stretches of so many rows of a file, and the places in each of those that are picked."""
    for number in np.unique(rows // n_rows):
        first = int(number) * n_rows
        yield slice(first, first + n_rows), rows[rows // n_rows == number] - first

"""Counts as Cell Ranger of 10x Genomics writes them: a folder with a matrix.mtx, or an .h5 file.

| | version 2 | version 3 and later |
|---|---|---|
| folder | matrix.mtx, genes.tsv, barcodes.tsv | matrix.mtx.gz, features.tsv.gz, barcodes.tsv.gz |
| .h5 | a group for each genome | the group "matrix" |

Any of the files of a folder may be compressed or not. All of them may begin alike, as GSM1_matrix.mtx.gz.
"""

from __future__ import annotations

import csv
import glob
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from nbmix.core.declared import Setting
from nbmix.core.raw_counts import MAX_COUNT
from nbmix.data.arguments import settings_as_arguments
from nbmix.data.counts import CountData
from nbmix.data.files import check_structure, existing, open_h5, reading
from nbmix.data.from_anndata import MinCounts, make_count_data
from nbmix.data.names import column, parse_names, without_head
from nbmix.data.read import Subsample, pick_cells
from nbmix.data.recognise import CELL_RANGER, is_gzip, opened, what_it_is
from nbmix.errors import InputError, naming_the_nearest

GENES = "Gene Expression"  # 10x's name for the features that are genes
VERSION_2 = ("data", "indices", "indptr", "shape", "genes", "gene_names", "barcodes")  # of a genome
FEATURE_COLUMNS = ("symbol", "feature_type")  # of features.tsv, after the id; version 2 has symbols alone
MATRIX = "matrix.mtx"
UNKNOWN_HDF5 = "is HDF5 but not as Cell Ranger writes it (no group 'matrix', none of a genome); give its .h5"
FORMS = (["integer", "general"], ["real", "general"])  # of a matrix.mtx
LONGEST_LINE = 2**16  # bytes, in the header of a matrix.mtx
LINES_AT_ONCE = 2**22
LARGEST_TABLE = 2**29  # bytes of names; every barcode that there is has 130 MB
LARGEST_RATIO = 1032  # of gzip
SHORTEST_LINE = 6  # bytes of an entry in a matrix.mtx: "1 1 1\n", but for the last line break
MOST_EMPTY = 0.5  # of the barcodes: cells that were called have counts

log = logging.getLogger(__name__)


class Library(NamedTuple):
    """What one run of Cell Ranger leaves.

    Attributes:
        counts: (cells, features) CSR, not yet checked to be counts.
        features: (features,) index: ids; columns "symbol", and "feature_type" and "genome" if there.
        barcodes: (cells,)
    """

    counts: sp.csr_matrix
    features: pd.DataFrame
    barcodes: list[str]

    def check(self) -> Library:
        """Itself.

        Raises:
            ValueError: names and counts do not fit together.
        """
        named = len(self.barcodes), len(self.features)
        if self.counts.shape != named:
            raise ValueError(f"a matrix of {self.counts.shape} for {named[0]} barcodes, {named[1]} genes")
        return self._replace(counts=check_structure(self.counts))

    def select(self, column: str, wanted: str | None, where: str) -> Library:
        """The features with ``wanted`` in a column, which data.``column`` asks for; None for all.

        Raises:
            InputError: there are none.
        """
        if wanted is None:
            return self
        found = self.features[column].to_numpy().astype(str)
        keep = np.flatnonzero(found == wanted)
        if not keep.size:
            there = ", ".join(sorted(set(found.tolist()))) or "none"
            raise InputError(f"{where}: no feature has data.{column}={wanted}; there are: {there}")
        if keep.size == found.size:
            return self
        log.info("%s: left out %d features that are not %s", where, found.size - keep.size, wanted)
        return Library(self.counts[:, keep], self.features.iloc[keep], self.barcodes)


def read_tenx(
    path: str | os.PathLike[str] | None,
    *,
    genome: Annotated[
        str | None, Setting("The genome of an .h5 file that holds several. With null all are read.")
    ] = None,
    feature_type: Annotated[
        str | None, Setting("The type of features to keep. With null all are kept.")
    ] = GENES,
    min_counts: MinCounts = 1,
    subsample: Subsample = None,
    seed: int = 0,
) -> CountData:
    """Read the counts that Cell Ranger left; cells by barcode, genes by Ensembl id.

    Args:
        path: folder with matrix.mtx, that file itself, or .h5 file; of the filtered matrix, whose barcodes
            are cells.
        genome: None for all there are (version 2 keeps their cells apart).
        feature_type: where the file tells ("Antibody Capture" are no genes).
        min_counts: over the picked cells.
        subsample: the cells drawn stay in file order.
        seed: of ``np.random.default_rng`` for the subsample.

    Raises:
        InputError: one line that names the file and what in it cannot be used.
    """
    if path is None:
        raise InputError(
            "data.path is not set: give a folder or an .h5 file of Cell Ranger, e.g. "
            "data.path=filtered_feature_bc_matrix"
        )
    where = f"data.path={os.fspath(path)}"
    with _repeated_names():
        adata = tenx_anndata(path, where, genome, feature_type)
        adata = pick_cells(
            adata, where=where, label_key=None, populations=None, subsample=subsample, seed=seed
        )
        return make_count_data(adata, where=where, label_key=None, min_counts=min_counts, annotate=True)


@naming_the_nearest
def read_10x(
    path: str | os.PathLike[str], *, genome: str | None = None, feature_type: str | None = GENES
) -> ad.AnnData:
    """Read the counts that Cell Ranger wrote. Cells are named by barcode, and genes by Ensembl id.

    ``scanpy.read_10x_mtx`` and ``scanpy.read_10x_h5`` can be used instead.

    Args:
        path: the folder with matrix.mtx, that file itself, or the .h5 file. It has to be the filtered matrix,
            whose barcodes are cells.
        genome: the genome to keep, if an .h5 file has several; None for all.
        feature_type: the type of features to keep, if the file names types; None for all.

    Returns:
        (cells, genes) with raw counts in X and gene symbols in ``var["symbol"]``, and with
        ``var["feature_type"]`` and ``var["genome"]`` if the file has them.

    Raises:
        InputError: one line that names the file and what in it cannot be used.

    >>> import nbmix, pathlib, tempfile
    >>> files = {"barcodes.tsv": "AAAC-1\\nAAAG-1\\n", "genes.tsv": "ENSG01\\tCD79A\\nENSG02\\tLYZ\\n"}
    >>> files["matrix.mtx"] = "%%MatrixMarket matrix coordinate integer general\\n2 2 2\\n1 1 3\\n2 2 5\\n"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, text in files.items():
    ...         _ = pathlib.Path(folder, name).write_text(text)
    ...     adata = nbmix.read_10x(folder)
    >>> adata.to_df()
            ENSG01  ENSG02
    AAAC-1     3.0     0.0
    AAAG-1     0.0     5.0
    """
    with settings_as_arguments():
        return tenx_anndata(path, f"path={os.fspath(path)}", genome, feature_type)


def tenx_anndata(
    path: str | os.PathLike[str], where: str, genome: str | None = None, feature_type: str | None = GENES
) -> ad.AnnData:
    """All cells of ``read_tenx``, whose arguments these are, before they are checked to hold counts.

    Args:
        where: what ``path`` is called in messages.
    """
    found = existing(path, where)
    if found.is_dir():
        library = _read_folder(found, where, genome)
    elif (prefix := _matrix_prefix(found)) is not None:
        library = _read_folder(found.parent, where, genome, prefix)
    else:
        library = _read_h5(found, where, genome)
    if "feature_type" in library.features:
        library = library.select("feature_type", feature_type, where)
    n_barcodes, n_empty = len(library.barcodes), int((np.diff(library.counts.indptr) == 0).sum())
    if n_empty > MOST_EMPTY * n_barcodes:
        raise InputError(
            f"{where}: {n_empty} of {n_barcodes} barcodes have no counts, as in a raw matrix; give the "
            "filtered one (filtered_feature_bc_matrix), which holds cells"
        )
    with _repeated_names():
        return ad.AnnData(
            library.counts,
            obs=pd.DataFrame(index=pd.Index(library.barcodes, dtype=object)),
            var=library.features,
        )


@contextmanager
def _repeated_names() -> Iterator[None]:
    """Without anndata's warning: make_count_data deals with them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(Observation|Variable) names are not unique")
        yield


def parse_library(
    matrix: IO[bytes],
    features: bytes,
    barcodes: bytes,
    n_bytes: int,
    lines_at_once: int = LINES_AT_ONCE,
) -> Library:
    """The contents of a folder.

    Args:
        matrix: matrix.mtx, (features, cells) in Matrix Market's coordinate format.
        features: features.tsv or genes.tsv.
        barcodes: barcodes.tsv.
        n_bytes: of ``matrix``, at most; what its header claims is held to it before memory is set aside.
        lines_at_once: of ``matrix``, that are parsed together.

    Raises:
        ValueError, IndexError, EOFError, OSError: they are damaged, or do not fit together.
        InputError: columns of names are not separated by tabs.
    """
    n_rows, n_columns, n_entries = _read_size(matrix)
    names, rows = parse_names(barcodes), parse_names(features)
    for is_turned in (False, True):
        n_genes, n_cells = (n_columns, n_rows) if is_turned else (n_rows, n_columns)
        cells, genes = without_head(names, n_cells), without_head(rows, n_genes)
        if (len(cells), len(genes)) == (n_cells, n_genes):
            break
    else:
        raise ValueError(f"a matrix of {n_columns, n_rows} for {len(names)} barcodes, {len(rows)} genes")
    if is_turned:
        log.info("matrix.mtx has cells in its rows, and is turned")
    if any(len(row) > 1 for row in cells):
        log.warning(
            "barcodes.tsv: names are its first column, such as %r; the others are left out", cells[0][0]
        )
    for file, of_file in (("barcodes.tsv", cells), ("features.tsv", genes)):
        if of_file and all(len(row) == 1 and "," in row[0] for row in of_file):
            raise InputError(f"{file}: has commas between its columns, as in {of_file[0][0]!r}; write tabs")
    table = pd.DataFrame(
        {name: column(genes, 1 + i) for i, name in enumerate(FEATURE_COLUMNS[: _n_columns(genes)])},
        index=column(genes, 0),
        dtype=object,
    )
    counts = _read_entries(matrix, (n_rows, n_columns), n_entries, n_bytes, lines_at_once)
    return Library(counts if is_turned else counts.T.tocsr(), table, column(cells, 0)).check()


def _n_columns(genes: Sequence[Sequence[str]]) -> int:
    """Columns of a table of genes that mean something, beside the name.

    Raises:
        ValueError: its rows have not the same.
    """
    widths = [min(len(row) - 1, len(FEATURE_COLUMNS)) for row in genes] or [0]
    if min(widths) < max(widths):
        number = widths.index(min(widths))
        raise ValueError(f"{genes[number][0]!r} has {1 + min(widths)} columns, other genes {1 + max(widths)}")
    return widths[0]


def _read_size(stream: IO[bytes]) -> tuple[int, int, int]:
    """Rows, columns and entries, as the head of a matrix.mtx says."""
    banner = stream.readline(LONGEST_LINE).decode("utf-8-sig").lower().split()
    if banner[:3] != ["%%matrixmarket", "matrix", "coordinate"] or banner[3:] not in FORMS:
        raise ValueError("matrix.mtx does not begin as 10x writes it")
    line = stream.readline(LONGEST_LINE)
    while line.startswith(b"%"):
        line = stream.readline(LONGEST_LINE)
    n_rows, n_columns, n_entries = (int(word) for word in line.split())
    return n_rows, n_columns, n_entries


def _read_entries(
    stream: IO[bytes], shape: tuple[int, int], n_entries: int, n_bytes: int, lines_at_once: int
) -> sp.csc_matrix:
    """The matrix itself, below the head.

    Not by ``scipy.io.mmread``, which ends the whole process on some damaged files that it has no path of.
    """
    if not 0 < n_entries * SHORTEST_LINE <= n_bytes + 1:
        raise ValueError(f"a matrix that claims {n_entries} entries in {n_bytes} bytes")
    index = np.empty((2, n_entries), np.int32)  # row, column
    values = np.empty(n_entries)
    filled = 0
    columns = {0: np.int64, 1: np.int64, 2: np.float64}
    settings: dict[str, Any] = {"sep": r"\s+", "header": None, "dtype": columns, "quoting": csv.QUOTE_NONE}
    with pd.read_csv(stream, chunksize=lines_at_once, **settings) as chunks:
        for chunk in chunks:
            end = filled + len(chunk)
            if chunk.shape[1] != len(columns) or end > n_entries:
                raise ValueError("matrix.mtx has more, or other, entries than its header says")
            for row, size in enumerate(shape):
                place = chunk[row].to_numpy()
                if place.min() < 1 or place.max() > size:
                    raise ValueError(f"matrix.mtx has an entry at {int(place.max())} of 1 to {size}")
                index[row, filled:end] = place - 1
            values[filled:end] = chunk[2].to_numpy()
            filled = end
    if filled != n_entries:
        raise ValueError(f"matrix.mtx has {filled} of {n_entries} entries")
    if (np.abs(values) <= MAX_COUNT).all() and (values == np.rint(values)).all():
        values = values.astype(np.float32)  # exact, and half the memory
    counts = sp.csr_matrix((values, (index[1], index[0])), shape=shape[::-1]).T
    if counts.nnz != n_entries:  # which SciPy has added up
        raise ValueError("matrix.mtx gives an entry twice")
    return counts


def _read_folder(folder: Path, where: str, genome: str | None, prefix: str | None = None) -> Library:
    """What a folder holds; ``prefix`` of its files where several samples are in it."""
    if genome is not None:
        raise InputError(f"data.genome={genome}: a folder has none to choose from; set data.genome=null")
    begin = _prefix(folder, where) if prefix is None else prefix
    matrix = _member(folder, where, f"{begin}matrix.mtx")
    features = _member(folder, where, f"{begin}features.tsv", f"{begin}genes.tsv")
    barcodes = _member(folder, where, f"{begin}barcodes.tsv")
    with reading(where), opened(matrix) as stream:
        n_bytes = matrix.stat().st_size * (LARGEST_RATIO if is_gzip(matrix) else 1)
        return parse_library(stream, read_table(features), read_table(barcodes), n_bytes)


def _prefix(folder: Path, where: str) -> str:
    """What the names of the files begin with, as GEO has them: GSM1_matrix.mtx.gz."""
    found = {begin for path in folder.iterdir() if (begin := _matrix_prefix(path)) is not None}
    if len(found) > 1 and "" not in found:
        names = ", ".join(sorted(f"{begin}{MATRIX}" for begin in found)[:3])
        raise InputError(f"{where}: holds several samples ({names}, ...); give the matrix.mtx of one of them")
    return found.pop() if len(found) == 1 else ""


def _matrix_prefix(path: Path) -> str | None:
    """What stands before matrix.mtx in the name of a file; None of another file."""
    name = path.name.removesuffix(".gz")
    return name.removesuffix(MATRIX) if name.endswith(MATRIX) and path.is_file() else None


def _member(folder: Path, where: str, *names: str) -> Path:
    """The first of some files that is in a folder, compressed or not."""
    for name in names:
        for path in (folder / f"{name}.gz", folder / name):
            if path.is_file():
                return path
    inner = sorted({path.parent.name for path in folder.glob(f"*/{names[0]}*")})
    alike = sorted(path.name for path in folder.glob(f"{glob.escape(names[0].removesuffix('.tsv'))}.*"))
    if alike:
        advice = f"write {alike[0]} as {names[0]}, with tabs between columns"
    else:
        advice = f"give the folder {inner[0]!r} in it" if inner else "give a folder as Cell Ranger writes it"
    known = what_it_is(folder)
    if known is None or known == CELL_RANGER:  # of which a file is missing
        known = f"is a folder without {names[0]} or {names[0]}.gz; {advice}"
    raise InputError(f"{where}: {known}")


def read_table(path: Path, largest: int = LARGEST_TABLE) -> bytes:
    """A file of names, compressed or not, of at most ``largest`` bytes.

    Raises:
        ValueError: it is larger.
    """
    with opened(path) as stream:
        content = stream.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{path.name} is larger than {largest / 2**20:g} MiB")
    return content


def _read_h5(path: Path, where: str, genome: str | None) -> Library:
    with open_h5(path, where, "an .h5 file, or a folder, as Cell Ranger writes it") as file, reading(where):
        if isinstance(file.get("matrix"), h5py.Group):
            features = file["matrix"].get("features", {})
            columns = {"symbol": "name", "feature_type": "feature_type", "genome": "genome"}
            table = pd.DataFrame(
                {ours: _strings(features[theirs]) for ours, theirs in columns.items() if theirs in features},
                index=_strings(features["id"]),
                dtype=object,
            )
            return _parse_group(file["matrix"], table).select("genome", genome, where)
        genomes = [name for name in file if set(VERSION_2) <= set(_members(file[name]))]
        if not genomes:
            raise InputError(f"{where}: {what_it_is(path) or UNKNOWN_HDF5}")
        if genome not in genomes and (genome is not None or len(genomes) > 1):
            raise InputError(
                f"{where}: has cells of {', '.join(sorted(genomes))}; set data.genome to one of them"
            )
        group = file[genome or genomes[0]]
        table = pd.DataFrame(
            {"symbol": _strings(group["gene_names"])}, index=_strings(group["genes"]), dtype=object
        )
        return _parse_group(group, table)


def _members(element: h5py.Group | h5py.Dataset) -> list[str]:
    return list(element) if isinstance(element, h5py.Group) else []


def _parse_group(group: h5py.Group, features: pd.DataFrame) -> Library:
    """A matrix stored as CSC of (features, cells), which is CSR of (cells, features)."""
    shape = tuple(int(size) for size in group["shape"][()][::-1])
    parts = tuple(group[name][()] for name in ("data", "indices", "indptr"))
    if any(part.dtype.kind not in "iu" for part in parts[1:]):
        raise ValueError("indices or indptr are not whole numbers")
    return Library(sp.csr_matrix(parts, shape=shape), features, _strings(group["barcodes"])).check()


def _strings(dataset: h5py.Dataset) -> list[str]:
    if dataset.ndim != 1:
        raise ValueError(f"{dataset.name} is no list of names")
    return [str(name) for name in dataset.asstr()[()]]

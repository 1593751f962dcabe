"""What a file or folder is, by its content, and what to do with what nbmix does not read.

All that is said of a wrong kind of input, and of a library's exception while one is read, stands here.
"""

from __future__ import annotations

import errno
import gzip
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import h5py

HEAD = 4096  # bytes that tell what a file is
GZIP = b"\x1f\x8b"
ZIP = b"PK\x03\x04"

ANNDATA = "is an .h5ad file: set data=h5ad; in Python, anndata.read_h5ad reads it"
CELL_RANGER = "is of Cell Ranger: set data=tenx; in Python, nbmix.read_10x reads it"

_UNPACK = "is packed ({}): unpack it, and give what is in it"
_R = "is an R object: in R, anndataR::write_h5ad(readRDS('{name}'), 'counts.h5ad') makes an .h5ad of it"
_PAGE = "is a web page or the answer of a server in place of the file: look at it, and get the file again"
_TABLE = (
    "is a table of text: make an .h5ad of it by anndata.AnnData(pandas.read_csv('{name}', index_col=0{sep})"
    ").write_h5ad('counts.h5ad'), with .T after read_csv(...) where genes are the rows"
)

_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"BZh", _UNPACK.format("bzip2")),
    (b"\xfd7zXZ", _UNPACK.format("xz")),
    (b"\x28\xb5\x2f\xfd", _UNPACK.format("zstd")),
    (b"7z\xbc\xaf", _UNPACK.format("7-zip")),
    (b"RDX", _R.replace("readRDS('{name}')", "OBJECT")),  # of save(), which holds objects by name
    (b"X\n\0\0\0", _R),
    (b"\x93NUMPY", "is a NumPy array without names: anndata.AnnData(ARRAY).write_h5ad('counts.h5ad')"),
    (
        b"PAR1",
        "is a Parquet table: anndata.AnnData(pandas.read_parquet('{name}')).write_h5ad('counts.h5ad')",
    ),
    (b"%%MatrixMarket", "is the matrix alone: give the folder with its genes and barcodes, by data=tenx"),
    (b"version https://git-lfs", "is a pointer of Git LFS in place of the file: git lfs pull"),
)

# how the name of its first file begins, how it ends, and what a zip archive then is
_ZIPPED: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("",),
        ".npy",
        "holds arrays: anndata.AnnData(scipy.sparse.load_npz('{name}')).write_h5ad('counts.h5ad'), or with "
        "an array of numpy.load('{name}') where the matrix is not sparse",
    ),
    (
        ("[Content_Types]", "_rels/", "docProps/", "xl/"),
        "",
        "is an Excel workbook: make an .h5ad of it by anndata.AnnData(pandas.read_excel('{name}', "
        "index_col=0)).write_h5ad('counts.h5ad'), with .T after read_excel(...) where genes are the rows",
    ),
)


def what_it_is(path: Path) -> str | None:
    """What a file or folder is and what to do with it, as a clause; None where that cannot be told."""
    if path.is_dir():
        return _folder(path)
    if h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:
            return _hdf5(file)
    with path.open("rb") as file:
        head = file.read(HEAD)
    return _content(head, path.name)


class _Folder(NamedTuple):
    """Files that a folder of some kind holds, one of them at least, and what to do."""

    files: Sequence[str]
    words: str


_FOLDERS = (
    _Folder(
        (".zgroup", "zarr.json", ".zattrs"), "is a zarr store: anndata.read_zarr('{name}').write_h5ad(...)"
    ),
    _Folder(("matrix.mtx", "matrix.mtx.gz"), CELL_RANGER),
    _Folder(
        ("index_data", "shape", "storage_order"),
        "is of BPCells: in R, write_matrix_anndata_hdf5 makes an .h5ad",
    ),
    _Folder(("quants_mat.mtx", "quants_mat.gz"), "is of alevin: pyroe.load_fry reads it; then write_h5ad"),
    _Folder(
        ("cells_x_genes.mtx", "counts_unfiltered", "counts_filtered"),
        "is of kallisto: kb count --h5ad writes an .h5ad",
    ),
    _Folder(
        ("DGE.mtx", "count_matrix.mtx"),
        "is of Parse Biosciences: scanpy.read_mtx, its all_genes.csv and cell_metadata.csv; then write_h5ad",
    ),
)


def _folder(path: Path) -> str | None:
    names = {file.name for file in path.iterdir()}
    for kind in _FOLDERS:
        if names & set(kind.files):
            return kind.words.format(name=path.name)
    if several := sorted(name for name in names if name.endswith((".h5ad", ".h5"))):
        which = "the file" if len(several) == 1 else "one of the files, such as"
        return f"is a folder: give {which} {several[0]!r} in it"
    return None


def _hdf5(file: h5py.File) -> str | None:
    there, name = set(file), Path(file.filename).name
    if {"obs", "var"} <= there:
        return ANNDATA
    if {"matrix", "row_attrs", "col_attrs"} <= there:
        return f"is a .loom file: anndata.io.read_loom('{name}').write_h5ad('counts.h5ad') rewrites it"
    if "mod" in there:
        return f"is a .h5mu file: mudata.read_h5mu('{name}')['rna'].write_h5ad('counts.h5ad') takes one part"
    if "assays" in there:
        return "is an h5Seurat file: in R, SeuratDisk::LoadH5Seurat and anndataR::write_h5ad rewrite it"
    if "barcode_idx" in there:
        return "lists molecules, not counts: give filtered_feature_bc_matrix.h5 of the same run"
    groups = {name for name in there if isinstance(file.get(name), h5py.Group)}
    if "matrix" in groups or any("barcodes" in file[name] for name in groups):
        return CELL_RANGER
    return None


def _content(head: bytes, name: str) -> str | None:
    """Of a file that is no HDF5, by how it begins."""
    if not head:
        return "is empty: get it again"
    if not head.strip(b"\0"):
        return "holds zeros alone, as a download does that did not end: get it again"
    if head.startswith(GZIP):
        inner = _unpacked(head)
        if inner.startswith((b"RDX", b"X\n\0\0\0")):
            return _content(inner, name)
        return _UNPACK.format("gzip, as by gunzip")
    if head.startswith(ZIP):
        return _zip(head, name)
    for beginning, words in _BEGINNINGS:
        if head.startswith(beginning):
            return words.format(name=name)
    if head[257:262] == b"ustar":
        return _UNPACK.format("tar")
    if head.lstrip()[:1] in (b"<", b"{"):
        return _PAGE
    return _table(head, name)


def _zip(head: bytes, name: str) -> str:
    """Of an archive, by the name of its first file, which stands at byte 30."""
    first = head[30 : 30 + int.from_bytes(head[26:28], "little")].decode(errors="replace")
    for beginnings, end, words in _ZIPPED:
        if first.startswith(beginnings) and first.endswith(end):
            return words.format(name=name)
    return _UNPACK.format("zip")


def _unpacked(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(head, HEAD)
    except zlib.error:
        return b""


def _table(head: bytes, name: str) -> str | None:
    try:
        line = head.partition(b"\n")[0].decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if not line.replace("\t", "").rstrip("\r").isprintable():
        return None
    for separator, argument in (("\t", r", sep='\t'"), (",", ""), (";", ", sep=';'")):
        if separator in line:
            return _TABLE.format(name=name, sep=argument)
    return None


# What the libraries raise


def _text(*parts: str) -> Callable[[Exception, str], bool]:
    return lambda error, said: any(part in said for part in parts)


_CURES: tuple[tuple[Callable[[Exception, str], bool], str], ...] = (
    (
        _text("No locks available", "unable to lock file, errno = 37", "unable to lock file, errno = 95"),
        "its file system has no locks: set HDF5_USE_FILE_LOCKING=FALSE in the environment",
    ),
    (
        _text("unable to lock file", "unable to lock the file", "unable to flock", "is already open for"),
        "it is open for writing in another program, such as a notebook: close it there (adata.file.close())",
    ),
    (
        _text("can't open directory", "required filter", "filter is not registered", "plugin"),
        "it is compressed in a way that HDF5 does not know by itself (such as zstd): pip install hdf5plugin, "
        "or rewrite it where it can be read, by adata.write_h5ad(..., compression='gzip')",
    ),
    (
        _text("No read method registered", "IORegistryError"),
        "it was written by a newer anndata: update anndata, or write the file with an older one",
    ),
    (
        lambda error, said: isinstance(error, UnicodeDecodeError),
        "its text is not UTF-8: write it anew as UTF-8 (a text file: iconv -f latin1 -t utf-8)",
    ),
    (
        lambda error, said: getattr(error, "errno", None) in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT),
        "its disk or network does not answer: try again, or copy the file",
    ),
)


def cure(error: Exception) -> str:
    """What to do about an exception that h5py, anndata, pandas or SciPy raised while a file was read."""
    said = f"{type(error).__name__}: {error}"
    for applies, words in _CURES:
        if applies(error, said):
            return words
    return "the file is damaged or cut short, get it again"


def is_gzip(path: Path) -> bool:
    """Whether a file is packed by gzip, whatever it is called."""
    with path.open("rb") as file:
        return file.read(2) == GZIP


def opened(path: Path) -> IO[bytes]:
    """A file for reading, unpacked where it is packed by gzip."""
    # a GzipFile has all that is asked of it
    return gzip.open(path) if is_gzip(path) else path.open("rb")  # type: ignore[return-value]

"""What is not read is named, with what to do."""

from __future__ import annotations

import errno
import gzip
import zipfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from nbmix.data.recognise import cure, is_gzip, opened, what_it_is


def hdf5(*groups: str):
    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for name in groups:
                file[name] = np.arange(3)

    return write


def content(text: bytes):
    return lambda path: path.write_bytes(text)


def zipped(*names: str):
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, b"")

    return write


def arrays(save):
    def write(path: Path) -> None:
        with path.open("wb") as file:
            save(file)

    return write


def folder(*names: str):
    def write(path: Path) -> None:
        path.mkdir()
        for name in names:
            (path / name).touch()

    return write


@pytest.mark.parametrize(
    "write, words",
    [
        (hdf5("obs/_index", "var/_index", "X"), "is an .h5ad file: set data=h5ad"),
        (hdf5("matrix", "row_attrs/Gene", "col_attrs/CellID"), "is a .loom file: anndata.io.read_loom('a')"),
        (hdf5("mod/rna/X"), "is a .h5mu file: mudata.read_h5mu('a')['rna']"),
        (hdf5("assays/RNA/counts"), "is an h5Seurat file: in R"),
        (hdf5("barcode_idx", "count"), "lists molecules, not counts: give filtered"),
        (hdf5("matrix/barcodes"), "is of Cell Ranger: set data=tenx"),
        (hdf5("GRCh38/barcodes"), "is of Cell Ranger: set data=tenx"),
        (hdf5("other"), None),
        (content(b""), "is empty: get it again"),
        (content(bytes(5000)), "holds zeros alone"),
        (content(gzip.compress(b"\x89HDF\r\n\x1a\n")), "is packed (gzip, as by gunzip): unpack it"),
        (content(gzip.compress(b"X\n\0\0\0\x03")), "is an R object: in R, anndataR::write_h5ad(readRDS('a')"),
        (content(gzip.compress(b"RDX3\nX\n")), "is an R object: in R, anndataR::write_h5ad(OBJECT"),
        (content(b"\x1f\x8bnothing"), "is packed (gzip"),
        (content(b"\x28\xb5\x2f\xfd\x04"), "is packed (zstd): unpack it"),
        (zipped("counts.h5ad"), "is packed (zip): unpack it"),
        (
            zipped("xl/workbook.xml"),
            "is an Excel workbook: make an .h5ad of it by anndata.AnnData(pandas.read_e",
        ),
        (
            arrays(lambda f: np.savez(f, a=np.eye(2))),
            "holds arrays: anndata.AnnData(scipy.sparse.load_npz('a')",
        ),
        (arrays(lambda f: sp.save_npz(f, sp.eye_array(2, format="csr"))), "holds arrays: anndata.AnnData(sc"),
        (content(b"\x93NUMPY\x01"), "is a NumPy array without names"),
        (content(b"PAR1\x15"), "is a Parquet table"),
        (content(b"%%MatrixMarket matrix coordinate"), "is the matrix alone: give the folder"),
        (content(b"<!DOCTYPE html><html>404"), "is a web page or the answer of a server"),
        (content(b'{"message": "Not Found"}'), "is a web page or the answer of a server"),
        (content(b"version https://git-lfs.github.com/spec/v1\noid"), "is a pointer of Git LFS"),
        (
            content(b",CD74,LYZ\nA,1,2\n"),
            "is a table of text: make an .h5ad of it by anndata.",
        ),
        (content(b"\tCD74\tLYZ\nA\t1\t2\n"), "is a table of text"),
        (content(b"\xff\x00noise"), None),
        (folder(), None),
        (folder(".zattrs", ".zgroup"), "is a zarr store: anndata.read_zarr('a').write_h5ad"),
        (folder("zarr.json"), "is a zarr store"),
        (folder("matrix.mtx.gz"), "is of Cell Ranger: set data=tenx"),
        (folder("index_data", "shape"), "is of BPCells"),
        (folder("one.h5ad"), "is a folder: give the file 'one.h5ad' in it"),
        (folder("b.h5", "a.h5ad"), "is a folder: give one of the files, such as 'a.h5ad' in it"),
    ],
)
def test_kinds_of_input(tmp_path, write, words):
    write(tmp_path / "a")
    said = what_it_is(tmp_path / "a")
    assert (said is None) if words is None else (said is not None and said.startswith(words)), said
    assert said is None or "{" not in said


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data")
def test_a_store_that_anndata_writes(tmp_path):
    ad.AnnData(np.ones((2, 2), np.float32)).write_zarr(tmp_path / "a.zarr")
    assert "is a zarr store: anndata.read_zarr('a.zarr')" in str(what_it_is(tmp_path / "a.zarr"))


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError("unable to lock file, errno = 11, error message"), "open for writing in another program"),
        (OSError("unable to lock file, errno = 37, error message"), "HDF5_USE_FILE_LOCKING=FALSE"),
        (OSError("can't open directory (/usr/local/lib/plugin)"), "pip install hdf5plugin"),
        (OSError("required filter 'zstd' is not registered"), "pip install hdf5plugin"),
        (KeyError("No read method registered for IOSpec"), "update anndata"),
        (UnicodeDecodeError("utf-8", b"\xfc", 0, 1, "invalid"), "iconv -f latin1"),
        (OSError(errno.ESTALE, "Stale file handle"), "try again, or copy the file"),
        (ValueError("whatever else"), "damaged or cut short, get it again"),
    ],
)
def test_what_to_do_about_an_exception(error, words):
    assert words in cure(error)


def test_packed_files_are_told_by_their_content(tmp_path):
    (tmp_path / "a.gz").write_bytes(b"as it is")
    (tmp_path / "b").write_bytes(gzip.compress(b"packed"))
    assert [is_gzip(tmp_path / name) for name in ("a.gz", "b")] == [False, True]
    for name, text in (("a.gz", b"as it is"), ("b", b"packed")):
        with opened(tmp_path / name) as file:
            assert file.read() == text

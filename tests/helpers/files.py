"""Files that somebody has broken, at random places of their structure.

``python -m tests.helpers.files N [SEED [KIND ...]]`` breaks N files of each kind, or of those named, HDF5
also at random bytes, and says what came of it. What was dealt with badly is kept in the folder "hostile". The
tests break a few of each.

A reader has to give what the file says, which ``plain_h5ad`` and its like find out by the slowest means, or
refuse it by an ``InputError`` of one line, and soon. Random bytes in HDF5 are left out of the tests, because
a test could not end where libhdf5 itself does not come back from them.
"""

from __future__ import annotations

import gzip
import io
import logging
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from nbmix.data.counts import CountData
from nbmix.data.read import read_h5ad
from nbmix.data.tenx import read_tenx
from nbmix.errors import InputError

SECONDS = 20  # of the processor, that a case may take; each takes milliseconds
N_CELLS, N_GENES = 12, 7
STRANGE_NUMBERS = (-1, 0, 1, 2, 0.5, np.nan, np.inf, -np.inf, 2**24 + 2, 2**31, 2**40, -(2**40), 1e300)
STRANGE_TYPES = ("i1", "u1", "i4", "u4", "i8", "u8", ">i4", ">f8", "f2", "f4", "f8", "c16", "?", "S3")
STRANGE_WORDS = ("", "dict", "array", "csc_matrix", "csr_matrix", "dataframe", "categorical", "awkward-array")
STRANGE_LINES = (
    b"",
    b"\n",
    b"1 1\n",
    b"1 1 1 1\n",
    b"-1 1 1\n",
    b"1 1 nan\n",
    b"9999999999 1 1\n",
    b"\xff\n",
)


class Kind(NamedTuple):
    """A kind of input: how a good one is written and broken, how it is read, and what it says."""

    write: Callable[[Path], None]
    mutate: Callable[[Path, np.random.Generator], str]
    read: Callable[[Path], CountData]
    plain: Callable[[Path], np.ndarray]  # (cells, genes) dense; raises on what is not sound


def counts() -> np.ndarray:
    return np.random.default_rng(0).poisson(1.5, (N_CELLS, N_GENES)) + 1 * np.eye(N_CELLS, N_GENES, dtype=int)


# Good files


def write_h5ad(path: Path, form: Callable[[Any], Any] = sp.csr_matrix) -> None:
    x = counts().astype(np.float32)
    cells, genes = [f"cell{i}" for i in range(N_CELLS)], [f"gene{j}" for j in range(N_GENES)]
    ad.AnnData(
        form(x),
        obs=pd.DataFrame(
            {"cell_type": pd.Categorical(list("ab") * (N_CELLS // 2)), "depth": x.sum(1)}, index=cells
        ),
        var=pd.DataFrame({"symbol": [f"S{j}" for j in range(N_GENES)]}, index=genes),
        layers={"log": sp.csr_matrix(np.log1p(x))},
        obsm={"X_pca": x[:, :2]},
        varm={"PCs": x.T[:, :2]},
        uns={"cell_type_colors": np.array(["#000000", "#ffffff"]), "log1p": {"base": 2.0}},
    ).write_h5ad(path)


def write_dense_h5ad(path: Path) -> None:
    write_h5ad(path, np.asarray)


def write_csc_h5ad(path: Path) -> None:
    write_h5ad(path, sp.csc_matrix)


def write_tenx_h5(path: Path, version: int = 3) -> None:
    x = sp.csr_matrix(counts().astype(np.int32))
    strings = h5py.string_dtype()
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "hg19")
        group["data"], group["indices"], group["indptr"] = x.data, x.indices.astype(np.int64), x.indptr
        group["shape"] = np.array(x.shape[::-1], dtype=np.int32)
        group["barcodes"] = np.array([f"AC{i}-1".encode() for i in range(N_CELLS)])
        ids = np.array([f"ENSG{j}".encode() for j in range(N_GENES)])
        names = [f"S{j}" for j in range(N_GENES)]
        if version == 2:
            group["genes"] = ids
            group.create_dataset("gene_names", data=names, dtype=strings)
            return
        features = group.create_group("features")
        features["id"] = ids
        features.create_dataset("name", data=names, dtype=strings)
        features["feature_type"] = np.array([b"Gene Expression"] * N_GENES)
        features["genome"] = np.array([b"GRCh38"] * N_GENES)


def write_tenx_v2_h5(path: Path) -> None:
    write_tenx_h5(path, version=2)


def write_tenx_folder(path: Path, version: int = 3, x: sp.spmatrix | None = None) -> None:
    x = sp.coo_matrix(counts() if x is None else x)
    path.mkdir()
    matrix = io.BytesIO()
    scipy.io.mmwrite(matrix, x.T, field="integer")
    barcodes = "".join(f"AC{i}-1\n" for i in range(x.shape[0]))
    kind = "\tGene Expression" if version == 3 else ""
    features = "".join(f"ENSG{j}\tS{j}{kind}\n" for j in range(x.shape[1]))
    names = {
        3: ("matrix.mtx", "features.tsv", "barcodes.tsv"),
        2: ("matrix.mtx", "genes.tsv", "barcodes.tsv"),
    }
    contents = (matrix.getvalue(), features.encode(), barcodes.encode())
    for name, content in zip(names[version], contents, strict=True):
        if version == 3:
            (path / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (path / name).write_bytes(content)


def write_tenx_v2_folder(path: Path) -> None:
    write_tenx_folder(path, version=2)


# Breaking them


def break_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Other bytes, fewer or more of them, at one place or at some."""
    data, at = bytearray(content), int(rng.integers(max(len(content), 1)))
    length = int(rng.integers(1, 40))
    match rng.integers(5):
        case 0:
            for place in rng.integers(max(len(data), 1), size=rng.integers(1, 8)):
                data[place : place + 1] = rng.bytes(1)
        case 1:
            del data[at:]
        case 2:
            del data[at : at + length]
        case 3:
            data[at:at] = rng.bytes(length)
        case 4:
            data[at : at + length] = bytes(length)
    return bytes(data)


def break_text(content: bytes, rng: np.random.Generator) -> bytes:
    """Lines dropped, doubled, swapped or replaced, or one of their numbers."""
    lines = content.splitlines(keepends=True) or [b""]
    at = int(rng.integers(len(lines)))
    match rng.integers(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[at])
        case 2:
            lines.insert(at, STRANGE_LINES[rng.integers(len(STRANGE_LINES))])
        case 3:
            words = lines[at].split()
            if words:
                words[rng.integers(len(words))] = str(rng.choice(np.array(STRANGE_NUMBERS))).encode()
            lines[at] = b" ".join(words) + b"\n"
        case 4:
            other = int(rng.integers(len(lines)))
            lines[at], lines[other] = lines[other], lines[at]
    return b"".join(lines)


def break_file(path: Path, rng: np.random.Generator) -> str:
    path.write_bytes(break_bytes(path.read_bytes(), rng))
    return "bytes"


def break_folder(path: Path, rng: np.random.Generator) -> str:
    files = sorted(path.iterdir())
    file = files[rng.integers(len(files))]
    how = ("bytes", "text", "text", "text", "delete")[rng.integers(5)]
    if how == "delete":
        file.unlink()
    elif how == "bytes":
        break_file(file, rng)
    else:
        content = file.read_bytes()
        packed = file.suffix == ".gz"
        broken = break_text(gzip.decompress(content) if packed else content, rng)
        file.write_bytes(gzip.compress(broken, mtime=0) if packed else broken)
    return f"{how} of {file.name}"


def break_hdf5(path: Path, rng: np.random.Generator) -> str:
    """One element or attribute of an HDF5 file."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = names[rng.integers(len(names))]
        how = ("delete", "attribute", "value", "value", "value", "type", "size", "size", "kind", "link")[
            rng.integers(10)
        ]
        _break_element(file, name, how, rng)
    return f"{how} of {name}"


def _break_element(file: h5py.File, name: str, how: str, rng: np.random.Generator) -> None:
    element = file[name]
    attributes = dict(element.attrs)
    is_group = isinstance(element, h5py.Group)
    if how == "delete":
        del file[name]
    elif how == "attribute":
        if not attributes:
            return
        key = sorted(attributes)[rng.integers(len(attributes))]
        strange: list[Any] = [
            *STRANGE_WORDS,
            -1,
            2**40,
            np.nan,
            [1],
            [-1, 7],
            [12, 2**40],
            [2**40, 7],
            [7, 12],
        ]
        del element.attrs[key]
        if rng.random() < 0.8:
            element.attrs[key] = strange[rng.integers(len(strange))]
    elif how == "link":
        del file[name]
        targets = (h5py.SoftLink("/"), h5py.SoftLink(f"/{name}"), h5py.ExternalLink("/no/such.h5", "/"))
        file[name] = targets[rng.integers(3)]
    elif how == "kind":
        del file[name]
        if is_group:
            file[name] = np.arange(3)
        else:
            file.create_group(name)
        file[name].attrs.update(attributes)
    elif not is_group:
        _replace(file, name, _strange(element[()], how, rng), attributes)


def _strange(value: Any, how: str, rng: np.random.Generator) -> Any:
    """Another value of a dataset: some of its numbers or words, its type, or its size."""
    array = np.array(value)
    if how == "size":
        if not array.ndim:
            return np.repeat(array, 3)
        return (array[:-1], array[None], array.ravel()[:0], np.repeat(array, 2, axis=0))[rng.integers(4)]
    if how == "type":
        kind = STRANGE_TYPES[rng.integers(len(STRANGE_TYPES))]
        with np.errstate(all="ignore"):
            try:
                return array.astype(kind)
            except (TypeError, ValueError):
                return np.zeros(array.shape, dtype=kind)
    if array.dtype.kind in "OS":
        words = (b"\xff\xfe", b"", b"a\nb", b"nan", b"\x1b[31m", array.flat[0])
        if array.ndim:
            array.flat[rng.integers(array.size)] = words[rng.integers(len(words))]
        return array
    if array.ndim == 0 or not array.size:
        return array
    strange = STRANGE_NUMBERS[rng.integers(len(STRANGE_NUMBERS))]
    with np.errstate(all="ignore"):
        if array.dtype.kind in "iu" and rng.random() < 0.5:
            array = array.astype("f8" if isinstance(strange, float) else "i8")
        info = np.iinfo(array.dtype) if array.dtype.kind in "iu" else None
        if info is not None:
            strange = int(np.clip(np.nan_to_num(strange), info.min, min(info.max, 2**53)))
        array.flat[rng.integers(array.size)] = strange
    return array


def _replace(file: h5py.File, name: str, value: np.ndarray, attributes: dict[str, Any]) -> None:
    del file[name]
    dtype = h5py.string_dtype() if value.dtype.kind == "O" else value.dtype
    file.create_dataset(name, data=value, dtype=dtype).attrs.update(attributes)


# What they say, by the slowest means


def dense_from_parts(data: Any, indices: Any, indptr: Any, shape: tuple[int, int]) -> np.ndarray:
    """(rows, columns) of a CSR matrix; every part is asked whether it makes sense."""
    n_rows, n_columns = shape
    assert indices.dtype.kind in "iu" and indptr.dtype.kind in "iu", "pointers that are no whole numbers"
    assert data.ndim == indices.ndim == indptr.ndim == 1 and len(data) == len(indices)
    assert len(indptr) == n_rows + 1 and indptr[0] == 0
    x = np.zeros(shape)
    for row in range(n_rows):
        begin, end = int(indptr[row]), int(indptr[row + 1])
        assert 0 <= begin <= end <= len(data), "rows that do not follow each other"
        for place in range(begin, end):
            column = int(indices[place])
            assert 0 <= column < n_columns, "a column that there is not"
            x[row, column] += data[place]
    return x


def plain_h5ad(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        x = file["X"]
        if isinstance(x, h5py.Dataset):
            dense = x[()].astype(np.float64)
        else:
            parts = (x["data"][()], x["indices"][()], x["indptr"][()])
            shape = tuple(int(size) for size in x.attrs["shape"])
            kind = x.attrs["encoding-type"]
            assert kind in ("csr_matrix", "csc_matrix")
            dense = dense_from_parts(*parts, shape if kind == "csr_matrix" else shape[::-1])
            dense = dense if kind == "csr_matrix" else dense.T
        for name, size in zip(("obs", "var"), dense.shape, strict=True):
            assert len(file[name][file[name].attrs["_index"]]) == size, "names for other cells or genes"
    return dense


def plain_tenx_h5(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        group = file["matrix"] if "matrix" in file else file["hg19"]
        n_genes, n_cells = (int(size) for size in group["shape"][()])
        assert len(group["barcodes"]) == n_cells
        assert len(group["features/id"] if "features" in group else group["genes"]) == n_genes
        parts = (group["data"][()], group["indices"][()], group["indptr"][()])
        dense = dense_from_parts(*parts, (n_cells, n_genes))
        if "features" in group and "feature_type" in group["features"]:
            dense = dense[:, group["features/feature_type"][()] == b"Gene Expression"]
    return dense


def plain_tenx_folder(path: Path) -> np.ndarray:
    def lines(*names: str) -> list[str]:
        for name in names:
            for file in (path / f"{name}.gz", path / name):
                if file.exists():
                    content = file.read_bytes()
                    text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
                    return text.removesuffix("\n").split("\n") if text else []
        raise AssertionError("a file is missing")

    features, barcodes = lines("features.tsv", "genes.tsv"), lines("barcodes.tsv")
    banner, *rest = lines("matrix.mtx")
    assert banner.lower().split()[:3] == ["%%matrixmarket", "matrix", "coordinate"]
    rows = [line.split() for line in rest if line.split() and not line.startswith("%")]
    n_genes, n_cells, n_entries = (int(word) for word in rows[0])
    assert (n_genes, n_cells, n_entries) == (len(features), len(barcodes), len(rows) - 1)
    x = np.zeros((n_cells, n_genes))
    for row in rows[1:]:
        gene, cell = int(row[0]) - 1, int(row[1]) - 1
        assert 0 <= gene < n_genes and 0 <= cell < n_cells and x[cell, gene] == 0
        x[cell, gene] = float(row[2]) if len(row) > 2 else 1.0
    kinds = [line.split("\t")[2:3] for line in features]
    return x[:, [kind == ["Gene Expression"] for kind in kinds]] if all(kinds) else x


def backed(path: Path) -> CountData:
    return read_h5ad(path, backed=True).load()


KINDS = {
    "h5ad": Kind(write_h5ad, break_hdf5, read_h5ad, plain_h5ad),
    "backed_h5ad": Kind(write_h5ad, break_hdf5, backed, plain_h5ad),
    "dense_h5ad": Kind(write_dense_h5ad, break_hdf5, read_h5ad, plain_h5ad),
    "csc_h5ad": Kind(write_csc_h5ad, break_hdf5, read_h5ad, plain_h5ad),
    "tenx_h5": Kind(write_tenx_h5, break_hdf5, read_tenx, plain_tenx_h5),
    "tenx_v2_h5": Kind(write_tenx_v2_h5, break_hdf5, read_tenx, plain_tenx_h5),
    "tenx_folder": Kind(write_tenx_folder, break_folder, read_tenx, plain_tenx_folder),
    "tenx_v2_folder": Kind(write_tenx_v2_folder, break_folder, read_tenx, plain_tenx_folder),
}


def check(kind: Kind, path: Path) -> str:
    """Read a broken file; "refused" or "read". Raises AssertionError, or whatever came, if done badly."""
    try:
        data = kind.read(path)
    except InputError as error:
        assert "\n" not in str(error), f"more than one line: {error}"
        return "refused"
    said = plain_of(kind, path)
    np.testing.assert_array_equal(data.counts.toarray(), said[:, said.sum(0) >= 1])
    assert (data.counts.data > 0).all() and (data.counts.data == np.rint(data.counts.data)).all()
    assert data.cell_names.shape == data.size_factors.shape == (said.shape[0],)
    np.testing.assert_array_equal(data.size_factors, said.sum(1))
    assert data.gene_names.shape == (data.n_genes,)
    assert len(set(data.gene_names.tolist())) == data.n_genes
    return "read"


def plain_of(kind: Kind, path: Path) -> np.ndarray:
    try:
        return kind.plain(path)
    except Exception as error:
        raise AssertionError(f"was read, though it makes no sense: {error!r}") from error


def cases(
    kind: Kind,
    folder: Path,
    n_cases: int,
    seed: int,
    mutate: Callable[[Path, np.random.Generator], str] | None = None,
) -> Iterator[tuple[str, Path]]:
    """What was broken, and where the file is."""
    good, bad = folder / "good", folder / "bad"
    kind.write(good)
    rng = np.random.default_rng(seed)
    for _ in range(n_cases):
        if bad.is_dir():
            shutil.rmtree(bad)
        if good.is_dir():
            shutil.copytree(good, bad)
        else:
            shutil.copy(good, bad)
        yield (mutate or kind.mutate)(bad, rng), bad


def check_apart(kind: Kind, path: Path) -> str:
    """``check`` in a process of its own, which a library may end, or never leave: what came of it."""
    read, write = os.pipe()
    if not (child := os.fork()):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process wherever it is
        signal.alarm(20 * SECONDS)  # if it waits for something
        try:
            said = check(kind, path)
        except BaseException as error:
            said = f"{error!r:.600}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    too_long = status in (-signal.SIGPROF, -signal.SIGALRM)
    return said or ("never came back" if too_long else f"ended by signal {-status}")


def main(n_cases: int, seed: int = 0, *names: str) -> int:
    logging.disable()
    warnings.simplefilter("ignore")
    failed = 0
    for name in names or KINDS:
        kind = KINDS[name]
        ways = {"structure": kind.mutate} | ({"bytes": break_file} if kind.mutate is break_hdf5 else {})
        for way, mutate in ways.items():
            outcomes: Counter[str] = Counter()
            with tempfile.TemporaryDirectory() as folder:
                for number, (what, path) in enumerate(cases(kind, Path(folder), n_cases, seed, mutate)):
                    said = check_apart(kind, path)
                    if said not in ("read", "refused"):
                        failed += 1
                        kept = Path("hostile") / f"{name}_{way}_{seed}_{number}"
                        (shutil.copytree if path.is_dir() else shutil.copy)(path, kept)
                        print(f"{kept}, {what}: {said}", flush=True)
                        said = "WRONG"
                    outcomes[said] += 1
            print(name, way, dict(outcomes), flush=True)
    return failed


if __name__ == "__main__":
    Path("hostile").mkdir(exist_ok=True)
    sys.exit(main(*map(int, sys.argv[1:3]), *sys.argv[3:]) > 0)


def assert_canonical(x: sp.csr_matrix) -> None:
    """Sorted, distinct and without zeros, in the types of ``check_counts``."""
    assert type(x) is sp.csr_matrix
    assert x.dtype == np.float32
    assert x.indices.dtype == x.indptr.dtype == np.int32
    assert x.has_canonical_format
    assert x.data.all()

"""Folders and .h5 files of Cell Ranger, against what was written into them."""

from __future__ import annotations

import gzip
import io
import re
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

from nbmix.data.counts import CountData
from nbmix.data.module import from_tenx
from nbmix.data.read import read_h5ad
from nbmix.data.tenx import parse_library, read_table, read_tenx
from nbmix.errors import InputError
from tests.helpers.files import KINDS, N_CELLS, N_GENES, counts, write_tenx_folder, write_tenx_h5
from tests.helpers.running import run_here

TENX = [name for name in KINDS if name.startswith("tenx")]


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", TENX)
def test_every_layout(name, tmp_path):
    KINDS[name].write(tmp_path / "input")
    data = read_tenx(tmp_path / "input")
    np.testing.assert_array_equal(data.counts.toarray(), counts())
    assert data.counts.dtype == np.float32
    assert data.cell_names.tolist() == [f"AC{i}-1" for i in range(N_CELLS)]
    assert data.gene_names.tolist() == [f"ENSG{j}" for j in range(N_GENES)]
    assert data.gene_symbols is not None
    assert data.gene_symbols.tolist() == [f"S{j}" for j in range(N_GENES)]
    np.testing.assert_array_equal(data.size_factors, counts().sum(1))
    assert data.labels is None
    assert data.annotations is not None
    columns = {"tenx_h5": ["symbol", "feature_type", "genome"], "tenx_folder": ["symbol", "feature_type"]}
    assert data.annotations.var.columns.tolist() == columns.get(name, ["symbol"])


def test_files_of_a_folder_may_be_compressed_or_not(tmp_path):
    write_tenx_folder(tmp_path / "v3")
    for packed in list((tmp_path / "v3").iterdir())[:2]:
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    np.testing.assert_array_equal(read_tenx(tmp_path / "v3").counts.toarray(), counts())


def test_line_ends_of_windows(tmp_path):
    write_tenx_folder(tmp_path / "v2", version=2)
    for file in (tmp_path / "v2").iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    data = read_tenx(tmp_path / "v2")
    np.testing.assert_array_equal(data.counts.toarray(), counts())
    assert data.cell_names[0] == "AC0-1"


def read_rewritten(folder: Path, version: int = 2, **changes) -> CountData:
    """A folder whose files of some names are changed, each by a function of its text."""
    write_tenx_folder(folder, version)
    for file in folder.iterdir():
        if change := changes.get(file.name.partition(".")[0]):
            file.write_bytes(change(file.read_bytes()))
    return read_tenx(folder)


BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "changes",
    [
        {"genes": lambda b: b"gene_id\tgene_name\n" + b, "barcodes": lambda b: b'"x"\n' + b},
        {"genes": lambda b: b + b"\n\n", "barcodes": lambda b: b + b"\r\n"},
        {"barcodes": lambda b: b.replace(b"-1\n", b"-1\tsample 1\n")},
        {name: lambda b: BYTE_ORDER_MARK + b for name in ("genes", "barcodes", "matrix")},
        {"barcodes": lambda b: b.decode().encode("utf-16")},
        {"barcodes": lambda b: b.replace(b"AC", b'"AC').replace(b"-1", b'-1"')},
        {name: gzip.compress for name in ("genes", "barcodes", "matrix")},
    ],
    ids=["heads", "blank lines", "second column", "byte-order marks", "UTF-16", "quotes", "packed as .tsv"],
)
def test_tables_of_names_of_other_programs(tmp_path, changes):
    data = read_rewritten(tmp_path / "v2", **changes)
    np.testing.assert_array_equal(data.counts.toarray(), counts())
    assert data.cell_names.tolist() == [f"AC{i}-1" for i in range(N_CELLS)]
    assert data.gene_names.tolist() == [f"ENSG{j}" for j in range(N_GENES)]
    assert data.gene_symbols is not None
    assert data.gene_symbols.tolist() == [f"S{j}" for j in range(N_GENES)]


def test_genes_by_name_alone(tmp_path):
    data = read_rewritten(tmp_path / "v2", genes=lambda b: re.sub(rb"\t.*", b"", b))
    assert data.gene_names.tolist() == [f"ENSG{j}" for j in range(N_GENES)]
    assert data.gene_symbols is None


def test_gz_that_is_not_packed(tmp_path):
    data = read_rewritten(
        tmp_path / "v3", 3, **dict.fromkeys(("features", "barcodes", "matrix"), gzip.decompress)
    )
    np.testing.assert_array_equal(data.counts.toarray(), counts())


def test_cells_in_rows(tmp_path):
    write_tenx_folder(tmp_path / "v2", version=2)
    scipy.io.mmwrite(tmp_path / "v2/matrix.mtx", sp.coo_matrix(counts()), field="integer")
    np.testing.assert_array_equal(read_tenx(tmp_path / "v2").counts.toarray(), counts())


def test_a_folder_of_samples(tmp_path):
    """As GEO has them: GSM1_matrix.mtx.gz."""
    for sample, x in (("GSM1", counts()), ("GSM2", counts() + 1)):
        write_tenx_folder(tmp_path / sample, x=sp.coo_matrix(x))
        for file in list((tmp_path / sample).iterdir()):
            file.rename(file.with_name(f"{sample}_{file.name}"))
    np.testing.assert_array_equal(read_tenx(tmp_path / "GSM1").counts.toarray(), counts())
    for file in list((tmp_path / "GSM2").iterdir()):
        file.rename(tmp_path / "GSM1" / file.name)
    with pytest.raises(InputError, match=r"several samples .*give the matrix\.mtx of one of them"):
        read_tenx(tmp_path / "GSM1")
    second = read_tenx(tmp_path / "GSM1/GSM2_matrix.mtx.gz")
    np.testing.assert_array_equal(second.counts.toarray(), counts() + 1)


@pytest.mark.parametrize("lines_at_once", [1, 3, 10**6])
def test_matrix_in_chunks_and_in_any_order(lines_at_once):
    x, rng = sp.coo_matrix(counts().T), np.random.default_rng(0)
    order = rng.permutation(x.nnz)
    x = sp.coo_matrix((x.data[order], (x.row[order], x.col[order])), x.shape)
    matrix = io.BytesIO()
    scipy.io.mmwrite(matrix, x, field="integer", comment="one\ntwo")
    n_bytes = matrix.tell()
    matrix.seek(0)
    names = "\n".join(map(str, range(N_CELLS))).encode()
    features = "\n".join(f"g{j}\ts{j}" for j in range(N_GENES)).encode()
    library = parse_library(matrix, features, names, n_bytes, lines_at_once)
    np.testing.assert_array_equal(library.counts.toarray(), counts())
    assert library.counts.dtype == np.float32


def test_features_that_are_no_genes_are_left_out(tmp_path, caplog):
    caplog.set_level("INFO")
    write_tenx_h5(tmp_path / "a.h5")
    kinds = np.array([b"Gene Expression"] * (N_GENES - 2) + [b"Antibody Capture"] * 2)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["matrix/features/feature_type"][:] = kinds[0]
        del file["matrix/features/feature_type"]
        file["matrix/features/feature_type"] = kinds
    data = read_tenx(tmp_path / "a.h5")
    np.testing.assert_array_equal(data.counts.toarray(), counts()[:, :-2])
    np.testing.assert_array_equal(data.size_factors, counts()[:, :-2].sum(1))
    assert "left out 2 features that are not Gene Expression" in caplog.text
    assert read_tenx(tmp_path / "a.h5", feature_type=None).n_genes == N_GENES
    assert read_tenx(tmp_path / "a.h5", feature_type="Antibody Capture").n_genes == 2
    with pytest.raises(InputError) as error:
        read_tenx(tmp_path / "a.h5", feature_type="Peaks")
    assert one_line(error).endswith(
        "no feature has data.feature_type=Peaks; there are: Antibody Capture, Gene Expression"
    )


def test_genomes(tmp_path):
    write_tenx_h5(tmp_path / "v3.h5")
    with h5py.File(tmp_path / "v3.h5", "r+") as file:
        del file["matrix/features/genome"]
        file["matrix/features/genome"] = np.array([b"hg"] * 3 + [b"mm"] * (N_GENES - 3))
    assert read_tenx(tmp_path / "v3.h5").n_genes == N_GENES
    np.testing.assert_array_equal(
        read_tenx(tmp_path / "v3.h5", genome="mm").counts.toarray(), counts()[:, 3:]
    )
    with pytest.raises(InputError, match=r"data\.genome=rn; there are: hg, mm"):
        read_tenx(tmp_path / "v3.h5", genome="rn")

    write_tenx_h5(tmp_path / "v2.h5", version=2)
    with h5py.File(tmp_path / "v2.h5", "r+") as file:
        file.copy("hg19", "mm10")
        file["mm10/data"][:] += 1
    for settings in ({}, {"genome": "rn"}):
        with pytest.raises(InputError, match=r"cells of hg19, mm10; set data\.genome to one of them"):
            read_tenx(tmp_path / "v2.h5", **settings)
    other = read_tenx(tmp_path / "v2.h5", genome="mm10").counts.toarray()
    np.testing.assert_array_equal(other, counts() + (counts() > 0))

    write_tenx_folder(tmp_path / "folder")
    with pytest.raises(InputError, match=r"data\.genome=mm10: a folder has none"):
        read_tenx(tmp_path / "folder", genome="mm10")


def test_repeated_gene_ids_and_subsample(tmp_path, caplog):
    write_tenx_folder(tmp_path / "v2", version=2)
    genes = tmp_path / "v2" / "genes.tsv"
    genes.write_text(genes.read_text().replace("ENSG1\t", "ENSG0\t"))
    data = read_tenx(tmp_path / "v2", subsample=5, seed=1, min_counts=0)
    assert data.gene_names[:2].tolist() == ["ENSG0", "ENSG0-1"]
    assert "1 gene names are repeated" in caplog.text
    rows = [int(name.removeprefix("AC").removesuffix("-1")) for name in data.cell_names]
    assert rows == sorted(set(rows))
    np.testing.assert_array_equal(data.counts.toarray(), counts()[rows])


def test_a_raw_matrix_is_refused(tmp_path):
    write_tenx_h5(tmp_path / "raw.h5")
    with h5py.File(tmp_path / "raw.h5", "r+") as file:
        group = file["matrix"]
        n_raw = 10 * N_CELLS
        indptr = np.r_[group["indptr"][()], np.full(n_raw - N_CELLS, group["data"].size)]
        for name, value in {
            "indptr": indptr,
            "shape": np.array([N_GENES, n_raw]),
            "barcodes": np.array([f"B{i}".encode() for i in range(n_raw)]),
        }.items():
            del group[name]
            group[name] = value
    with pytest.raises(InputError, match=r"108 of 120 barcodes have no counts, as in a raw matrix; give"):
        read_tenx(tmp_path / "raw.h5")


def rewrite(name: str, change) -> None:
    def write(folder: Path) -> None:
        write_tenx_folder(folder, version=2)
        (folder / name).write_text(change((folder / name).read_text()))

    return write


def nested(path: Path) -> None:
    path.mkdir()
    write_tenx_folder(path / "hg19", version=2)


def anndata_file(path: Path) -> None:
    ad.AnnData(sp.csr_matrix(counts())).write_h5ad(path)


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (lambda path: None, "no such file; check the path"),
        (Path.touch, "is empty: get it again"),
        (Path.mkdir, "is a folder without matrix.mtx or matrix.mtx.gz; give a folder as Cell Ranger"),
        (nested, "is a folder without matrix.mtx or matrix.mtx.gz; give the folder 'hg19' in it"),
        (anndata_file, "is an .h5ad file: set data=h5ad"),
        (
            rewrite("barcodes.tsv", lambda t: t + "X-1\n"),
            "cannot be read (a matrix of (12, 7) for 13",
        ),
        (
            rewrite("genes.tsv", lambda t: t + "ENSG9\tS9\n"),
            "cannot be read (a matrix of (12, 7) for 12",
        ),
        (
            rewrite("genes.tsv", lambda t: t.replace("ENSG2\tS2", "ENSG2")),
            "cannot be read ('ENSG2' has 1 columns, other genes 2)",
        ),
        (
            rewrite("barcodes.tsv", lambda t: t.replace("AC3-1", "")),
            "cannot be read (line 4 of a table of names has none)",
        ),
        (
            rewrite("genes.tsv", lambda t: "0\t0\n" + t),
            "cannot be read (a matrix of (12, 7) for 12 barcodes, 8 genes)",
        ),
        (
            rewrite("matrix.mtx", lambda t: t + "1 1 1\n"),
            "cannot be read (matrix.mtx has more",
        ),
        (rewrite("matrix.mtx", lambda t: t.rsplit("\n", 2)[0] + "\n"), "cannot be read (matrix.mtx has "),
        (
            rewrite("matrix.mtx", lambda t: t.replace("general", "symmetric")),
            "cannot be read (matrix.mtx ",
        ),
        (
            rewrite("matrix.mtx", lambda t: "%" + t),
            "cannot be read (matrix.mtx does not begin",
        ),
        (
            rewrite("matrix.mtx", lambda t: t.replace("7 12 ", "7 12 99999999999")),
            "cannot be read (a matrix that claims",
        ),
    ],
)
def test_bad_input(tmp_path, write, what):
    path = tmp_path / "input"
    write(path)
    with pytest.raises(InputError) as error:
        read_tenx(path)
    assert one_line(error).startswith(f"data.path={path}: {what}")


def with_entry(folder: Path, entry: str) -> None:
    """A folder whose last count is another entry; "at" stands for where it was."""
    write_tenx_folder(folder, version=2)
    *lines, last = (folder / "matrix.mtx").read_text().splitlines()
    entry = entry.replace("at", last.rsplit(" ", 1)[0])
    (folder / "matrix.mtx").write_text("\n".join([*lines, entry]) + "\n")


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("at 0.5", "X holds fractional values (first: 0.5 at cell 'AC"),
        ("at -1", "X holds negative values"),
        ("at nan", "X holds NaN"),
        ("at 1e30", "X holds values above 2**24"),
        ("8 12 1", "cannot be read (matrix.mtx has an entry at 8 of 1 to 7"),
        ("0 12 1", "cannot be read (matrix.mtx has an entry at "),
        ("at", "X holds NaN"),
        ("1 1 1 1", "cannot be read ("),
        ("1.5 1 1", "cannot be read ("),
        ("a b c", "cannot be read ("),
    ],
)
def test_bad_entries(tmp_path, entry, what):
    path = tmp_path / "v2"
    with_entry(path, entry)
    with pytest.raises(InputError) as error:
        read_tenx(path)
    assert one_line(error).startswith(f"data.path={path}: {what}")


def test_an_entry_given_twice(tmp_path):
    first = (counts()[0] > 0).argmax() + 1
    with_entry(tmp_path / "v2", f"{first} 1 1")
    with pytest.raises(InputError, match=r"matrix\.mtx gives an entry twice"):
        read_tenx(tmp_path / "v2")


@pytest.mark.parametrize("name", ["barcodes.tsv.gz", "barcodes.tsv"])
def test_names_that_never_end(tmp_path, name):
    content = bytes(2**20)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_table(tmp_path / name, largest=2**20) == content
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} is larger than 0\.5 MiB$"):
        read_table(tmp_path / name, largest=2**19)


def test_the_other_reader_is_named(tmp_path):
    write_tenx_h5(tmp_path / "a.h5")
    write_tenx_folder(tmp_path / "folder")
    for name in ("a.h5", "folder"):
        with pytest.raises(InputError, match="data=tenx"):
            read_h5ad(tmp_path / name)
    anndata_file(tmp_path / "b.h5ad")
    with pytest.raises(InputError, match="data=h5ad"):
        read_tenx(tmp_path / "b.h5ad")


@pytest.mark.parametrize(
    ("gone", "there", "message"),
    [
        ("barcodes.tsv.gz", None, r"without barcodes\.tsv or barcodes\.tsv\.gz; give a folder as"),
        (
            "features.tsv.gz",
            "features.csv",
            r"features\.tsv\.gz; write features\.csv as features\.tsv",
        ),
        ("matrix.mtx.gz", None, r"without matrix\.mtx or matrix\.mtx\.gz"),
    ],
)
def test_the_file_that_is_missing_is_named(tmp_path, gone, there, message):
    write_tenx_folder(tmp_path / "run")
    path = tmp_path / "run" / gone
    path.rename(path.with_name(there)) if there else path.unlink()
    with pytest.raises(InputError, match=message):
        read_tenx(tmp_path / "run")


@pytest.mark.parametrize("name", ["barcodes", "genes"])
def test_names_with_commas_between_their_columns(tmp_path, name):
    def commas(content: bytes) -> bytes:
        return re.sub(b"\t|(?=\n)", b",", content)

    with pytest.raises(InputError, match=r"\.tsv: has commas between its columns, as in '.*'; write tabs"):
        read_rewritten(tmp_path / "v2", **{name: commas})


def test_path_must_be_set():
    with pytest.raises(InputError, match=r"data\.path is not set: give a folder or an \.h5 file"):
        read_tenx(None)
    with pytest.raises(InputError, match=r"data\.path is not set"):
        from_tenx(None, batch_size=8).setup()


def test_a_run(tmp_path):
    write_tenx_h5(tmp_path / "a.h5")
    settings = (
        "model.n_components=2",
        "model.folds=2",
        "trainer.max_epochs=2",
        "evaluation.max_umap_cells=0",
    )
    metrics = run_here(
        tmp_path / "run", "data=tenx", f"data.path={tmp_path / 'a.h5'}", *settings, "start=kmeans"
    )
    assert (metrics["n_cells"], metrics["n_genes"]) == (N_CELLS, N_GENES)
    result = ad.read_h5ad(tmp_path / "run" / "result.h5ad")
    assert result.var["symbol"].tolist() == [f"S{j}" for j in range(N_GENES)]

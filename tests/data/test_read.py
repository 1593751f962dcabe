from __future__ import annotations

import fcntl
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from nbmix.data.read import read_h5ad
from nbmix.errors import InputError

N_CELLS, N_GENES = 30, 8


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def adata() -> ad.AnnData:
    rng = np.random.default_rng(0)
    x = rng.poisson(2, size=(N_CELLS, N_GENES)).astype(np.float32)
    x[:10, 0] = 0  # silent in population a
    return ad.AnnData(
        sp.csr_matrix(x),
        obs=pd.DataFrame(
            {"cell_type": np.repeat(["a", "b", "c"], 10), "total": x.sum(axis=1)},
            index=[f"cell{i}" for i in range(N_CELLS)],
        ),
        var=pd.DataFrame(index=[f"gene{j}" for j in range(N_GENES)]),
        layers={"double": sp.csc_matrix(2 * x), "dense": x, "log": np.log1p(x)},
        obsm={"weights": np.full((N_CELLS, 2), 0.5), "X_pca": x[:, :2]},
        uns={"note": "ignored"},
    )


@pytest.fixture
def path(adata, tmp_path) -> Path:
    path = tmp_path / "counts.h5ad"
    adata.write_h5ad(path)
    return path


def test_whole_file(adata, path):
    data = read_h5ad(path)
    np.testing.assert_array_equal(data.counts.toarray(), adata.X.toarray())
    np.testing.assert_array_equal(data.labels, adata.obs["cell_type"])
    np.testing.assert_array_equal(data.size_factors, adata.obs["total"])
    np.testing.assert_array_equal(data.cell_names, adata.obs_names)
    np.testing.assert_array_equal(data.gene_names, adata.var_names)


@pytest.mark.parametrize("layer", ["double", "dense"])
def test_layer_size_factors_and_prior(adata, path, layer):
    data = read_h5ad(str(path), layer=layer, size_factor_key="total", prior_key="weights", label_key=None)
    expected = adata.layers[layer]
    np.testing.assert_array_equal(
        data.counts.toarray(), expected.toarray() if sp.issparse(expected) else expected
    )
    np.testing.assert_array_equal(data.size_factors, adata.obs["total"])
    np.testing.assert_array_equal(data.prior, adata.obsm["weights"])
    assert data.labels is None


def test_populations_come_before_the_gene_filter(adata, path):
    data = read_h5ad(path, populations=["a"])
    np.testing.assert_array_equal(data.counts.toarray(), adata.X[:10, 1:].toarray())
    assert set(data.labels) == {"a"}
    assert read_h5ad(path, populations="b").n_cells == 10
    assert read_h5ad(path, populations=["c", "a"]).cell_names[0] == "cell0"


def test_cells_without_a_label_can_be_left_out(adata, tmp_path):
    adata.obs.loc["cell29", "cell_type"] = None
    adata.write_h5ad(tmp_path / "missing.h5ad")
    assert read_h5ad(tmp_path / "missing.h5ad", populations=["a", "c"]).n_cells == 19
    with pytest.raises(InputError, match="misses the label of 1 of 30 cells"):
        read_h5ad(tmp_path / "missing.h5ad")


def test_subsample_is_reproducible_and_in_file_order(adata, path):
    first, again = (read_h5ad(path, populations=["b", "c"], subsample=12, seed=3) for _ in range(2))
    assert first.cell_names.tolist() == again.cell_names.tolist()
    rows = [int(name.removeprefix("cell")) for name in first.cell_names]
    assert rows == sorted(set(rows))
    assert len(rows) == 12
    assert min(rows) >= 10
    assert read_h5ad(path, populations=["b", "c"], subsample=12, seed=4).cell_names.tolist() != rows
    picked = adata.X[rows][:, [int(name.removeprefix("gene")) for name in first.gene_names]]
    np.testing.assert_array_equal(first.counts.toarray(), picked.toarray())


def test_repeated_names_read_without_warnings(adata, tmp_path, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.obs_names = ["cell"] * N_CELLS
        adata.var_names = ["gene"] * 2 + [f"gene{j}" for j in range(2, N_GENES)]
        adata.write_h5ad(tmp_path / "repeated.h5ad")
    data = read_h5ad(tmp_path / "repeated.h5ad", subsample=20)
    assert data.gene_names[:2].tolist() == ["gene", "gene-1"]
    assert "1 gene names are repeated" in caplog.text


def test_fractional_counts_name_the_layers_of_the_file(adata, tmp_path):
    adata.X = adata.layers["log"]
    adata.write_h5ad(tmp_path / "log.h5ad")
    for settings in ({}, {"populations": ["b"]}):
        with pytest.raises(InputError) as error:
            read_h5ad(tmp_path / "log.h5ad", **settings)
        message = one_line(error)
        assert message.startswith(f"data.path={tmp_path / 'log.h5ad'}: X holds fractional values (first: ")
        assert message.endswith("nbmix needs raw counts: set data.layer=dense or data.layer=double")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (
            {"populations": ["a", "x", "y"]},
            "no cell has obs['cell_type'] = x, y (data.populations); there are: a, b, c",
        ),
        ({"populations": []}, "data.populations is empty; name some of: a, b, c"),
        ({"populations": ["a"], "label_key": None}, "data.populations needs labels"),
        ({"populations": ["a"], "label_key": "kind"}, "obs has no column 'kind'; set data.label_key"),
        ({"subsample": 31}, "data.subsample=31 must be from 1 to the 30 cells there are"),
        ({"subsample": 0}, "data.subsample=0 must be from 1"),
        ({"layer": "raw"}, "no layer 'raw'; set data.layer to one of its layers (dense, double, log)"),
        ({"prior_key": "w"}, "no entry 'w'; set data.prior_key to one of its entries (X_pca, weights)"),
        (
            {"label_key": "kind"},
            "no column 'kind'; set data.label_key to one of its columns (cell_type, total)",
        ),
    ],
)
def test_bad_settings(path, settings, what):
    with pytest.raises(InputError) as error:
        read_h5ad(path, **settings)
    assert what in one_line(error)


def write_text(path: Path) -> None:
    path.write_text("gene,cell\n1,2\n")


def write_noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(200))


def write_half(path: Path) -> None:
    adata = ad.AnnData(sp.random(50, 50, 0.5, format="csr", dtype=np.float32))
    adata.write_h5ad(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_other_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["matrix"] = np.ones((2, 2))


def write_before_anndata_0_7(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["obs"] = np.array([(b"cell0",)], dtype=[("index", "S5")])
        file["var"] = np.array([(b"gene0",)], dtype=[("index", "S5")])
        file["X"] = np.ones((1, 1))


def write_obs_of_no_kind(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("obs").attrs["encoding-type"] = "unheard-of"
        file.create_group("var")


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (lambda path: None, "no such file; check the path"),
        (Path.mkdir, "is a folder; give the .h5ad file in it"),
        (Path.touch, "is empty: get it again"),
        (write_text, "is a table of text: make an .h5ad of it by anndata.AnnData(pandas.read_csv("),
        (write_noise, "is not an HDF5 file; give an .h5ad file"),
        (write_half, "cannot be read (Unable to synchronously open file (truncated file"),
        (write_other_hdf5, "is HDF5 but no AnnData (no obs and var)"),
        (write_before_anndata_0_7, "dates from before anndata 0.7; rewrite it"),
        (write_obs_of_no_kind, "cannot be read ("),
    ],
)
def test_bad_files(tmp_path, write, what):
    path = tmp_path / "bad.h5ad"
    write(path)
    with pytest.raises(InputError) as error:
        read_h5ad(path)
    assert one_line(error).startswith(f"data.path={path}: {what}")


def test_a_file_with_damage_inside(path):
    with h5py.File(path, "r+") as file:
        del file["X/indices"]
    with pytest.raises(
        InputError, match=r"data\.path=.*: cannot be read \(.*\); the file is damaged"
    ) as error:
        read_h5ad(path)
    one_line(error)
    with h5py.File(path, "r+") as file:
        del file["X"]
    with pytest.raises(InputError, match=r"X is missing; set data\.layer to one of its layers"):
        read_h5ad(path)


def test_path_must_be_set():
    with pytest.raises(InputError, match=r"data\.path is not set") as error:
        read_h5ad(None)
    one_line(error)


def test_counts_that_were_put_aside(adata, tmp_path):
    """X is normalised, raw holds the counts of more genes: the message names it, and the setting reads it."""
    more = adata.copy()
    counts = more.X.toarray()
    adata = adata[:, 2:].copy()
    adata.raw = more
    adata.X = adata.layers["log"]
    for name in list(adata.layers):
        del adata.layers[name]
    path = tmp_path / "normalised.h5ad"
    adata.write_h5ad(path)
    for settings in ({}, {"populations": ["b"]}):
        with pytest.raises(InputError) as error:
            read_h5ad(path, **settings)
        assert one_line(error).endswith("nbmix needs raw counts: set data.layer=raw.X")
    for backed in (False, True):
        data = read_h5ad(path, layer="raw.X", backed=backed).load()
        np.testing.assert_array_equal(data.counts.toarray(), counts)
        assert data.gene_names.tolist() == more.var_names.tolist()
        np.testing.assert_array_equal(data.labels, adata.obs["cell_type"])
    picked = read_h5ad(path, layer="raw.X", populations=["b"], min_counts=0)
    np.testing.assert_array_equal(picked.counts.toarray(), counts[10:20])


def test_no_counts_put_aside(path):
    with pytest.raises(InputError, match=r"no layer 'raw\.X'"):
        read_h5ad(path, layer="raw.X")


def test_annotations_follow_the_cells_and_genes(adata, tmp_path):
    adata.var["chromosome"] = pd.Categorical(list("XYXYXYXY"))
    adata.write_h5ad(tmp_path / "all.h5ad")
    for backed in (False, True):
        data = read_h5ad(tmp_path / "all.h5ad", populations=["a", "b"], subsample=15, backed=backed)
        data = data.select_cells(np.array([1, 4, 9])).select_genes(np.array([2, 0]))
        given = data.annotations
        assert given is not None
        source = adata[data.cell_names, data.gene_names]
        for found, wanted in ((given.obs, source.obs), (given.var, source.var)):
            assert found.astype(str).equals(wanted.astype(str))
        assert given.X is None
        assert adata.obs_names[data.source.cells].tolist() == data.cell_names.tolist()
        assert adata.var_names[data.source.genes].tolist() == data.gene_names.tolist()


def test_what_cannot_be_read_and_is_not_asked_for_is_passed_over(path, caplog):
    with h5py.File(path, "r+") as file:
        file["obsm/X_pca"].attrs["encoding-type"] = "unheard-of"
        del file["layers/double/indptr"]
        file["obsm/short"] = np.ones((3, 2))
    assert read_h5ad(path, prior_key="weights").prior is not None
    for words in ("obsm['X_pca'] cannot be read, and is passed over (", "obsm['short'] cannot be read"):
        assert words in caplog.text
    for settings in ({"prior_key": "X_pca"}, {"prior_key": "short"}, {"layer": "double"}):
        with pytest.raises(InputError, match="cannot be read") as error:
            read_h5ad(path, **settings)
        one_line(error)


@pytest.mark.parametrize("backed", [False, True])
def test_row_pointers_that_end_at_zero(path, backed):
    """SciPy takes such a matrix for one without counts, checks no more, and writes where it must not."""
    with h5py.File(path, "r+") as file:
        file["X/indptr"][-1] = 0
    with pytest.raises(InputError, match="cannot be read") as error:
        read_h5ad(path, backed=backed)
    one_line(error)


def test_gene_symbols(adata, tmp_path):
    adata.var["name"] = pd.Categorical([f"S{j}" for j in range(6)] + ["", None])
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert read_h5ad(tmp_path / "a.h5ad").gene_symbols is None
    data = read_h5ad(tmp_path / "a.h5ad", gene_symbol_key="name").select_genes(np.array([0, 6, 7]))
    assert data.gene_labels.tolist() == ["S0", "gene6", "gene7"]
    assert data.gene_names.tolist() == ["gene0", "gene6", "gene7"]
    with pytest.raises(InputError, match=r"var has no column 'x'; set data\.gene_symbol_key to .* \(name\)"):
        read_h5ad(tmp_path / "a.h5ad", gene_symbol_key="x")
    adata.var = adata.var.rename(columns={"name": "symbol"})
    adata.write_h5ad(tmp_path / "b.h5ad")
    assert read_h5ad(tmp_path / "b.h5ad").gene_symbols is not None
    assert read_h5ad(tmp_path / "b.h5ad", gene_symbol_key=None).gene_labels[0] == "gene0"


@pytest.mark.parametrize("backed", [False, True])
def test_indices_without_sign(path, backed):
    """As BPCells, of Seurat 5, writes them."""
    expected = read_h5ad(path, backed=backed).load()
    with h5py.File(path, "r+") as file:
        for name, kind in (("indices", "u4"), ("indptr", "u8")):
            values = file[f"X/{name}"][()]
            del file[f"X/{name}"]
            file[f"X/{name}"] = values.astype(kind)
    data = read_h5ad(path, backed=backed).load()
    np.testing.assert_array_equal(data.counts.toarray(), expected.counts.toarray())


def test_a_file_that_is_open_for_writing(path):
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does
        with pytest.raises(InputError, match="open for writing in another program"):
            read_h5ad(path)


def test_a_path_in_the_home_folder(path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    assert read_h5ad(f"~/{path.name}").n_cells == read_h5ad(path).n_cells

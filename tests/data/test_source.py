"""The file that cells come from, and copies of it."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from nbmix.data.source import SourceFile


@pytest.fixture
def adata():
    """So many cells that they are copied in several stretches."""
    rng, n = np.random.default_rng(0), 9000
    x = sp.random(n, 4, 0.5, format="csr", random_state=0, dtype=np.float32)
    return ad.AnnData(
        x,
        obs=pd.DataFrame({"flag": rng.random(n) < 0.5}, index=[f"c{i}" for i in range(n)]),
        obsm={
            "table": pd.DataFrame({"a": rng.random(n), "b": "x"}, index=[f"c{i}" for i in range(n)]),
            "sparse": x.copy(),
            "three": rng.integers(9, size=(n, 2, 3)),
        },
        layers={"csc": x.tocsc(), "bools": rng.random((n, 4)) < 0.5},
        uns={"n_by_hand": n},
    )


def source(path, cells, n=9000):
    return SourceFile.of(path, cells, (n, 4), "var")


def test_some_cells(adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    cells = np.flatnonzero(np.random.default_rng(1).random(9000) < 0.3)
    picked = source(tmp_path / "a.h5ad", np.arange(9000)).select_cells(cells)
    picked.copy_to(tmp_path / "b.h5ad")
    found, wanted = ad.read_h5ad(tmp_path / "b.h5ad"), adata[cells]
    assert found.obs.equals(wanted.obs)
    assert found.X.dtype == np.float32 and (found.X != wanted.X).nnz == 0
    assert (found.layers["csc"] != wanted.layers["csc"]).nnz == 0
    assert (found.obsm["sparse"] != wanted.obsm["sparse"]).nnz == 0
    assert found.layers["bools"].dtype == bool and np.array_equal(
        found.layers["bools"], wanted.layers["bools"]
    )
    assert np.array_equal(found.obsm["three"], wanted.obsm["three"])
    assert found.obsm["table"].equals(wanted.obsm["table"])
    assert found.uns["n_by_hand"] == 9000


def test_what_has_no_counts(tmp_path):
    """X and raw may be missing, or there as nothing."""
    ad.AnnData(obs=pd.DataFrame(index=list("abc")), var=pd.DataFrame(index=list("wxyz"))).write_h5ad(
        tmp_path / "a.h5ad"
    )
    source(tmp_path / "a.h5ad", np.array([0, 2]), 3).copy_to(tmp_path / "b.h5ad")
    found = ad.read_h5ad(tmp_path / "b.h5ad")
    assert found.obs_names.tolist() == ["a", "c"] and found.X is None and found.raw is None


def test_all_cells_are_the_same_bytes(adata, tmp_path):
    adata[:50].write_h5ad(tmp_path / "a.h5ad")
    source(tmp_path / "a.h5ad", np.arange(50), 50).copy_to(tmp_path / "b.h5ad")
    assert (tmp_path / "a.h5ad").read_bytes() == (tmp_path / "b.h5ad").read_bytes()


def test_whether_it_has_changed(adata, tmp_path):
    path = tmp_path / "a.h5ad"
    adata[:50].write_h5ad(path)
    known = source(path, np.arange(50), 50).select_genes(np.array([2, 0]))
    assert known.is_unchanged and known.genes.tolist() == [2, 0]
    with h5py.File(path, "r+") as file:
        file["new"] = np.ones(1000)
    assert not known.is_unchanged
    path.unlink()
    assert not known.is_unchanged

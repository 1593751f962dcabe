"""New cells, by a fit that is kept in an AnnData, a run folder, a checkpoint or an estimator."""

from __future__ import annotations

import json
import logging

import anndata as ad
import numpy as np
import pytest

import nbmix
from nbmix import NBMixture, cluster, predict, regroup
from nbmix.errors import InputError
from tests.helpers.estimators import AMORTIZED, annotated
from tests.helpers.origins import BatchedCells
from tests.helpers.running import TINY, run_here

QUICK = {"start": "kmeans", "folds": 3}
NO_UMAP = {"max_umap_cells": 0}


@pytest.fixture(scope="module")
def cells():
    """360 cells of three kinds with names; gene g5 is silent in the first 200."""
    counts = nbmix.simulate(n=360, p=80, k=3, s=3e3, seed=1).counts.tolil()
    counts[:200, 5] = 0
    adata = ad.AnnData(counts.tocsr())
    adata.obs_names = [f"c{i}" for i in range(360)]
    adata.var_names = [f"g{j}" for j in range(80)]
    return adata


@pytest.fixture(scope="module")
def fitted(cells):
    """The first 200 of them with a fit, and that as an estimator."""
    adata = cells[:200].copy()
    cluster(adata, 3, **QUICK, **NO_UMAP)
    regroup(adata, 2)
    return adata, NBMixture(3, **QUICK).fit(cells[:200])


@pytest.fixture
def new(cells):
    return cells[200:].copy()


def test_it_is_what_the_estimator_says(fitted, new, tmp_path):
    """Also of a fit that was written, of some cells, and by a checkpoint."""
    adata, mixture = fitted
    adata.write_h5ad(tmp_path / "fit.h5ad")
    mixture.save(tmp_path / "fit.ckpt")
    again = ad.read_h5ad(tmp_path / "fit.h5ad")
    wanted, score = mixture.predict_proba(new), mixture.score_samples(new)
    for fit in (adata, again, again[[0, 7]].copy(), again[3:5], mixture, tmp_path / "fit.ckpt"):
        said = predict(new, fit, copy=True)
        assert np.array_equal(said.obsm["X_nbmix"], wanted)
        assert np.array_equal(said.obs["nbmix_log_likelihood"], score)
        assert np.array_equal(said.obs["nbmix_probability"], wanted.max(1))
        assert np.array_equal(said.obs["nbmix"].astype(int), mixture.predict(new))
        assert said.obs["nbmix"].cat.categories.tolist() == ["0", "1", "2"]
    assert "nbmix" not in new.obs
    loaded = NBMixture.load(again)
    assert np.array_equal(loaded.predict_proba(new), wanted)
    assert (loaded.n_iter_, loaded.converged_) == (mixture.n_iter_, mixture.converged_)
    assert (loaded.folds, loaded.start, loaded.random_state) == (3, "kmeans", 0)
    assert np.array_equal(loaded.cut(2, new), mixture.cut(2, new))


def test_groups_that_were_made_later_are_predicted_too(fitted, new):
    adata, _ = fitted
    groups = adata.uns["nbmix_groups"]
    predict(new, adata)
    assert (
        new.obs["nbmix_groups"].cat.categories.tolist() == adata.obs["nbmix_groups"].cat.categories.tolist()
    )
    of_label = {label: group.split("+") for label, group in groups.items()}
    own = {label: group.split("+") for label, group in adata.uns["nbmix"]["groups"].items()}
    for cell, label in new.obs["nbmix"].items():
        joined = new.obs.loc[cell, "nbmix_groups"]
        assert set(own[label]) <= set(of_label[joined])
    np.testing.assert_allclose(new.obsm["X_nbmix_groups"].sum(1), 1)
    predict(new, adata, key_added="old")
    assert {"old", "old_groups", "old_groups_probability"} <= set(new.obs)
    assert new.obs["old_groups"].tolist() == new.obs["nbmix_groups"].tolist()


def test_groups_of_another_fit_are_not_taken_for_ones_of_this(cells, fitted, new):
    adata = fitted[0].copy()
    cluster(adata, 3, **QUICK, **NO_UMAP, random_state=5, key_added="second")
    regroup(adata, 2, key="second")
    adata.obs["nbmix_groups"] = adata.obs["nbmix_groups"].cat.codes.astype(str)[::-1].to_numpy()
    predict(new, adata)
    assert "nbmix_groups" not in new.obs


def test_genes_are_matched_by_name(fitted, new, caplog):
    adata, mixture = fitted
    order = np.random.default_rng(0).permutation(80)
    wanted = mixture.predict_proba(new)
    other = new[:, order].copy()
    predict(other, adata)
    np.testing.assert_allclose(other.obsm["X_nbmix"], wanted, rtol=1e-6, atol=1e-12)
    fewer = new[:, :60].copy()
    with caplog.at_level(logging.WARNING):
        predict(fewer, adata)
    assert "of its 79 genes are missing in the data" in caplog.text


def test_counts_elsewhere(fitted, new):
    adata, mixture = fitted
    wanted = mixture.predict_proba(new)
    moved = new.copy()
    moved.layers["raw counts"], moved.X = moved.X, moved.X.log1p()
    with pytest.raises(InputError, match="fractional"):
        predict(moved, adata)
    predict(moved, adata, layer="raw counts")
    assert np.array_equal(moved.obsm["X_nbmix"], wanted)
    moved.obs["molecules"] = np.asarray(new.X.sum(1)).ravel()
    predict(moved, adata, layer="raw counts", size_factor_key="molecules")
    np.testing.assert_allclose(moved.obsm["X_nbmix"], wanted, rtol=1e-6, atol=1e-12)


def test_counts_in_raw(fitted, new):
    """As of a run with data.layer=raw.X, whose fit says so."""
    adata, mixture = fitted[0].copy(), fitted[1]
    kept = adata.uns["nbmix"]["fit"]
    kept["arguments"] = json.dumps(json.loads(kept["arguments"]) | {"layer": "raw.X"})
    with pytest.raises(InputError, match=r"^layer='raw\.X': .* say where their counts are: layer=None for X"):
        predict(new, adata)
    moved = new.copy()
    moved.raw = new.copy()
    moved.X = moved.X.log1p()
    moved = moved[:, :10].copy()
    predict(moved, adata)
    assert np.array_equal(moved.obsm["X_nbmix"], mixture.predict_proba(new))
    predict(new, adata, layer=None)
    assert np.array_equal(new.obsm["X_nbmix"], mixture.predict_proba(new))


def test_what_was_there_under_the_key_goes(fitted, new):
    cluster(new, 2, **QUICK, **NO_UMAP)
    predict(new, fitted[0])
    assert "nbmix_log_mean" not in new.varm and "markers" not in new.uns["nbmix"]
    assert new.uns["nbmix"]["groups"] == fitted[0].uns["nbmix"]["groups"]


def test_batches(caplog):
    """Of the fit by name, new ones, whose offsets are estimated, and none."""
    drawn = BatchedCells(n=240, p=40, spread=0.7)
    adata = ad.AnnData(drawn.counts)
    adata.obs_names = [f"c{i}" for i in range(240)]
    adata.var_names = [f"g{j}" for j in range(40)]
    adata.obs["donor"] = np.array(["first", "second"])[drawn.origins]
    old, new = adata[:200].copy(), adata[200:].copy()
    cluster(old, 2, **QUICK, **NO_UMAP, batch_key="donor", tol=1e-3)
    mixture = NBMixture(2, **QUICK, batch_key="donor", tol=1e-3).fit(adata[:200])
    predict(new, old)
    assert np.array_equal(new.obsm["X_nbmix"], mixture.predict_proba(new))
    new.obs["sample"] = "third"
    predict(new, old, batch_key="sample")
    new.obs["donor"] = "third"
    assert np.array_equal(new.obsm["X_nbmix"], mixture.predict_proba(new))
    with pytest.raises(InputError, match=r"^batch_key='lane': obs of the new cells has no such column"):
        predict(new, old, batch_key="lane")
    del new.obs["donor"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        predict(new, old)
    assert [record.getMessage() for record in caplog.records] == [
        "NBMixture: knows the batches first, second, and of these cells none is known (batch_key): they are "
        "taken for cells of the average batch"
    ]


def test_amortized_inference(tmp_path):
    adata = annotated()
    settings = AMORTIZED | {"start": "kmeans"}
    cluster(adata, **settings, **NO_UMAP)
    adata.write_h5ad(tmp_path / "a.h5ad")
    said = predict(annotated(), ad.read_h5ad(tmp_path / "a.h5ad"), copy=True)
    wanted = NBMixture(**settings).fit(annotated()).predict_proba(annotated())
    assert np.array_equal(said.obsm["X_nbmix"], wanted)


def test_by_a_run(tmp_path):
    run_here(tmp_path / "run", *TINY, "evaluation.pictures=[]", "trainer.max_epochs=4")
    result = ad.read_h5ad(tmp_path / "run" / "result.h5ad")
    new = ad.AnnData(result.X[:30], var=result.var[[]])
    by_file, by_folder = (predict(new, fit, copy=True) for fit in (result, tmp_path / "run"))
    assert np.array_equal(by_file.obsm["X_nbmix"], by_folder.obsm["X_nbmix"])
    assert by_file.obs["nbmix"].tolist() == result.obs["nbmix"].tolist()[:30]


def test_by_the_folder_of_a_run_that_knows_where_the_counts_were(tmp_path):
    adata = annotated()
    adata.layers["counts"], adata.X = adata.X, adata.X.log1p()
    adata.write_h5ad(tmp_path / "my.h5ad")
    of_file = f"data.path={tmp_path / 'my.h5ad'}", "data.layer=counts", "model.n_components=2"
    run_here(tmp_path / "run", "data=h5ad", *of_file, "evaluation.pictures=[]", "trainer.max_epochs=4")
    wanted = ad.read_h5ad(tmp_path / "run" / "result.h5ad").obs["nbmix"].tolist()
    said = predict(adata, tmp_path / "run", copy=True)
    assert np.mean([a == b for a, b in zip(said.obs["nbmix"], wanted, strict=True)]) > 0.9
    del adata.layers["counts"]
    with pytest.raises(InputError, match=r"no layer .counts.; set layer to one of its layers"):
        predict(adata, tmp_path / "run")
    (tmp_path / "run" / "result.h5ad").unlink()  # the checkpoint alone
    with pytest.raises(InputError, match="X holds fractional values"):
        predict(adata, tmp_path / "run")


@pytest.mark.parametrize(
    ("fit", "settings", "message"),
    [
        ("none.ckpt", {}, "path=none.ckpt: there is no such file"),
        (3, {}, "fit is a int; give an AnnData, a run folder, a checkpoint or an NBMixture"),
        ("a.h5ad", {}, "fit=a.h5ad: give what anndata.read_h5ad reads of it"),
        ("unfitted", {}, r"adata: uns\['nbmix'\] holds no fit for new cells; give what nbmix.cluster"),
        ("itself", {}, "new: is the AnnData of the fit, which key_added='nbmix' would replace"),
        ("folder", {}, "has no checkpoints/last.ckpt; give the folder of a run that fitted"),
    ],
)
def test_what_is_refused(fit, settings, message, fitted, new, tmp_path):
    fits = {"unfitted": new.copy(), "itself": new, "folder": tmp_path}
    with pytest.raises(InputError, match=message):
        predict(new, fits.get(fit, fit), **settings)


def test_wrong_arguments(fitted, new):
    with pytest.raises(TypeError, match=r"predict\(\) got .* 'batch'; did you mean batch_key\?"):
        predict(new, fitted[0], batch="donor")
    with pytest.raises(InputError, match=r"^new is a csr_matrix; give an AnnData, or use nbmix\.NBMixture"):
        predict(new.X, fitted[0])
    predict(new, fitted[0])
    broken = fitted[0].copy()
    broken.uns["nbmix"]["groups"] = {"0": "B cells"}
    with pytest.raises(InputError, match=r"its groups are made, as after nbmix\.recluster"):
        predict(new, broken)
    assert "X_nbmix" in new.obsm  # nothing was taken away before it failed

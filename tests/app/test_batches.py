"""Runs of the command with a column of batches."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from nbmix.errors import InputError
from tests.app.test_train import same_fit
from tests.helpers.apart import train
from tests.helpers.origins import BatchedCells
from tests.helpers.running import NO_PICTURES, run_here

MODELS = {  # with settings of small fits
    "em": ("model.tolerance=1e-12",),
    "amortized": ("model.n_hidden=8", "model.encoder_epochs=2", "model.lr=1e-2", "data.batch_size=40"),
    "gmvae": (
        *("model.n_hidden=8", "model.n_latent=3", "model.start_epochs=3", "model.kl_epochs=2"),
        *("model.lr=1e-2", "model.n_draws=2", "data.batch_size=40"),
    ),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    cells = BatchedCells(n=200, p=60, spread=0.7)
    adata = ad.AnnData(cells.counts)
    adata.obs_names = [f"cell{i}" for i in range(adata.n_obs)]
    adata.obs["cell_type"] = pd.Categorical(cells.kinds.astype(str))
    adata.obs["donor"] = pd.Categorical(np.array(["first", "second"])[cells.origins])
    file = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    adata.write_h5ad(file)
    return file


def settings(path, model="em", *more):
    fixed = ("data=h5ad", f"data.path={path}", "data.batch_key=donor", "model.n_components=2")
    return (*fixed, "start=kmeans", f"model={model}", *MODELS[model], NO_PICTURES, *more)


@pytest.fixture(scope="module", params=MODELS)
def whole(path, tmp_path_factory, request):
    """(model, folder) of a run."""
    folder = tmp_path_factory.mktemp(request.param)
    run_here(folder, *settings(path, request.param, "trainer.max_epochs=4"))
    return request.param, folder


def test_a_run_writes_groups_by_batches(whole):
    _, folder = whole
    table = pd.read_csv(folder / "batches.csv", index_col="group")
    assert table.columns.tolist() == ["first", "second"] and table.to_numpy().sum() == 200
    result = ad.read_h5ad(folder / "result.h5ad")
    assert result.uns["nbmix"]["batches"].tolist() == ["first", "second"]
    offsets = result.varm["nbmix_batch_offsets"]
    assert offsets.shape == (result.n_vars, 2) and np.isfinite(offsets).all() and offsets.std() > 0.1
    assert '"batch_key": "donor"' in result.uns["nbmix"]["provenance"]


def test_a_fit_that_goes_on_ends_where_the_whole_one_does(path, whole, tmp_path):
    model, folder = whole
    run_here(tmp_path, *settings(path, model, "trainer.max_epochs=3"))
    last = f"ckpt_path={tmp_path}/checkpoints/last.ckpt"
    run_here(tmp_path, *settings(path, model, "trainer.max_epochs=4", last))
    same_fit(folder, tmp_path)


def test_counts_on_disk_give_the_same_fit(path, tmp_path):
    more = ("trainer.max_epochs=3", "start=labels", "model.dtype=float64")
    run_here(tmp_path / "memory", *settings(path, "em", *more))
    run_here(tmp_path / "disk", *settings(path, "em", *more, "data.backed=true"))
    one, two = (ad.read_h5ad(tmp_path / name / "result.h5ad") for name in ("memory", "disk"))
    np.testing.assert_allclose(one.obsm["X_nbmix"], two.obsm["X_nbmix"], atol=1e-6)


@pytest.mark.slow
def test_two_processes_say_what_one_says(path, whole, tmp_path):
    model, folder = whole
    if model == "gmvae":
        pytest.skip("its batches are those of amortized inference, and processes take long to begin")
    more = ("trainer.max_epochs=4", "trainer.processes=2", f"hydra.run.dir={tmp_path}")
    if model == "amortized":
        more = (*more, "data.batch_size=20")  # of each
    done = train(*settings(path, model, *more))
    assert done.returncode == 0, done.stderr
    same_fit(folder, tmp_path)


def test_a_prediction_knows_the_batches_of_the_fit(path, whole, tmp_path):
    model, folder = whole
    more = ("task=predict", f"ckpt_path={folder}/checkpoints/last.ckpt")
    metrics = run_here(tmp_path, *settings(path, model, *more))
    assert metrics["ari"] > 0.95
    assert (tmp_path / "batches.csv").is_file()


BAD = {
    "none": (None, "obs has no column 'donor'"),
    "one": (lambda n: ["x"] * n, "all 200 cells are of one batch, 'x'; set it to null"),
    "missing": (lambda n: [None, *["x", "y"] * (n // 2)][:n], "misses the batch of 1 of 200 cells"),
    "single": (lambda n: ["alone", *["x", "y"] * (n // 2)][:n], "have a single cell .such as 'alone'"),
    "many": (lambda n: [f"x{i}" for i in range(n)], "makes 200 batches of 200 cells"),
    "measured": (lambda n: np.linspace(0, 1, n), "holds measured numbers"),
}


@pytest.mark.parametrize("model", ["amortized", "vaec", "gmvae"])
@pytest.mark.parametrize("bad", BAD)
def test_batches_that_are_none_are_refused_whatever_the_model(path, tmp_path, model, bad):
    make, message = BAD[bad]
    adata = ad.read_h5ad(path)
    del adata.obs["donor"]
    if make is not None:
        adata.obs["donor"] = make(adata.n_obs)
    adata.write_h5ad(tmp_path / "bad.h5ad")
    fixed = settings(tmp_path / "bad.h5ad")[:5]
    with pytest.raises(InputError, match=message):
        run_here(tmp_path, *fixed, f"model={model}", NO_PICTURES)

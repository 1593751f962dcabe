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


def settings(path, *more):
    fixed = ("data=h5ad", f"data.path={path}", "data.batch_key=donor", "model.n_components=2")
    return (*fixed, "start=kmeans", "model.tolerance=1e-12", NO_PICTURES, *more)


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_here(folder, *settings(path, "trainer.max_epochs=4"))
    return folder


def test_a_run_writes_groups_by_batches(whole):
    table = pd.read_csv(whole / "batches.csv", index_col="group")
    assert table.columns.tolist() == ["first", "second"] and table.to_numpy().sum() == 200
    result = ad.read_h5ad(whole / "result.h5ad")
    assert result.uns["nbmix"]["batches"].tolist() == ["first", "second"]
    assert result.varm["nbmix_batch_offsets"].shape == (result.n_vars, 2)
    assert '"batch_key": "donor"' in result.uns["nbmix"]["provenance"]


def test_a_fit_that_goes_on_ends_where_the_whole_one_does(path, whole, tmp_path):
    run_here(tmp_path, *settings(path, "trainer.max_epochs=2"))
    run_here(tmp_path, *settings(path, "trainer.max_epochs=4", f"ckpt_path={tmp_path}/checkpoints/last.ckpt"))
    same_fit(whole, tmp_path)


def test_counts_on_disk_give_the_same_fit(path, tmp_path):
    more = ("trainer.max_epochs=3", "start=labels", "model.dtype=float64")
    run_here(tmp_path / "memory", *settings(path, *more))
    run_here(tmp_path / "disk", *settings(path, *more, "data.backed=true"))
    one, two = (ad.read_h5ad(tmp_path / name / "result.h5ad") for name in ("memory", "disk"))
    np.testing.assert_allclose(one.obsm["X_nbmix"], two.obsm["X_nbmix"], atol=1e-6)


@pytest.mark.slow
def test_two_processes_say_what_one_says(path, whole, tmp_path):
    done = train(*settings(path, "trainer.max_epochs=4", "trainer.processes=2", f"hydra.run.dir={tmp_path}"))
    assert done.returncode == 0, done.stderr
    same_fit(whole, tmp_path)


def test_a_prediction_knows_the_batches_of_the_fit(path, whole, tmp_path):
    more = ("task=predict", f"ckpt_path={whole}/checkpoints/last.ckpt")
    metrics = run_here(tmp_path, *settings(path, *more))
    assert metrics["ari"] > 0.95
    assert (tmp_path / "batches.csv").is_file()


@pytest.mark.parametrize("model", ["amortized", "vaec", "gmvae"])
def test_models_without_offsets_refuse_batches(path, tmp_path, model):
    with pytest.raises(InputError, match=f"model={model} has no offsets of batches; choose model=em"):
        run_here(tmp_path, *settings(path)[:4], f"model={model}", NO_PICTURES)

"""Scores, result.h5ad and figures from a fit."""

from __future__ import annotations

import json
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from nbmix.evaluation.results import (
    Results,
    gather_predictions,
    score,
    write_figures,
    write_json,
    write_result,
)
from nbmix.models import MixtureEM, Prediction
from tests.running import fit, small_data


def results_of(data, **settings):
    model = MixtureEM(data.gene_names, **({"n_components": 2, "folds": 3} | settings))
    module, cells = fit(model, data, epochs=2)
    return Results(module, model, cells, {"config": {"seed": 0}})


@pytest.fixture(scope="module")
def results():
    return results_of(small_data())


@pytest.fixture(scope="module")
def unlabelled():
    data = small_data()
    counts = data.counts.toarray()
    counts[4] = 0
    size_factors = data.size_factors.copy()
    size_factors[4] = 0
    return results_of(replace(data, labels=None, counts=type(data.counts)(counts), size_factors=size_factors))


def prediction(rows):
    column = torch.tensor(rows, dtype=torch.float64)
    return Prediction(torch.tensor(rows), torch.stack([column, -column], 1), column, column, column)


def test_predictions_are_put_back_in_order():
    cells = gather_predictions([prediction([3, 1]), prediction([0, 4, 2])], 5)
    assert cells.rows.tolist() == [0, 1, 2, 3, 4]
    assert cells.log_likelihood.tolist() == [0, 1, 2, 3, 4]
    assert cells.responsibilities[:, 1].tolist() == [0, -1, -2, -3, -4]


@pytest.mark.parametrize("rows", [[[0, 1], [1, 2]], [[0, 2]]])
def test_every_cell_must_be_there_once(rows):
    with pytest.raises(RuntimeError, match="every cell once"):
        gather_predictions([prediction(r) for r in rows], 3)


def test_scores(results):
    metrics = score(results)
    cells, module = results.cells, results.data
    assert metrics["n_cells"] == 60
    assert metrics["n_genes"] == small_data().n_genes
    assert metrics["n_components"] == metrics["n_components_used"] == 2
    assert metrics["n_empty_cells"] == 0
    assert metrics["log_likelihood"] == float(cells.log_likelihood.mean())
    held_out = float(cells.log_likelihood[module.validation_rows].mean())
    assert metrics["heldout_log_likelihood"] == pytest.approx(held_out, rel=1e-12)
    unseen = float(cells.unseen_log_likelihood[module.training_rows].mean())
    assert metrics["crossfit_log_likelihood"] == pytest.approx(unseen, rel=1e-12)
    assert metrics["ari"] == metrics["accuracy"] == 1
    assert "elbo" not in metrics
    json.dumps(metrics, allow_nan=False)


def test_scores_without_labels_and_with_an_empty_cell(unlabelled):
    metrics = score(unlabelled)
    assert not {"ari", "accuracy", "log_loss"} & set(metrics)
    assert metrics["n_empty_cells"] == 1
    prior = unlabelled.model.mixture.log_weights.data.exp()
    fold = {int(r): b.fold for b in unlabelled.data.predict_dataloader() for r in b.rows}[4]
    own = prior[unlabelled.model.mixture.copy_for(fold)]
    np.testing.assert_allclose(unlabelled.responsibilities[4], own.numpy(), rtol=1e-12)


def test_cross_fitted_likelihood_stands_in_where_nothing_is_held_out():
    data = small_data()
    model = MixtureEM(data.gene_names, n_components=2, folds=3)
    module, cells = fit(model, data, epochs=2, validation_share=0.0)
    metrics = score(Results(module, model, cells, {}))
    assert metrics["heldout_log_likelihood"] == metrics["crossfit_log_likelihood"]


def test_result_file(results, tmp_path):
    write_result(results, tmp_path / "result.h5ad")
    data = small_data()
    adata = ad.read_h5ad(tmp_path / "result.h5ad")
    assert [p.name for p in tmp_path.iterdir()] == ["result.h5ad"]
    assert (data.counts != adata.X).nnz == 0
    assert adata.obs_names.tolist() == data.cell_names.tolist()
    assert adata.var_names.tolist() == data.gene_names.tolist()
    assert np.array_equal(adata.obsm["X_nbmix"], results.responsibilities)
    assert np.array_equal(adata.obs["nbmix"].astype(int), results.responsibilities.argmax(1))
    assert adata.obs["nbmix"].cat.categories.tolist() == ["0", "1"]
    assert np.array_equal(np.flatnonzero(adata.obs["nbmix_held_out"]), results.data.validation_rows)
    assert adata.obs["cell_type"].tolist() == data.labels.tolist()
    components = results.model.mixture.components()
    assert np.array_equal(adata.varm["nbmix_log_mean"].T, components.log_mean.numpy())
    assert np.array_equal(adata.varm["nbmix_log_inv_disp"].T, components.log_inv_disp.numpy())
    assert json.loads(adata.uns["nbmix"]["provenance"]) == {"config": {"seed": 0}}
    assert adata.uns["nbmix"]["objective"].tolist() == results.model.objective


def test_result_file_without_labels(unlabelled, tmp_path):
    write_result(unlabelled, tmp_path / "result.h5ad")
    assert "cell_type" not in ad.read_h5ad(tmp_path / "result.h5ad").obs


def test_figures(results, unlabelled, tmp_path):
    shared = {"objective_trace", "posterior_histogram", "log_mean_differences", "posterior_embedding"}
    for name, of, own in (
        ("with", results, "component_label_table"),
        ("without", unlabelled, "component_sizes"),
    ):
        write_figures(of, tmp_path / name, [], max_umap_cells=0)
        assert {file.stem for file in (tmp_path / name).iterdir()} == shared | {own}
        for file in (tmp_path / name).iterdir():
            picture = imread(file)
            assert min(picture.shape[:2]) > 200
            assert picture[..., :3].std() > 0.01, file.stem  # something is drawn


def test_json_is_whole_or_not_there(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "a.json", {"b": object()})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"b": 1}

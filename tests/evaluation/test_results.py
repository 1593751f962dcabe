"""Scores, result.h5ad, markers, figures and the report from a fit."""

from __future__ import annotations

import json
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.image import imread

from nbmix.components import GenePrior
from nbmix.data.read import read_h5ad
from nbmix.evaluation.markers import find_markers
from nbmix.evaluation.results import (
    CAPTIONS,
    Results,
    gather_predictions,
    score,
    write_figures,
    write_json,
    write_outcome,
    write_result,
)
from nbmix.models import AmortizedMixture, MixtureEM, Prediction
from nbmix.products import CellBatch
from nbmix.start.random import RandomStart
from nbmix.statistics import SufficientStatistics
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


FIGURES = {
    "objective_trace",
    "posterior_histogram",
    "component_sizes",
    "log_mean_differences",
    "log_likelihood_margins",
    "marker_gene",
    "poisson_comparison",
    "posterior_embedding",
}


def test_figures(results, unlabelled, tmp_path):
    of_labels = {"component_label_table", "component_label_correlation"}
    for name, of, own in (("with", results, of_labels), ("without", unlabelled, set())):
        files = write_figures(of, tmp_path / name, [], max_umap_cells=0)
        assert set(files) == {file.stem for file in (tmp_path / name).iterdir()} == FIGURES | own
        assert set(files) <= set(CAPTIONS)
        for figure, file in files.items():
            picture = imread(file)
            assert file.stem == figure
            assert min(picture.shape[:2]) > 200
            assert picture[..., :3].std() > 0.01, file.stem  # something is drawn


def test_the_whole_outcome(results, tmp_path):
    metrics = score(results) | {"seconds": 1.5}
    write_outcome(results, metrics, tmp_path, [], max_umap_cells=0, k_curve={2: -10.0, 3: -9.0})
    assert {p.name for p in tmp_path.iterdir()} == {
        *("metrics.json", "result.h5ad", "markers.csv", "figures", "report.html")
    }
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    table = pd.read_csv(tmp_path / "markers.csv", dtype={"gene": str})
    data, markers = small_data(), results.markers
    assert len(table) == 2 * data.n_genes
    for k in (0, 1):
        rows = table[table["component"] == k].set_index("gene").loc[data.gene_names]
        np.testing.assert_allclose(rows["ln_fc_rest"], markers.from_rest.log_fold_change[k], rtol=1e-4)
        np.testing.assert_allclose(rows["share"], markers.share[k], rtol=1e-4)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(FIGURES) + 3
    for words in (CAPTIONS["k_curve"][1], "config.seed", table["gene"][0], str(data.labels[0])):
        assert words in page


def test_outcome_without_labels_and_with_one_component(unlabelled, tmp_path):
    write_outcome(unlabelled, score(unlabelled), tmp_path / "a", [], max_umap_cells=0)
    alone = results_of(small_data(), n_components=1, folds=1)
    write_outcome(alone, score(alone), tmp_path / "b", [], max_umap_cells=0)
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert "nbmix report" in (folder / "report.html").read_text(encoding="utf-8")
    assert pd.read_csv(tmp_path / "b" / "markers.csv")["ln_fc_rest"].isna().all()


def statistics_of(data, basis, q):
    batch = CellBatch.build(data.counts, data.size_factors, basis)
    return SufficientStatistics.collect(batch, basis, q, torch.float64)


def assert_same(statistics, wanted):
    for mine, theirs in zip(statistics.tensors(), wanted.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_statistics_are_of_all_cells_by_their_responsibilities(results):
    assert_same(
        results.statistics,
        statistics_of(small_data(), results.data.basis, results.cells.responsibilities),
    )


def test_statistics_of_minibatches_and_of_counts_on_disk(tmp_path):
    data = small_data()
    model = AmortizedMixture(data.gene_names, n_components=2, encoder_epochs=1)
    module, cells = fit(model, data, epochs=2, batch_size=16)
    amortized = Results(module, model, cells, {})
    assert_same(amortized.statistics, statistics_of(data, module.basis, cells.responsibilities))

    ad.AnnData(
        data.counts, pd.DataFrame(index=data.cell_names), pd.DataFrame(index=data.gene_names)
    ).write_h5ad(tmp_path / "counts.h5ad")
    backed = read_h5ad(tmp_path / "counts.h5ad", backed=True)
    on_disk = MixtureEM(backed.gene_names, n_components=2, folds=3)
    module, cells = fit(on_disk, backed, epochs=2, start=RandomStart(n_starts=1))
    of_disk = Results(module, on_disk, cells, {})
    assert_same(of_disk.statistics, statistics_of(backed.load(), module.basis, cells.responsibilities))
    write_figures(of_disk, tmp_path / "figures", [], max_umap_cells=0)
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == FIGURES


def test_markers_take_over_the_prior_of_the_fit(results):
    mixture = results.model.mixture
    level, variance = mixture.prior_log_inv_disp[-1]
    prior = GenePrior(mixture.prior_log_mean[-1], mixture.prior_log_mean_variance[-1], level, variance)
    wanted = find_markers(results.statistics, results.data.basis, results.total_size, prior=prior)
    torch.testing.assert_close(results.markers.log_mean, wanted.log_mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(results.markers.standard_error, wanted.standard_error, rtol=1e-3, atol=1e-3)
    largest = prior.log_mean_variance * 3  # 1 + 2 / (K - 1) times tau^2
    assert (wanted.standard_error**2 <= largest).all()


def test_json_is_whole_or_not_there(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "a.json", {"b": object()})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"b": 1}

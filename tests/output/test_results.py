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
from scipy.stats import entropy

from nbmix.core.batch import CellBatch
from nbmix.core.statistics import SufficientStatistics
from nbmix.data.read import read_h5ad
from nbmix.evaluation.calibration import tempered
from nbmix.evaluation.markers import find_markers
from nbmix.models.amortized import AmortizedMixture
from nbmix.models.mixture_em import MixtureEM
from nbmix.output.results import (
    CAPTIONS,
    Results,
    score,
    write_figures,
    write_json,
    write_outcome,
    write_result,
)
from nbmix.starts.base import StartState
from nbmix.starts.choice import Choice
from nbmix.starts.random import DirichletStart
from tests.helpers.running import fit, small_data


def results_of(data, start=None, **settings):
    model = MixtureEM(data.gene_names, **({"n_components": 2, "folds": 3} | settings))
    module, cells = fit(model, data, epochs=2, start=start)
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


def test_scores_of_calibration(results, unlabelled):
    metrics, q = score(results), results.responsibilities
    assert 0 < metrics["temperature"] <= 1
    assert metrics["entropy"] == pytest.approx(entropy(q, axis=1).mean(), abs=1e-12)
    log_prior = results.model.mixture.log_weights.data[-1].numpy()
    mild = tempered(q, log_prior, metrics["temperature"])
    np.testing.assert_array_equal(results.probabilities, mild[np.arange(60), q.argmax(1)])
    # all assignments are right
    assert metrics["ece"] == pytest.approx(1 - q.max(1).mean(), abs=1e-9)
    assert metrics["ece_tempered"] == pytest.approx(1 - results.probabilities.mean(), abs=1e-9)
    assert metrics["log_loss_tempered"] == pytest.approx(-np.log(results.probabilities).mean(), abs=1e-9)
    assert not {"ece", "ece_tempered", "log_loss_tempered"} & set(score(unlabelled))
    assert score(unlabelled)["temperature"] == unlabelled.temperature


def test_no_temperature_from_cells_that_were_seen():
    data = small_data()
    model = MixtureEM(data.gene_names, n_components=2, folds=1)
    seen = Results(*placed(fit(model, data, epochs=1, validation_share=0.0), model), {})
    assert seen.temperature is None
    assert "temperature" not in score(seen)
    assert np.array_equal(seen.probabilities, seen.responsibilities.max(1))
    model = MixtureEM(data.gene_names, n_components=2, folds=1)
    held_out = Results(*placed(fit(model, data, epochs=1, validation_share=0.5), model), {})
    assert 0 < held_out.temperature <= 1
    encoder = AmortizedMixture(data.gene_names, n_components=2, encoder_epochs=1)
    assert Results(*placed(fit(encoder, data, epochs=1), encoder), {}).temperature is None


def placed(fitted, model):
    module, cells = fitted
    return module, model, cells


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


def annotated_file(path):
    """Counts as an analyst keeps them, with names that nbmix would give among them."""
    data = small_data()
    n_cells, n_genes = data.counts.shape
    adata = ad.AnnData(
        data.counts,
        obs=pd.DataFrame(
            {
                "cell_type": pd.Categorical(data.labels, ["component1", "component0"]),
                "donor": pd.array(["x", None] * (n_cells // 2), dtype="string"),
                "nbmix": "stale",
                "nbmix_old": 1.0,
            },
            index=data.cell_names,
        ),
        var=pd.DataFrame({"symbol": [f"S{j}" for j in range(n_genes)]}, index=data.gene_names),
        obsm={"X_pca": np.arange(2.0 * n_cells).reshape(-1, 2), "X_nbmix": np.ones((n_cells, 1))},
        varm={"PCs": np.arange(n_genes)[:, None]},
        layers={"log": data.counts.log1p()},
        uns={"cell_type_colors": np.array(["#000000", "#ffffff"]), "log1p": {"base": 2.0}},
    )
    with ad.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(path)
    return adata


@pytest.mark.parametrize("backed", [False, True])
def test_result_file_passes_on_what_the_input_holds(tmp_path, backed):
    given = annotated_file(tmp_path / "input.h5ad")
    data = read_h5ad(tmp_path / "input.h5ad", backed=backed)
    made = results_of(data, start=DirichletStart())
    write_result(made, tmp_path / "result.h5ad")
    result = ad.read_h5ad(tmp_path / "result.h5ad")
    assert result.obs["donor"].astype(object).where(result.obs["donor"].notna(), None).tolist() == [
        *(["x", None] * (data.n_cells // 2))
    ]
    assert result.obs["cell_type"].cat.categories.tolist() == ["component1", "component0"]
    assert result.obs["cell_type"].tolist() == given.obs["cell_type"].tolist()
    assert "nbmix_old" not in result.obs
    assert np.array_equal(result.obs["nbmix"].astype(int), made.assignments)
    assert np.array_equal(result.obsm["X_nbmix"], made.responsibilities)
    assert np.array_equal(result.obsm["X_pca"], given.obsm["X_pca"])
    assert result.var["symbol"].tolist() == given.var.loc[result.var_names, "symbol"].tolist()
    assert np.array_equal(result.varm["PCs"], given[:, result.var_names].varm["PCs"])
    assert sorted(result.uns) == ["cell_type_colors", "nbmix"]
    assert not result.layers
    assert (result.X is None) == backed


def test_a_fit_is_not_lost_to_what_cannot_be_written(results, tmp_path, caplog):
    data = results.data.data
    obs = pd.DataFrame({"strange": [object()] * data.n_cells}, index=data.cell_names)
    annotations = ad.AnnData(obs=obs, var=pd.DataFrame(index=data.gene_names))
    made = results_of(replace(data, annotations=annotations))
    write_result(made, tmp_path / "result.h5ad")
    assert "goes without what else the input holds, which cannot be written" in caplog.text
    result = ad.read_h5ad(tmp_path / "result.h5ad")
    assert "strange" not in result.obs
    assert np.array_equal(result.obsm["X_nbmix"], made.responsibilities)
    assert result.obs["cell_type"].tolist() == data.labels.tolist()


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
    of_labels = {"component_label_table", "component_label_correlation", "reliability"}
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
    curve = np.array([-12.0, -10.0, -9.5])
    choice = Choice(np.array([1, 2, 3]), curve, np.array([0.0, 0.1, 0.1]), 2, StartState())
    write_outcome(results, metrics, tmp_path, [], max_umap_cells=0, choice=choice)
    assert {p.name for p in tmp_path.iterdir()} == {
        *("metrics.json", "n_components.csv", "result.h5ad", "markers.csv", "figures", "report.html")
    }
    tried = pd.read_csv(tmp_path / "n_components.csv")
    assert tried["gain"].tolist()[1:] == [2.0, 0.5]
    assert tried["recommended"].tolist() == [False, True, False]
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    table = pd.read_csv(tmp_path / "markers.csv", dtype={"gene": str})
    data, markers = small_data(), results.markers
    assert len(table) == 2 * data.n_genes
    for k in (0, 1):
        rows = table[table["component"] == k].set_index("gene").loc[data.gene_names]
        np.testing.assert_allclose(rows["ln_fc_rest"], markers.from_rest.log_fold_change[k], rtol=1e-4)
        np.testing.assert_allclose(rows["share"], markers.share[k], rtol=1e-4)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(FIGURES) + 4
    for words in (CAPTIONS["n_components"][0], "config.seed", table["gene"][0], str(data.labels[0])):
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
    module, cells = fit(on_disk, backed, epochs=2, start=DirichletStart())
    of_disk = Results(module, on_disk, cells, {})
    assert_same(of_disk.statistics, statistics_of(backed.load(), module.basis, cells.responsibilities))
    write_figures(of_disk, tmp_path / "figures", [], max_umap_cells=0)
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == FIGURES


def test_markers_take_over_the_prior_of_the_fit(results):
    mixture = results.model.mixture
    prior, begin = mixture.prior(), mixture.components()
    known = results.statistics, results.data.basis, results.total_size
    wanted, own = (find_markers(*known, begin, given) for given in (prior, None))
    assert not torch.allclose(wanted.standard_error, own.standard_error, rtol=1e-2)
    torch.testing.assert_close(results.markers.log_mean, wanted.log_mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(results.markers.standard_error, wanted.standard_error, rtol=1e-3, atol=1e-3)
    largest = prior.log_mean_variance * 3  # 1 + 2 / (K - 1) times tau^2
    assert (wanted.standard_error**2 <= largest).all()


def test_json_is_whole_or_not_there(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "a.json", {"b": object()})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"b": 1}

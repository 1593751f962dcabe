"""The numbers of metrics.json."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import entropy

from nbmix.evaluation.calibration import tempered
from nbmix.output.scores import score
from tests.helpers.results import results_of
from tests.helpers.running import small_data


def test_scores(results):
    metrics = score(results)
    cells, module = results.cells, results.data
    assert metrics["n_cells"] == 60
    assert metrics["n_genes"] == small_data().n_genes
    assert metrics["n_components"] == metrics["n_components_used"] == 2
    assert metrics["n_components_fitted"] == metrics["n_groups_with_gaps"] == 2
    assert metrics["n_pairs_without_gap"] == 0
    assert metrics["least_separation"] == results.separations["separation"].min() > 3.5
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
    assert 0 < metrics["inverse_temperature"] <= 1
    assert metrics["entropy"] == pytest.approx(entropy(q, axis=1).mean(), abs=1e-12)
    log_prior = results.model.mixture.log_weights.data[-1].numpy()
    mild = tempered(q, log_prior, metrics["inverse_temperature"])
    np.testing.assert_array_equal(results.probabilities, mild[np.arange(60), q.argmax(1)])
    # all assignments are right
    assert metrics["ece"] == pytest.approx(1 - q.max(1).mean(), abs=1e-9)
    assert metrics["ece_tempered"] == pytest.approx(1 - results.probabilities.mean(), abs=1e-9)
    assert metrics["log_loss_tempered"] == pytest.approx(-np.log(results.probabilities).mean(), abs=1e-9)
    assert not {"ece", "ece_tempered", "log_loss_tempered"} & set(score(unlabelled))
    assert score(unlabelled)["inverse_temperature"] == unlabelled.inverse_temperature


def test_cross_fitted_likelihood_stands_in_where_nothing_is_held_out():
    metrics = score(results_of(small_data(), validation_share=0.0))
    assert metrics["heldout_log_likelihood"] == metrics["crossfit_log_likelihood"]


def test_more_scores_follow_the_others(results):
    metrics = score(results, [lambda r: {"largest": int(r.assignments.max())}])
    assert list(metrics) == [*score(results), "largest"]
    assert metrics["largest"] == 1


@pytest.mark.leaves_out
def test_a_score_that_fails_is_left_out(results, caplog):
    def donors(results):
        return {"n_donors": len(results.donors)}

    def of_numpy(results):
        return {"largest": results.assignments.max()}

    metrics = score(results, [donors, of_numpy, lambda r: {"last": 1}])
    assert list(metrics) == [*score(results), "last"]
    assert [record.getMessage() for record in caplog.records] == [
        "score donors is left out: AttributeError: 'Results' object has no attribute 'donors'",
        "score of_numpy is left out: TypeError: Object of type int64 is not JSON serializable",
    ]


def test_no_score_of_tempering_from_cells_that_were_seen():
    metrics = score(results_of(small_data(), epochs=1, folds=1, validation_share=0.0))
    assert not {"inverse_temperature", "ece_tempered", "log_loss_tempered"} & metrics.keys()
    assert "ece" in metrics

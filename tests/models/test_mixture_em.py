"""EM through Lightning is EM."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from nbmix.core.em_loop import StoppingRule, run_em
from nbmix.core.mixture import Mixture
from nbmix.errors import InputError
from nbmix.models.mixture_em import MixtureEM
from nbmix.starts.clusters import KMeansStart
from nbmix.starts.random import RandomStart
from tests.helpers.running import fit, small_data

SCHEMES = pytest.mark.parametrize("folds, pseudo_cells", [(1, 0.0), (1, 5.0), (5, "auto")])


def model_for(data, **settings):
    return MixtureEM(data.gene_names, **({"n_components": 2} | settings))


@SCHEMES
def test_equals_the_loop_over_batches(folds, pseudo_cells):
    data = small_data()
    model = model_for(data, folds=folds, pseudo_cells=pseudo_cells, dtype="float64")
    module, predictions = fit(model, data, epochs=4, batch_size=13)
    mixture = Mixture(data.n_genes, model.mixture.settings)
    mixture.attach(module.basis, float(data.size_factors[module.training_rows].sum()))
    start = KMeansStart()(module.training_data, model.mixture.settings, np.random.default_rng(0))
    q = torch.zeros(data.n_cells, 2, dtype=torch.float64)
    q[module.training_rows] = start.responsibilities
    batches = list(module.train_dataloader())
    loop = run_em(mixture, batches, responsibilities=q, max_iterations=4, stopping=StoppingRule(patience=3))
    assert model.objective == loop.objective
    # the loop fits the copy of all cells at its end alone
    steps = slice(None) if folds == 1 else slice(-1)
    for mine, theirs in zip(model.mixture.parameters(), mixture.parameters(), strict=True):
        assert torch.equal(mine[steps], theirs[steps])
    for batch in batches:
        assert torch.equal(
            predictions.responsibilities[batch.rows], mixture.posterior(batch).responsibilities
        )


@SCHEMES
def test_objective_never_falls_without_folds_and_labels_play_no_part(folds, pseudo_cells):
    data = small_data()
    fits = []
    for labels in (data.labels, data.labels[::-1], None):
        model = model_for(data, folds=folds, pseudo_cells=pseudo_cells)
        fits.append((model, fit(model, replace(data, labels=labels), epochs=4)[1]))
    (first, cells), *others = fits
    for model, other in others:
        assert model.objective == first.objective
        assert torch.equal(model.mixture.log_mean, first.mixture.log_mean)
        assert torch.equal(other.responsibilities, cells.responsibilities)
    if folds == 1:
        assert (np.diff(first.objective) >= -1e-9 * abs(first.objective[0])).all()


def test_converges_and_says_so():
    data = small_data()
    model = model_for(data)
    fit(model, data, epochs=40)
    assert model.converged is True
    assert model.n_iterations < 40
    assert len(model.objective) == model.n_iterations - 1  # the start's responsibilities have no objective


def test_says_when_it_has_not_converged():
    data = small_data()
    model = model_for(data)
    fit(model, data, epochs=2)
    assert (model.converged, model.n_iterations) == (False, 2)


def test_training_cells_have_a_likelihood_that_has_not_seen_them():
    data = small_data()
    module, cells = fit(model_for(data), data, epochs=2)
    assert torch.isnan(cells.unseen_log_likelihood[module.validation_rows]).all()
    assert not torch.isnan(cells.unseen_log_likelihood[module.training_rows]).any()
    assert torch.isnan(cells.elbo).all()
    mean = cells.log_likelihood[module.training_rows].mean()
    assert cells.unseen_log_likelihood[module.training_rows].mean() < mean


def test_one_component():
    data = small_data()
    _, cells = fit(model_for(data, n_components=1), data, epochs=3)
    assert torch.equal(cells.responsibilities, torch.ones(60, 1, dtype=torch.float64))


def test_spare_components_stay_finite():
    data = small_data(n_cells=30)
    model = model_for(data, n_components=12)
    _, cells = fit(model, data, epochs=4)
    assert torch.isfinite(model.mixture.log_mean).all()
    assert torch.isfinite(cells.log_likelihood).all()


@pytest.mark.parametrize("folds", [1, 5])
def test_components_that_may_have_seen_the_cells_give_no_held_out_objective(folds):
    data = small_data(n_cells=90)
    start = RandomStart(n_starts=2, max_cells=40)
    model = model_for(data, folds=folds)
    fit(model, data, epochs=4, start=start)
    # of 4 iterations; without folds the first E step has the objective of the given components
    assert len(model.objective) == (4 if folds == 1 else 2)


def test_given_weights():
    data = replace(small_data(), prior=np.tile([1.0, 0.0], (60, 1)))
    _, cells = fit(model_for(data, weights="given"), data, epochs=2)
    assert torch.equal(cells.responsibilities[:, 0], torch.ones(60, dtype=torch.float64))


def test_given_weights_that_are_not_there():
    data = small_data()
    with pytest.raises(InputError, match=r"set data\.prior_key"):
        fit(model_for(data, weights="given"), data, epochs=2)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"n_components": 0}, r"model\.n_components=0"),
        ({"folds": 0}, r"model\.folds=0"),
        ({"weights": "some"}, r"model\.weights=some"),
        ({"dtype": "int8"}, r"model\.dtype=int8"),
        ({"pseudo_cells": -1.0}, r"model\.pseudo_cells=-1"),
        ({"tolerance": 0.0}, r"model\.tolerance"),
        ({"patience": 0}, r"model\.patience"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(InputError, match=words):
        model_for(small_data(), **settings)


class Metrics(pl.Callback):
    """What an epoch has logged."""

    def on_train_epoch_end(self, trainer, module):
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.steps = trainer.global_step


def test_cells_that_are_held_out_are_scored_after_the_m_step():
    data, metrics = small_data(), Metrics()
    module, cells = fit(model_for(data), data, epochs=1, callbacks=[metrics])
    mean = float(cells.log_likelihood[module.validation_rows].mean())
    assert metrics.logged["heldout_log_likelihood"] == pytest.approx(mean, rel=1e-12)
    assert metrics.steps == 1  # an M step is one

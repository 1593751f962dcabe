"""EM in memory: its objective, what it finds, and when it stops."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.special import logsumexp

from nbmix.core.em_loop import EMRun, Iteration, StoppingRule, iterate, run_em
from nbmix.core.expected_log_likelihood import expected_log_likelihood
from nbmix.core.m_step import GradientMStep
from nbmix.core.mixture import Posterior
from nbmix.core.parameters import Components
from nbmix.core.statistics import SufficientStatistics
from nbmix.core.tables import FLOAT32_NATS
from tests.helpers.assigned import responsibilities_of
from tests.helpers.mixtures import Data, awkward_data, random_q, simulated
from tests.helpers.problems import reference_log_likelihood


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("weights", ["uniform", "learned", "given"])
@pytest.mark.parametrize("pseudo_cells", [0.0, 20.0])
def test_plain_em_never_lowers_its_objective(pseudo_cells, weights, dtype, seed):
    """The objective in float64, whatever EM runs in; what EM reports of it rounds at most by FLOAT32_NATS."""
    data = awkward_data()
    settings = {"folds": 1, "pseudo_cells": pseudo_cells, "weights": weights}
    mixture = data.mixture(3, **settings, dtype=dtype)
    run_em(mixture, data.batches, responsibilities=random_q(90, 3, seed), max_iterations=1)
    exact, reported = [], []
    for _ in range(20):
        copy = data.mixture(3, **settings, dtype="float64")
        copy.load_state_dict(mixture.state_dict())
        exact += run_em(copy, data.batches, max_iterations=1).objective
        reported += run_em(mixture, data.batches, max_iterations=1).objective
    tolerance = 1e-9 if dtype == "float64" else 1e-7
    assert (np.diff(exact) >= -tolerance * np.abs(exact[1:])).all()
    assert exact[-1] > exact[0]
    np.testing.assert_allclose(reported, exact, rtol=0, atol=1e-9 if dtype == "float64" else FLOAT32_NATS)


def test_plain_em_by_gradient_steps_raises_its_objective():
    data = awkward_data()
    mixture = data.mixture(3, folds=1, m_step=GradientMStep(lr=1e-3, num_epochs=5), dtype="float64")
    run = run_em(mixture, data.batches, responsibilities=random_q(90, 3), max_iterations=10)
    assert run.objective[-1] > run.objective[0]


@pytest.mark.parametrize("weights", ["uniform", "learned", "given"])
@pytest.mark.parametrize("pseudo_cells", [0.0, 20.0])
def test_the_objective_is_log_likelihood_and_log_prior_per_cell(pseudo_cells, weights):
    """ln p(x) by SciPy; the prior: components explain pseudo-cells of the pool, weights one cell."""
    data = awkward_data()
    mixture = data.mixture(3, folds=1, pseudo_cells=pseudo_cells, weights=weights, dtype="float64")
    run_em(mixture, data.batches, responsibilities=random_q(90, 3), max_iterations=2)
    log_weights, components = mixture.log_weights[0].detach().clone(), mixture.components()
    components = Components(*(t.clone() for t in components))
    run = run_em(mixture, data.batches, max_iterations=1)
    loglik = reference_log_likelihood(data.counts.toarray(), data.s, *components)
    prior = np.log(data.prior) if weights == "given" else log_weights.numpy()
    want = logsumexp(loglik + prior, axis=1).sum()
    if pseudo_cells:
        ones = torch.ones(data.n_cells, 3, dtype=torch.float64)
        pool = SufficientStatistics.collect(data.whole, data.basis, ones, torch.float64)
        want += float(expected_log_likelihood(pool * (20 / data.n_cells), data.basis, components).sum())
        want += float(log_weights.sum()) if weights == "learned" else 0.0
    assert run.objective[0] == pytest.approx(want / data.n_cells, rel=1e-9)


def test_cross_fitted_objective_is_the_held_out_log_likelihood():
    data = awkward_data(folds=3)
    mixture = data.mixture(3, folds=3, dtype="float64", weights="learned")
    run_em(mixture, data.batches, responsibilities=random_q(90, 3), max_iterations=2)
    want = 0.0
    for fold, rows in data.blocks:
        loglik = reference_log_likelihood(
            data.counts[rows].toarray(), data.s[rows], *mixture.components(fold)
        )
        want += logsumexp(loglik + mixture.log_weights[fold].detach().numpy(), axis=1).sum()
    _, per_cell = responsibilities_of(mixture, data.batches, data.n_cells)
    assert per_cell == pytest.approx(want / data.n_cells, rel=1e-9)
    run = run_em(mixture, data.batches, max_iterations=1)
    assert run.objective == [pytest.approx(per_cell, rel=1e-12)]


def best_permutation(labels, found, k):
    """Order of the found components with most cells in agreement, and how many agree."""
    table = np.zeros((k, k), dtype=int)
    np.add.at(table, (labels, found), 1)
    best = max(permutations(range(k)), key=lambda order: sum(table[i, o] for i, o in enumerate(order)))
    return list(best), sum(table[i, o] for i, o in enumerate(best))


@pytest.mark.parametrize("folds", [1, 3])
def test_permuted_components_give_permuted_results(folds):
    data = awkward_data(folds=folds)
    order = [2, 0, 1]
    found = []
    for q in (random_q(90, 3), random_q(90, 3)[:, order]):
        mixture = data.mixture(3, folds=folds, dtype="float64")
        run = run_em(mixture, data.batches, responsibilities=q, max_iterations=4)
        found.append((mixture, run, responsibilities_of(mixture, data.batches, 90)[0]))
    (plain, plain_run, plain_q), (permuted, permuted_run, permuted_q) = found
    np.testing.assert_allclose(permuted_run.objective, plain_run.objective, rtol=1e-9)
    torch.testing.assert_close(permuted_q, plain_q[:, order], rtol=0, atol=1e-6)
    torch.testing.assert_close(permuted.log_mean, plain.log_mean[:, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(permuted.log_weights, plain.log_weights[:, order], rtol=0, atol=1e-6)


def test_batches_of_any_size_give_the_same_run():
    runs = []
    for block_size in (7, 90):
        data = awkward_data(block_size=block_size)
        mixture = data.mixture(3, folds=1, dtype="float64")
        runs.append(run_em(mixture, data.batches, responsibilities=random_q(90, 3), max_iterations=5))
    np.testing.assert_allclose(runs[0].objective, runs[1].objective, rtol=1e-9)


@pytest.mark.parametrize("folds", [1, 3])
def test_labels_never_enter_the_fit(folds):
    labels = np.random.default_rng(0).integers(0, 3, 90)
    fits = []
    for given in (None, labels, labels[::-1].copy()):
        data = awkward_data(folds=folds, labels=given)
        mixture = data.mixture(3, folds=folds)
        run_em(mixture, data.batches, responsibilities=random_q(90, 3), max_iterations=4)
        fits.append(mixture.state_dict())
    for other in fits[1:]:
        assert all(torch.equal(fits[0][name], other[name]) for name in fits[0])


@pytest.mark.parametrize("seed", range(3))
def test_em_from_random_responsibilities_recovers_the_simulated_components(seed):
    """Three cross-fitted starts, the best by held-out likelihood, which has seen no label."""
    data, simulation = simulated(folds=5, seed=seed)
    runs = []
    for start in range(3):
        mixture = data.mixture(3)
        q = random_q(data.n_cells, 3, seed=start, sharpness=0.1)
        run = run_em(mixture, data.batches, responsibilities=q)
        runs.append((run.objective[-1], start, mixture))
    mixture = max(runs)[2]
    q, _ = responsibilities_of(mixture, data.batches, data.n_cells)
    order, agree = best_permutation(simulation.labels, q.argmax(1).numpy(), 3)
    assert agree == data.n_cells
    # with about 100 cells a component: ln mean of genes of 500 and more counts in it is known to 0.2
    counts = np.stack([simulation.counts[simulation.labels == k].sum(0).A1 for k in range(3)])
    found = mixture.components().log_mean[order].numpy()
    loud = counts > 500
    assert loud.sum() > 100
    assert np.abs(found - simulation.log_mean)[loud].mean() < 0.1


@pytest.mark.parametrize("seed", range(2))
def test_the_fit_beats_the_truth_in_sample(seed):
    data, simulation = simulated(seed=seed)
    truth = Components(torch.from_numpy(simulation.log_mean), torch.from_numpy(simulation.log_inv_disp))
    shares = torch.from_numpy(np.bincount(simulation.labels) / data.n_cells)
    mixture = data.mixture(3, folds=1, pseudo_cells=0.0, dtype="float64")
    mixture.set_components(truth, torch.log(shares))
    loglik = reference_log_likelihood(simulation.counts.toarray(), data.s, *truth)
    of_truth = logsumexp(loglik + np.log(shares.numpy()), axis=1).mean()
    run = run_em(mixture, data.batches, max_iterations=20)
    assert run.objective[0] == pytest.approx(of_truth, rel=1e-8)
    assert run.objective[-1] > of_truth + 1


def test_a_run_stops_at_convergence_and_says_so():
    data, _ = simulated(n=60, p=50, k=2)
    mixture = data.mixture(2, folds=1)
    run = run_em(mixture, data.batches, responsibilities=random_q(60, 2), max_iterations=200)
    assert run.converged
    assert len(run.objective) < 199
    short = run_em(data.mixture(2, folds=1), data.batches, responsibilities=random_q(60, 2), max_iterations=2)
    assert not short.converged


def test_a_cross_fitted_run_does_not_stop_at_what_components_had_of_seeing_the_cells():
    # noise: components that know the cells are far better there than any that do not
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(0.5, (60, 300)).astype(np.float32))
    data = Data(counts, np.full(60, 1.0), folds=5)
    plain = Data(counts, np.full(60, 1.0))
    knowing = plain.mixture(3, folds=1, pseudo_cells=0.0)
    seen = run_em(knowing, plain.batches, responsibilities=random_q(60, 3), max_iterations=20)
    mixture = data.mixture(3, folds=5)
    mixture.set_components(knowing.components())
    run = run_em(mixture, data.batches, max_iterations=4, stopping=StoppingRule(patience=2))
    assert max(run.objective) < seen.objective[-1] - 10
    assert len(run.objective) == 2  # the E steps of the given components and of the first copies are left out
    assert not run.converged


@pytest.mark.parametrize("pseudo_cells", [20.0, "auto"])
@pytest.mark.parametrize("folds", [1, 5])
def test_a_run_goes_on_from_a_state_dict_as_if_never_stopped(folds, pseudo_cells):
    data = awkward_data(folds=folds)
    settings = {"folds": folds, "pseudo_cells": pseudo_cells, "dtype": "float64"}
    whole, first, second = (data.mixture(3, **settings) for _ in range(3))
    long = run_em(whole, data.batches, responsibilities=random_q(90, 3), max_iterations=6)
    run_em(first, data.batches, responsibilities=random_q(90, 3), max_iterations=2)
    second.load_state_dict(first.state_dict())
    rest = run_em(second, data.batches, max_iterations=4)
    assert rest.objective == long.objective[1:]
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in second.state_dict().items())


def test_responsibilities_stand_in_the_order_of_the_cells():
    data = awkward_data(folds=3, block_size=8)
    mixture = data.mixture(3, folds=3, dtype="float64")
    run_em(mixture, data.batches, responsibilities=random_q(90, 3), max_iterations=2)
    q, per_cell = responsibilities_of(mixture, data.batches, 90)
    total = 0.0
    for batch in data.batches:
        posterior = mixture.posterior(batch)
        assert torch.equal(q[batch.rows], posterior.responsibilities)
        total += float(posterior.log_likelihood.sum())
    assert per_cell == pytest.approx(total / 90, rel=1e-12)


class CountingModel:
    """An ``EMModel`` whose n-th E step gives every cell the n-th of some log likelihoods."""

    scores_are_comparable = True

    def __init__(self, log_likelihoods, log_prior_density=0.0):
        self.log_likelihoods, self.log_prior_density = log_likelihoods, log_prior_density
        self.resets, self.m_steps, self.collected = 0, [], []

    def meet(self, batches, responsibilities):
        self.met = True

    def reset_statistics(self):
        self.resets += 1

    def posterior(self, batch):
        given = self.log_likelihoods[len(self.m_steps)]
        return Posterior(torch.ones(batch.n_cells, 1), torch.full((batch.n_cells,), float(given)))

    def collect(self, batch, responsibilities):
        self.collected.append((len(self.m_steps), responsibilities))

    def m_step(self, *, warm):
        self.m_steps.append(warm)
        return self.log_prior_density


def test_an_iteration_is_e_step_statistics_and_score_of_every_batch():
    batches = awkward_data(block_size=50).batches
    model = CountingModel([-3.0], -45.0)
    iteration = Iteration(model)
    found = [iteration.add(batch) for batch in batches]
    assert (model.resets, len(model.collected)) == (1, len(batches))
    assert all(one is other for one, (_, other) in zip(found, model.collected, strict=True))
    assert (iteration.n_cells, iteration.log_likelihood) == (90, -270)
    iteration.log_prior_density = model.m_step(warm=iteration.is_warm)
    assert iteration.objective == -3.5
    assert iteration.is_comparable


def test_given_responsibilities_stand_in_for_the_first_e_step():
    batches, q = awkward_data(block_size=50).batches, random_q(90, 3)
    model = CountingModel([None, -3.0, -2.0])
    run = iterate(model, batches, responsibilities=q, max_iterations=3)
    assert model.m_steps == [False, True, True]
    first = [found for number, found in model.collected if number == 0]
    assert all(torch.equal(one, q[batch.rows]) for one, batch in zip(first, batches, strict=True))
    assert run.objective == [-3.0, -2.0]  # they have no log likelihood


@pytest.mark.parametrize("last_m_step", [True, False])
def test_a_converged_run_takes_the_m_step_that_is_due_or_stays_as_it_was_scored(last_m_step):
    model = CountingModel([-3.0, -2.0, -2.0, -1.0])
    stopping = StoppingRule(patience=1)
    run = iterate(model, awkward_data().batches, stopping=stopping, last_m_step=last_m_step)
    assert run == EMRun(stopping, [-3.0, -2.0, -2.0], True)
    assert len(model.m_steps) == 2 + last_m_step


def test_objectives_that_are_not_comparable_do_not_stop_a_run():
    model = CountingModel([-3.0] * 5)
    model.scores_are_comparable = False
    run = iterate(model, awkward_data().batches, max_iterations=5, stopping=StoppingRule(patience=1))
    assert (run.objective, run.converged, len(model.m_steps)) == ([], False, 5)


def stops_at(rule, objectives):
    return next((i for i, value in enumerate(objectives) if rule.update(value)), None)


@pytest.mark.parametrize(
    ("objectives", "patience", "expected"),
    [
        ([-100, -90, -80, -70], 1, None),
        ([-100, -90, -90], 1, 2),
        ([-100, -90, -90, -90, -90], 3, 4),
        ([-100, -90, -95, -89, -89, -89], 2, 5),  # a rise resets the count
        ([-100, -90, -95, -93, -91], 3, 4),  # rises below the best are none
        ([-100, -100 + 1e-5, -100 + 2e-5], 1, 1),  # too small a rise
        ([-100, -100 + 1e-3, -100 + 2e-3], 1, None),
        ([-math.inf, -100, -90], 1, None),
    ],
)
def test_stopping_rule_waits_for_a_relative_rise(objectives, patience, expected):
    assert stops_at(StoppingRule(tolerance=1e-6, patience=patience), objectives) == expected


def test_stopping_rule_keeps_the_best():
    rule = StoppingRule()
    for value in (-5.0, -3.0, -4.0):
        rule.update(value)
    assert rule.best == -3.0

"""The two steps of EM on a mixture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax

from nbmix.core.em_loop import run_em
from nbmix.core.m_step import NewtonMStep
from nbmix.core.mixture import Mixture
from nbmix.core.parameters import Components
from nbmix.core.settings import AUTO_PSEUDO_CELLS, MixtureSettings
from nbmix.errors import InputError
from tests.helpers.assigned import responsibilities_of
from tests.helpers.mixtures import Data, awkward_data, random_q
from tests.helpers.problems import make_problem, reference_log_likelihood


@pytest.mark.parametrize("weights", ["uniform", "learned", "given"])
def test_posterior_is_bayes_by_scipy(weights):
    problem = make_problem()
    prior = np.random.default_rng(0).dirichlet(np.ones(3), 40)
    log_weights = torch.log(torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64))
    data = Data(problem.counts, problem.size_factors, prior=prior, block_size=1_000)
    mixture = data.mixture(3, folds=1, weights=weights, dtype="float64")
    components = close_components(problem)
    mixture.set_components(components, None if weights == "uniform" else log_weights)
    q, log_likelihood = mixture.posterior(data.batches[0])
    loglik = reference_log_likelihood(problem.counts.toarray(), problem.size_factors, *components)
    log_prior = {"uniform": np.log(np.full(3, 1 / 3)), "learned": log_weights.numpy(), "given": np.log(prior)}
    joint = loglik + log_prior[weights]
    undecided = (softmax(joint, axis=1) > 0.01).sum(1) > 1
    assert undecided.sum() > 1
    np.testing.assert_allclose(q, softmax(joint, axis=1), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(log_likelihood, logsumexp(joint, axis=1), rtol=1e-8)


def close_components(problem, spread=0.05):
    """Components so alike that cells are undecided."""
    rng = np.random.default_rng(1)
    shape = tuple(problem.log_mean.shape)
    return Components(
        problem.log_mean[:1] + torch.from_numpy(rng.normal(0, spread, shape)),
        problem.log_inv_disp[:1] + torch.from_numpy(rng.normal(0, spread, shape)),
    )


@pytest.mark.parametrize("size_factor", [0.0, 1.0])
def test_an_empty_cell_gets_the_prior(size_factor):
    """Exactly with s = 0; with a size factor, zeros are evidence, here a negligible one."""
    problem = make_problem()
    s = problem.size_factors.copy()
    s[0] = size_factor
    data = Data(problem.counts, s, block_size=1_000)
    mixture = data.mixture(3, folds=1, dtype="float64")
    weights = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    mixture.set_components(Components(problem.log_mean - 10, problem.log_inv_disp), torch.log(weights))
    q, log_likelihood = mixture.posterior(data.batches[0])
    torch.testing.assert_close(q[0], weights, rtol=1e-14 if size_factor == 0 else 1e-5, atol=0)
    assert float(log_likelihood[0]) == pytest.approx(0, abs=1e-14 if size_factor == 0 else 1e-5)


def test_each_fold_reads_the_copy_that_has_not_seen_it_and_new_cells_the_one_of_all():
    data = awkward_data(folds=3)
    mixture = data.mixture(3, folds=3, weights="uniform", dtype="float64")
    with torch.no_grad():
        mixture.log_mean.copy_(torch.randn(4, 3, 40, generator=torch.Generator().manual_seed(0)) - 9)
    for batch in data.batches:
        x = data.counts[batch.rows.numpy()].toarray()
        s = batch.size_factors.numpy()
        for asked, copy in ((None, batch.fold), (-1, 3), (0, 0), (2, 2)):
            want = logsumexp(reference_log_likelihood(x, s, *mixture.components(copy)) - math.log(3), axis=1)
            got = mixture.posterior(batch, fold=asked).log_likelihood
            np.testing.assert_allclose(got, want, rtol=1e-8)


def test_new_components_replace_the_tabulated_ones():
    data = awkward_data()
    mixture = data.mixture(3, folds=1, dtype="float64")
    before = mixture.posterior(data.batches[0]).log_likelihood
    mixture.set_components(Components(torch.full((3, 40), -9.0), torch.zeros(3, 40)))
    assert not torch.equal(before, mixture.posterior(data.batches[0]).log_likelihood)


def test_parameters_changed_from_outside_count_once_the_tables_are_forgotten():
    data = awkward_data()
    used, other = data.mixture(3, folds=1, dtype="float64"), data.mixture(3, folds=1, dtype="float64")
    used.posterior(data.batches[0])
    other.set_components(Components(torch.full((3, 40), -9.0), torch.zeros(3, 40)))
    used.load_state_dict(other.state_dict())
    used.forget_tables()
    want = other.posterior(data.batches[0]).log_likelihood
    assert torch.equal(used.posterior(data.batches[0]).log_likelihood, want)


def test_given_weights_without_a_fitting_prior_are_an_input_error():
    problem = make_problem()
    for prior in (None, np.full((40, 4), 0.25)):
        data = Data(problem.counts, problem.size_factors, prior=prior)
        with pytest.raises(InputError, match=r"model\.weights=given") as caught:
            data.mixture(3, folds=1, weights="given").posterior(data.batches[0])
        assert "\n" not in str(caught.value)


def test_a_given_prior_of_zero_rules_a_component_out():
    problem = make_problem()
    prior = np.tile([0.5, 0.0, 0.5], (40, 1))
    data = Data(problem.counts, problem.size_factors, prior=prior)
    mixture = data.mixture(3, folds=1, weights="given")
    run_em(mixture, data.batches, responsibilities=random_q(40, 3), max_iterations=3)
    q, per_cell = responsibilities_of(mixture, data.batches, 40)
    assert (q[:, 1] == 0).all()
    assert math.isfinite(per_cell)
    np.testing.assert_allclose(q.sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize("weights", ["uniform", "learned"])
@pytest.mark.parametrize("pseudo_cells", [0.0, 20.0])
def test_the_copy_for_a_fold_is_the_fit_by_hand_without_it(pseudo_cells, weights):
    """Both from the same cells' responsibilities: one by subtraction, one that never met the fold."""
    data = awkward_data(folds=4, block_size=10)
    settings = {"pseudo_cells": pseudo_cells, "weights": weights, "dtype": "float64"}
    q = random_q(90, 3)
    crossed = data.mixture(3, folds=4, **settings)
    crossed.reset_statistics()
    for batch in data.batches:
        crossed.collect(batch, q[batch.rows])
    crossed.m_step(warm=False, whole=True)
    for copy in range(5):
        alone = data.mixture(3, folds=1, **settings)
        alone.reset_statistics()
        for batch in data.batches:
            if batch.fold != copy:  # none for the last copy, that of all cells
                alone.collect(batch, q[batch.rows])
        alone.m_step(warm=False)
        for got, want in zip(crossed.components(copy), alone.components(), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        torch.testing.assert_close(crossed.log_weights[copy], alone.log_weights[0], rtol=1e-12, atol=1e-12)


def test_a_learned_prior_of_a_copy_sees_nothing_of_its_left_out_fold():
    data = awkward_data(folds=3)
    fitted = []
    for sharpness in (1.0, 3.0):
        mixture = data.mixture(3, folds=3, pseudo_cells="auto", dtype="float64")
        q, other = random_q(90, 3, sharpness=2.0), random_q(90, 3, sharpness=sharpness, seed=9)
        mixture.reset_statistics()
        for batch in data.batches:
            mixture.collect(batch, other[batch.rows] if batch.fold == 0 else q[batch.rows])
        mixture.m_step(warm=False)
        fitted.append({name: value.clone() for name, value in mixture.state_dict().items()})
    for name in ("log_mean", "prior_genes", "prior_disp"):
        # total minus fold leaves the rounding of a sum behind
        torch.testing.assert_close(fitted[0][name][0], fitted[1][name][0], rtol=1e-8, atol=1e-8)
        assert not torch.allclose(fitted[0][name][1], fitted[1][name][1], rtol=1e-3)


def test_auto_pseudo_cells_are_a_fixed_number_where_no_fold_is_left_out():
    data = awkward_data()
    fits = []
    for number in ("auto", AUTO_PSEUDO_CELLS):
        mixture = data.mixture(3, folds=1, pseudo_cells=number)
        fits.append(run_em(mixture, data.batches, responsibilities=random_q(90, 3), max_iterations=4))
    assert fits[0] == fits[1]


@pytest.mark.parametrize(("pseudo_cells", "extra"), [(0.0, 0.0), (20.0, 1.0)])
def test_learned_weights_are_the_shares_of_the_cells(pseudo_cells, extra):
    data = awkward_data()
    q = random_q(90, 3)
    mixture = data.mixture(3, folds=1, pseudo_cells=pseudo_cells)
    run_em(mixture, data.batches, responsibilities=q, max_iterations=1)
    sizes = q.sum(0) + extra
    torch.testing.assert_close(mixture.log_weights[0].detach(), torch.log(sizes / sizes.sum()))


@pytest.mark.parametrize("weights", ["uniform", "given"])
def test_weights_that_are_not_learned_stay(weights):
    data = awkward_data()
    mixture = data.mixture(3, folds=1, weights=weights)
    run_em(mixture, data.batches, responsibilities=random_q(90, 3, sharpness=5.0), max_iterations=3)
    np.testing.assert_allclose(mixture.log_weights.detach(), -math.log(3), rtol=1e-15)


def test_pseudo_cells_keep_a_component_without_cells_at_the_pool():
    data = awkward_data()
    q = torch.zeros(90, 2, dtype=torch.float64)
    q[:, 0] = 1
    mixture = data.mixture(2, folds=1, pseudo_cells=20.0, dtype="float64")
    mixture.reset_statistics()
    for batch in data.batches:
        mixture.collect(batch, q[batch.rows])
    mixture.m_step(warm=False)
    log_mean = mixture.components().log_mean
    loud = np.asarray(data.counts.sum(0)).ravel() > 50
    torch.testing.assert_close(log_mean[0, loud], log_mean[1, loud], rtol=0, atol=1e-2)


@pytest.mark.parametrize("folds", [1, 3])
@pytest.mark.parametrize("weights", ["uniform", "learned"])
def test_a_component_without_cells_leaves_the_rest_finite(folds, weights):
    data = awkward_data(folds=folds)
    q = random_q(90, 3)
    q[:, 1] = 0
    q /= q.sum(1, keepdim=True)
    mixture = data.mixture(3, folds=folds, pseudo_cells=0.0, weights=weights)
    run = run_em(mixture, data.batches, responsibilities=q, max_iterations=4)
    found, _ = responsibilities_of(mixture, data.batches, 90)
    assert np.isfinite(run.objective).all()
    assert torch.isfinite(found).all()
    assert torch.isfinite(mixture.log_mean).all()


def test_a_component_within_one_fold_leaves_that_folds_cells_finite():
    """Its copy for that fold has no cells at all: total minus fold is 0, or a rounding error beside it."""
    data = awkward_data(folds=3)
    q = random_q(90, 3)
    outside = torch.ones(90, dtype=torch.bool)
    for batch in data.batches:
        outside[batch.rows] = batch.fold != 1
    q[outside, 2] = 0
    q /= q.sum(1, keepdim=True)
    mixture = data.mixture(3, folds=3, pseudo_cells=0.0)
    run = run_em(mixture, data.batches, responsibilities=q, max_iterations=4)
    found, _ = responsibilities_of(mixture, data.batches, 90)
    assert np.isfinite(run.objective).all()
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)


def test_without_any_cell_there_is_an_input_error():
    mixture = awkward_data().mixture(3, folds=1)
    mixture.reset_statistics()
    with pytest.raises(InputError, match="no cell"):
        mixture.m_step(warm=False)


def test_a_mixture_without_a_basis_says_so():
    with pytest.raises(RuntimeError, match="attach a basis"):
        _ = Mixture(4, MixtureSettings(2)).basis


@pytest.mark.parametrize(("folds", "copies"), [(1, 1), (2, 3), (5, 6)])
def test_there_is_a_copy_for_each_fold_and_one_for_all_cells(folds, copies):
    mixture = Mixture(4, MixtureSettings(2, folds=folds))
    assert mixture.log_mean.shape == mixture.log_inv_disp.shape == (copies, 2, 4)
    assert mixture.log_weights.shape == (copies, 2)
    assert mixture.copy_for(-1) == copies - 1
    assert isinstance(mixture.settings.m_step, NewtonMStep)

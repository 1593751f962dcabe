from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.special import logsumexp, softmax

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.em_loop import StoppingRule, annealing, responsibilities_of, run_em
from nbmix.core.expected import expected_log_likelihood
from nbmix.core.folds import CUT_TOLERANCE, copy_ranks, fold_blocks
from nbmix.core.m_step import GradientMStep, NewtonMStep
from nbmix.core.mixture import Mixture
from nbmix.core.nodes import SizeFactorNodes
from nbmix.core.parameters import Components
from nbmix.core.settings import AUTO_PSEUDO_CELLS, MixtureSettings
from nbmix.core.statistics import SufficientStatistics
from nbmix.core.tables import FLOAT32_NATS
from nbmix.data.simulate import simulate
from nbmix.errors import InputError
from tests.helpers.problems import make_problem, reference_log_likelihood


class Data:
    """Counts with their basis, cut into batches by fold."""

    def __init__(self, counts, size_factors, folds=1, *, block_size=50, prior=None, labels=None, seed=0):
        self.counts, self.s = counts, np.asarray(size_factors, dtype=np.float64)
        self.n_cells, self.n_genes = counts.shape
        self.prior = prior
        self.total = float(self.s.sum())
        self.basis = Basis.of(counts, self.s)
        self.blocks = fold_blocks(self.s, folds, block_size, np.random.default_rng(seed))
        self.batches = [
            CellBatch.build(
                counts,
                self.s,
                self.basis,
                pick=rows,
                fold=fold,
                prior=None if prior is None else prior[rows],
                labels=None if labels is None else labels[rows],
            )
            for fold, rows in self.blocks
        ]

    def mixture(self, n_components, **settings):
        settings = MixtureSettings(n_components, **settings)
        return Mixture(self.n_genes, settings).attach(self.basis, self.total)

    @property
    def whole(self):
        return CellBatch.build(self.counts, self.s, self.basis)


def random_q(n_cells, n_components, seed=0, sharpness=1.0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n_cells, n_components, dtype=torch.float64, generator=generator)
    return torch.softmax(sharpness * scores, 1)


def awkward_data(folds=1, n_components=3, **keywords):
    """Unequal depths, an empty cell, a silent gene, counts above 20."""
    problem = make_problem(n_cells=90, n_genes=40, seed=1)
    prior = np.random.default_rng(0).dirichlet(np.ones(n_components), 90)
    return Data(problem.counts, problem.size_factors, folds, prior=prior, **keywords)


def simulated(folds=1, n=300, p=200, k=3, seed=0):
    simulation = simulate(n=n, p=p, k=k, seed=seed)
    return Data(simulation.counts, np.full(n, simulation.size_factor), folds), simulation


def best_permutation(labels, found, k):
    """Order of the found components with most cells in agreement, and how many agree."""
    table = np.zeros((k, k), dtype=int)
    np.add.at(table, (labels, found), 1)
    best = max(permutations(range(k)), key=lambda order: sum(table[i, o] for i, o in enumerate(order)))
    return list(best), sum(table[i, o] for i, o in enumerate(best))


# ---- the objective ---------------------------------------------------------------------------------


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


# ---- E step ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("temperature", [0.02, 0.5, 1.0])
def test_a_tempered_posterior_tempers_the_likelihood_alone(temperature):
    problem = make_problem()
    data = Data(problem.counts, problem.size_factors, block_size=1_000)
    mixture = data.mixture(3, folds=1, dtype="float64")
    log_weights = torch.log(torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64))
    components = close_components(problem)
    mixture.set_components(components, log_weights)
    q, log_likelihood = mixture.posterior(data.batches[0], temperature=temperature)
    loglik = reference_log_likelihood(problem.counts.toarray(), problem.size_factors, *components)
    np.testing.assert_allclose(
        q, softmax(temperature * loglik + log_weights.numpy(), axis=1), rtol=1e-6, atol=1e-12
    )
    np.testing.assert_allclose(log_likelihood, logsumexp(loglik + log_weights.numpy(), axis=1), rtol=1e-8)


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


# ---- M step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["uniform", "learned"])
@pytest.mark.parametrize("pseudo_cells", [0.0, 20.0])
def test_the_copy_for_a_fold_is_the_fit_by_hand_without_it(pseudo_cells, weights):
    """Both from the same cells' responsibilities: one by subtraction, one that never met the fold."""
    data = awkward_data(folds=4, block_size=10)
    settings = {"pseudo_cells": pseudo_cells, "weights": weights, "dtype": "float64"}
    q = random_q(90, 3)
    crossed = data.mixture(3, folds=4, **settings)
    crossed.begin()
    for batch in data.batches:
        crossed.collect(batch, q[batch.rows])
    crossed.m_step(warm=False)
    for copy in range(5):
        alone = data.mixture(3, folds=1, **settings)
        alone.begin()
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
        mixture.begin()
        for batch in data.batches:
            mixture.collect(batch, other[batch.rows] if batch.fold == 0 else q[batch.rows])
        mixture.m_step(warm=False)
        fitted.append({name: value.clone() for name, value in mixture.state_dict().items()})
    for name in ("log_mean", "prior_genes", "prior_disp"):
        # total minus fold leaves the rounding of a sum behind
        torch.testing.assert_close(fitted[0][name][0], fitted[1][name][0], rtol=1e-8, atol=1e-8)
        assert not torch.allclose(fitted[0][name][1], fitted[1][name][1], rtol=1e-3)


def test_a_batch_outside_the_folds_is_refused():
    data = awkward_data(folds=1)
    mixture = data.mixture(3, folds=3)
    with pytest.raises(ValueError, match="fold -1"):
        mixture.collect(data.batches[0], random_q(90, 3)[data.batches[0].rows])


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
    mixture.begin()
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
    mixture.begin()
    with pytest.raises(InputError, match="no cell"):
        mixture.m_step(warm=False)


def test_a_mixture_without_a_basis_says_so():
    with pytest.raises(RuntimeError, match="attach a basis"):
        _ = Mixture(4, MixtureSettings(2)).basis


# ---- runs ------------------------------------------------------------------------------------------


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
    """Three annealed cross-fitted starts, the best by held-out likelihood, which has seen no label."""
    data, simulation = simulated(folds=5, seed=seed)
    runs = []
    for start in range(3):
        mixture = data.mixture(3)
        q = random_q(data.n_cells, 3, seed=start, sharpness=0.1)
        run = run_em(mixture, data.batches, responsibilities=q, temperatures=annealing())
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


def test_a_run_never_stops_while_annealing():
    data, _ = simulated(n=60, p=50, k=2)
    mixture = data.mixture(2, folds=1)
    eager = StoppingRule(tolerance=1.0, patience=1)
    temperatures = [0.1] * 12
    run = run_em(mixture, data.batches, max_iterations=50, stopping=eager, temperatures=temperatures)
    assert run.converged
    assert len(run.objective) == 12 + 2


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


# ---- small parts -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("first", "growth"), [(0.02, 1.25), (0.005, 1.2), (0.5, 2.0), (0.9, 3.0)])
def test_annealing_grows_from_the_first_temperature_and_stays_below_one(first, growth):
    steps = annealing(first, growth)
    assert steps[0] == first
    assert max(steps) < 1 <= steps[-1] * growth * (1 + 1e-12)
    np.testing.assert_allclose(np.divide(steps[1:], steps[:-1]), growth)


def some_sizes(n_cells, seed=0):
    """Size factors as of cells, one of them empty."""
    s = np.exp(np.random.default_rng(seed).normal(8, 0.6, n_cells))
    s[n_cells // 2] = 0
    return s


@pytest.mark.parametrize(
    ("n_cells", "folds", "block_size"), [(100, 5, 7), (103, 4, 1_000), (7, 7, 3), (50, 1, 8), (1, 1, 5)]
)
def test_fold_blocks_are_a_balanced_partition(n_cells, folds, block_size):
    blocks = fold_blocks(some_sizes(n_cells), folds, block_size, np.random.default_rng(0))
    rows = np.concatenate([rows for _, rows in blocks])
    np.testing.assert_array_equal(np.sort(rows), np.arange(n_cells))
    assert max(len(rows) for _, rows in blocks) <= block_size
    assert all((np.diff(rows) > 0).all() for _, rows in blocks)
    assert {fold for fold, _ in blocks} == ({-1} if folds == 1 else set(range(folds)))
    sizes = [sum(len(rows) for fold, rows in blocks if fold == f) for f in {fold for fold, _ in blocks}]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("n_cells", [0, 2])
def test_folds_without_cells_have_an_empty_block(n_cells):
    blocks = fold_blocks(np.full(n_cells, 1e4), 3, 5, np.random.default_rng(0))
    assert [fold for fold, _ in blocks] == [0, 1, 2]
    assert sum(len(rows) for _, rows in blocks) == n_cells


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("n_cells", "folds"), [(100, 5), (31, 3), (5, 4), (20, 1)])
def test_ranks_share_the_folds_without_overlap_in_as_many_blocks(n_cells, folds, world_size):
    s = some_sizes(n_cells)
    of_rank = [
        fold_blocks(s, folds, 4, np.random.default_rng(0), rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    together = [(fold, row) for blocks in of_rank for fold, rows in blocks for row in rows]
    alone = [(f, row) for f, rows in fold_blocks(s, folds, 4, np.random.default_rng(0)) for row in rows]
    assert sorted(together) == sorted(alone)
    assert len({tuple(fold for fold, _ in blocks) for blocks in of_rank}) == 1
    assert max(len(rows) for blocks in of_rank for _, rows in blocks) <= 4


@pytest.mark.parametrize("folds", [1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_ranks_have_as_much_work_in_few_folds_and_fit_the_copies_of_those(folds, world_size):
    s, fitters = some_sizes(480 * folds), copy_ranks(folds, world_size)
    met, work = [], []
    for rank in range(world_size):
        blocks = fold_blocks(s, folds, 100, np.random.default_rng(0), rank=rank, world_size=world_size)
        met.append({fold for fold, rows in blocks if rows.size})
        work.append([sum(s[rows].sum() for f, rows in blocks if max(f, 0) == fold) for fold in range(folds)])
    shares = np.array(work) / np.sum(work, axis=0)  # of each fold
    np.testing.assert_allclose(shares.sum(1), folds / world_size, rtol=0, atol=2 * folds * s.max() / s.sum())
    assert sum(map(len, met)) <= folds + world_size - 1
    assert all(max(fold, 0) in {max(f, 0) for f in met[fitters[fold]]} for fold in range(folds))
    fitted = np.bincount(fitters, minlength=world_size)
    assert fitted.sum() == (1 if folds == 1 else folds + 1)
    assert fitted.max() <= -(-fitted.sum() // world_size) + 1


def test_a_fold_that_ranks_share_is_cut_between_shallow_and_deep_cells():
    s = spread_sizes()
    first, second = (
        fold_blocks(s, 3, 10**6, np.random.default_rng(0), rank=rank, world_size=2) for rank in range(2)
    )
    shared = [[rows for fold, rows in blocks if fold == 1 and rows.size] for blocks in (first, second)]
    assert max(s[rows].max() for rows in shared[0]) <= min(s[rows].min() for rows in shared[1])
    alone = [rows for fold, rows in fold_blocks(s, 3, 10**6, np.random.default_rng(0)) if fold == 1]
    assert len(shared[0]) + len(shared[1]) <= len(alone) + 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_have_as_many_blocks_where_folds_are_cut_by_size_factor(world_size):
    s = spread_sizes()
    of_rank = [
        fold_blocks(s, 3, 1_000, np.random.default_rng(0), rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({tuple(fold for fold, _ in blocks) for blocks in of_rank}) == 1
    assert len(of_rank[0]) > 3 * 4_000 / 1_000 / world_size
    rows = np.concatenate([rows for blocks in of_rank for _, rows in blocks])
    np.testing.assert_array_equal(np.sort(rows), np.arange(s.size))


def spread_sizes(n_cells=12_000):
    """Shallow cells and deep ones, with a few far outside."""
    rng = np.random.default_rng(0)
    s = np.exp(rng.normal(np.where(rng.random(n_cells) < 0.5, 7.0, 10.0), 0.3))
    s[rng.choice(n_cells, 20, replace=False)] *= 30
    return s


@pytest.mark.parametrize(("folds", "block_size"), [(1, 10**6), (3, 10**6), (1, 500), (3, 500)])
def test_blocks_of_a_fold_do_not_overlap_in_their_size_factors(folds, block_size):
    s = spread_sizes()
    blocks = fold_blocks(s, folds, block_size, np.random.default_rng(0))
    assert len(blocks) > folds
    for fold in {fold for fold, _ in blocks}:
        ranges = sorted((s[rows].min(), s[rows].max()) for f, rows in blocks if f == fold and rows.size)
        assert all(one[1] <= other[0] for one, other in pairwise(ranges))


def test_an_outlying_size_factor_costs_most_other_cells_no_nodes():
    rng = np.random.default_rng(0)
    s = np.exp(rng.normal(8, 0.3, 5_000))
    s[17] *= 1_000
    blocks = fold_blocks(s, 1, 10**6, np.random.default_rng(0))
    usual = SizeFactorNodes.spanning(np.delete(s, 17), CUT_TOLERANCE).log_nodes.numel()
    assert SizeFactorNodes.spanning(s, CUT_TOLERANCE).log_nodes.numel() > 2 * usual
    needed = {
        len(rows): SizeFactorNodes.spanning(s[rows], CUT_TOLERANCE).log_nodes.numel() for _, rows in blocks
    }
    assert sum(size for size, nodes in needed.items() if nodes > usual) <= s.size / 4


def test_cells_of_one_size_factor_stay_in_one_block():
    assert len(fold_blocks(np.full(5_000, 1e4), 1, 10**6, np.random.default_rng(0))) == 1


def test_an_empty_cell_leaves_the_blocks_of_the_others_as_they_are():
    s = spread_sizes(4_000)
    with_empty = fold_blocks(np.append(s, 0.0), 1, 10**6, np.random.default_rng(0))
    without = fold_blocks(s, 1, 10**6, np.random.default_rng(0))
    assert len(with_empty) == len(without)
    nodes = [
        [SizeFactorNodes.spanning(sizes[rows]).log_nodes.numel() for _, rows in blocks]
        for sizes, blocks in ((np.append(s, 0.0), with_empty), (s, without))
    ]
    assert nodes[0] == nodes[1]


def test_fold_blocks_follow_their_generator():
    def draw(seed):
        blocks = fold_blocks(some_sizes(60), 3, 9, np.random.default_rng(seed))
        return np.concatenate([rows for _, rows in blocks])

    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("n_components", 0),
        ("n_components", -2),
        ("folds", 0),
        ("n_components", "abc"),
        ("n_components", 2.5),
        ("folds", True),
        ("pseudo_cells", -1.0),
        ("pseudo_cells", math.nan),
        ("pseudo_cells", math.inf),
        ("pseudo_cells", "many"),
        ("weights", "equal"),
        ("dtype", "float16"),
    ],
)
def test_an_impossible_setting_is_one_line_that_names_it(setting, value):
    with pytest.raises(InputError, match=f"model.{setting}={value}") as caught:
        MixtureSettings(**({"n_components": 3} | {setting: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("folds", "copies"), [(1, 1), (2, 3), (5, 6)])
def test_there_is_a_copy_for_each_fold_and_one_for_all_cells(folds, copies):
    mixture = Mixture(4, MixtureSettings(2, folds=folds))
    assert mixture.log_mean.shape == mixture.log_inv_disp.shape == (copies, 2, 4)
    assert mixture.log_weights.shape == (copies, 2)
    assert mixture.copy_for(-1) == copies - 1
    assert isinstance(mixture.settings.m_step, NewtonMStep)

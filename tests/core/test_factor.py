"""The mixture with shared axes: exact by SciPy, and there for the data it was made for."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse as sp
import torch
from scipy.special import gammaln, logsumexp
from sklearn.metrics import adjusted_rand_score

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.em_loop import iterate
from nbmix.core.factor import FactorCopy, FactorMixture
from nbmix.core.folds import fold_blocks
from nbmix.core.parameters import Components, GenePrior
from nbmix.core.settings import MixtureSettings
from nbmix.core.statistics import SufficientStatistics
from nbmix.data.counts import CountData
from nbmix.errors import InputError
from nbmix.starts.base import one_hot
from nbmix.starts.random import RandomStart
from tests.helpers.problems import make_problem


def test_an_empty_cell_has_the_prior_and_leaves_the_others_alone():
    problem = make_problem(30, 20, 3, seed=1)  # whose first cell is empty, with a size factor
    copy = some_copy(3, 20, 1)
    found = []
    for first in (problem.size_factors[0], 0.0):
        s = np.concatenate([[first], problem.size_factors[1:]])
        basis = Basis.of(problem.counts, s)
        model = FactorMixture(basis, 3, problem.size_factors[1:], folds=3)
        model.copies = [copy] * 3
        found.append(model.all_joint(batches_of(problem.counts, s, basis)))
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-6, atol=0)
    prior = copy.log_weights[:, None] + model.log_level_weights
    torch.testing.assert_close(found[1][0], prior)


def batches_of(counts, s, basis, folds=3, seed=0):
    blocks = fold_blocks(s, folds, 1000, np.random.default_rng(seed))
    return [CellBatch.build(counts, s, basis, pick=rows, fold=fold) for fold, rows in blocks]


def some_copy(n_components, n_genes, n_axes, seed=0, size=0.4):
    rng = np.random.default_rng(seed)
    zeros = torch.zeros(n_genes)
    prior = GenePrior(zeros, torch.ones(n_genes), zeros, torch.ones(()), torch.zeros(3))
    return FactorCopy(
        Components(
            torch.from_numpy(rng.uniform(-12, -5, (n_components, n_genes))),
            torch.from_numpy(rng.uniform(-2, 4, (n_components, n_genes))),
        ),
        torch.from_numpy(rng.normal(0, size, (n_genes, 1 + n_axes))),
        torch.full((1 + n_axes,), 0.05, dtype=torch.float64),
        torch.log_softmax(torch.from_numpy(rng.normal(size=n_components)), 0),
        prior,
    )


def joint_by_scipy(model, copy, x, s):
    """(cells, K, L), term by term."""
    centre = np.log(s[s > 0]).mean()
    a, b = (t.numpy() for t in copy.components)
    g, v = copy.loadings.numpy()[:, 0], copy.loadings.numpy()[:, 1:]
    found = np.zeros((len(x), *a.shape[:1], model.n_levels))
    for k in range(len(a)):
        for place, z in enumerate(model.levels.numpy()):
            log_mean = np.log(s)[:, None] * (1 + g) - g * centre + a[k] + v @ z
            r = np.exp(b[k])
            grown = np.logaddexp(0, log_mean - b[k])
            terms = gammaln(x + r) - gammaln(r) - gammaln(x + 1) + x * (log_mean - b[k]) - (x + r) * grown
            found[:, k, place] = terms.sum(1) + float(copy.log_weights[k] + model.log_level_weights[place])
    return found


@pytest.mark.parametrize("n_axes", [0, 1, 2])
def test_joint_by_scipy(n_axes):
    problem = make_problem(n_cells=40, n_genes=25, seed=3)
    filled = problem.counts.getnnz(1) > 0
    counts, s = problem.counts[filled], problem.size_factors[filled]
    basis = Basis.of(counts, s)
    model = FactorMixture(basis, 3, s, folds=2, n_axes=n_axes)
    copy = some_copy(3, 25, n_axes)
    model.copies = [copy, copy]
    for batch in batches_of(counts, s, basis, folds=2):
        rows = batch.rows.numpy()
        wanted = joint_by_scipy(model, copy, counts[rows].toarray().astype(float), s[rows])
        # the centre of the size factors is that of all cells
        wanted_all = joint_by_scipy(model, copy, counts.toarray().astype(float), s)[rows]
        assert not np.allclose(wanted, wanted_all, atol=1e-2)
        np.testing.assert_allclose(model.joint(batch).numpy(), wanted_all, rtol=0, atol=2e-3)


def test_large_counts_and_deep_cells_by_scipy():
    rng = np.random.default_rng(0)
    size = rng.uniform(500, 5000, (30, 1))
    x = rng.poisson(size * rng.choice([1e-4, 3e-3, 0.05, 0.9], 60) * rng.gamma(0.3, 3, (30, 60))).astype(
        float
    )
    assert x.max() > 1000
    assert np.isin(np.arange(1, 30), x).all()  # powers of all sizes
    counts, s = sp.csr_matrix(x.astype(np.float32)), x.sum(1)
    basis = Basis.of(counts, s)
    model = FactorMixture(basis, 3, s, folds=2)
    copy = some_copy(3, 60, 1)
    copy.components.log_inv_disp[0] = -8  # 1 + s rho is as large as it gets
    model.copies = [copy, copy]
    wanted = joint_by_scipy(model, copy, x, s)
    for batch in batches_of(counts, s, basis, folds=2):
        found = model.joint(batch).numpy()
        np.testing.assert_allclose(found, wanted[batch.rows.numpy()], rtol=1e-9, atol=2e-3)


def test_levels_are_a_standard_normal_to_the_fourth_moment():
    problem = make_problem()
    model = FactorMixture(problem.basis, 2, problem.size_factors, n_axes=2)
    weights, levels = torch.exp(model.log_level_weights), model.levels
    moments = [(weights[:, None] * levels**power).sum(0) for power in (0, 1, 2, 4)]
    for found, wanted in zip(moments, (1.0, 0.0, 1.0, 3.0), strict=True):
        torch.testing.assert_close(found, torch.full((2,), wanted, dtype=torch.float64))
    assert float((weights * levels[:, 0] * levels[:, 1]).sum()) == pytest.approx(0, abs=1e-12)


def collected(model, batches, seed=0):
    rng = np.random.default_rng(seed)
    for batch in batches:
        q = rng.dirichlet(np.ones(model.n_components * model.n_levels), batch.n_cells)
        model.collect(batch, torch.from_numpy(q).view(-1, model.n_components, model.n_levels))
    total = model.statistics.of_fold[0]
    for statistics in model.statistics.of_fold[1:]:
        total = total + statistics
    return total


def test_statistics_are_those_of_as_many_components_as_levels():
    problem = make_problem(n_cells=40, n_genes=25, seed=3)
    counts, s, basis = problem.counts, problem.size_factors, problem.basis
    model = FactorMixture(basis, 2, s, folds=2)
    rng = np.random.default_rng(1)
    for batch in batches_of(counts, s, basis, folds=2):
        q = rng.dirichlet(np.full(6, 0.2), batch.n_cells)
        q[0], q[1] = [1, 0, 0, 0, 0, 0], [0, 0, 1 - 1e-12, 1e-12, 0, 0]
        q = torch.from_numpy(q)
        model.collect(batch, q.view(-1, 2, 3))
        seen, of_six = (
            model.statistics.of_fold[batch.fold],
            SufficientStatistics.collect(batch, basis, q, torch.float64),
        )
        close = {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(seen.rate, of_six.rate.view(seen.rate.shape), **close)
        torch.testing.assert_close(seen.node, of_six.node.view(seen.node.shape), **close)
        torch.testing.assert_close(seen.pair, of_six.pair.view(-1, 2, 3).sum(2), **close)
        torch.testing.assert_close(seen.weight, of_six.weight.view(2, 3).sum(1), **close)


def test_loadings_come_to_the_maximum_that_scipy_finds():
    problem = make_problem(n_cells=60, n_genes=12, seed=5)
    model = FactorMixture(problem.basis, 2, problem.size_factors, folds=2, n_axes=1)
    seen = collected(model, batches_of(problem.counts, problem.size_factors, problem.basis, 2))
    copy = some_copy(2, 12, 1, size=0.0)
    log_nodes, effects = (t.numpy() for t in model.grid())
    for _ in range(20):
        kept = copy.loading_variance
        copy = model.fit_loadings(seen, copy)
        copy = FactorCopy(copy.components, copy.loadings, kept, copy.log_weights, copy.prior)
    a, b = (t.numpy() for t in copy.components)
    rate, node = seen.rate.numpy(), seen.node.numpy()

    def lowered(v, j):
        reach = log_nodes + v @ effects
        both = rate[j] + np.exp(b[:, j])[:, None] * node
        grown = np.logaddexp(0, reach + (a - b)[:, j][:, None])
        return -(rate[j].sum(0) @ (v @ effects)) + (both * grown).sum() + (v**2).sum() / 0.05 / 2

    for j in range(1, 12):
        best = scipy.optimize.minimize(
            lowered, np.zeros(2), (j,), "L-BFGS-B", bounds=[(-1, 1), (None, None)], options={"ftol": 1e-15}
        )
        assert lowered(copy.loadings[j].numpy(), j) <= best.fun + 1e-7 * (1 + abs(best.fun))


def kinds_and_a_programme(n_cells=400, n_genes=300, seed=0):
    """Three kinds with 30 genes each; a programme of 60 genes varies as much among all cells."""
    rng = np.random.default_rng(seed)
    kind, z = rng.integers(0, 3, n_cells), rng.normal(size=n_cells)
    log_mean = np.tile(rng.uniform(-1.5, 1.0, n_genes), (n_cells, 1))
    for k in range(3):
        log_mean[:, 30 * k : 30 * (k + 1)] += np.where(rng.random(30) < 0.5, -1, 1) * (kind == k)[:, None]
    loadings = np.zeros(n_genes)
    loadings[-60:] = 0.8 * rng.choice([-1, 1], 60)
    s = np.exp(rng.normal(0, 0.3, n_cells))
    mean = s[:, None] * np.exp(log_mean + loadings * z[:, None])
    counts = rng.poisson(mean * rng.gamma(4, 1 / 4, mean.shape))
    return sp.csr_matrix(counts.astype(np.float32)), s, kind, z, loadings


def test_an_axis_takes_up_a_programme_that_kinds_share():
    counts, s, kind, z, loadings = kinds_and_a_programme()
    basis = Basis.of(counts, s)
    batches = batches_of(counts, s, basis)
    found = {}
    for n_axes in (0, 1):
        model = FactorMixture(basis, 3, s, folds=3, n_axes=n_axes)
        scores = torch.from_numpy(z[:, None] if n_axes else np.zeros((len(z), 0)))
        joint = model.run(batches, model.spread(one_hot(kind, 3), scores))
        q = torch.logsumexp(joint, 2).argmax(1).numpy()
        log_likelihood = float(torch.logsumexp(joint, (1, 2)).mean())
        found[n_axes] = log_likelihood, adjusted_rand_score(kind, q), model
    assert found[1][0] > found[0][0] + 5
    assert found[1][1] > 0.95
    assert np.corrcoef(found[1][2].copies[0].loadings[:, 1], loadings)[0, 1] > 0.95


def test_the_search_finds_kinds_that_a_programme_hides():
    counts, s, kind, _, _ = kinds_and_a_programme()
    names = np.arange(len(s)).astype(str)
    data = CountData(counts, s, names, np.arange(counts.shape[1]).astype(str))
    score = {}
    for n_axes in (0, 1):
        start = RandomStart(n_axes=n_axes)(data, MixtureSettings(3), np.random.default_rng(0))
        score[n_axes] = adjusted_rand_score(kind, start.responsibilities.argmax(1).numpy())
    assert score[0] < 0.1
    assert score[1] > 0.9


def test_the_cross_fitted_objective_is_the_log_likelihood_of_unseen_cells():
    counts, s, kind, z, _ = kinds_and_a_programme(n_cells=90, n_genes=150)
    basis = Basis.of(counts, s)
    batches = batches_of(counts, s, basis)
    scores = torch.from_numpy(z[:, None])
    model = FactorMixture(basis, 3, s, folds=3)
    begin = model.spread(one_hot(kind, 3), scores)
    joint = model.run(batches, begin, max_iterations=2)
    assert torch.equal(joint, model.all_joint(batches))
    run = iterate(FactorMixture(basis, 3, s, folds=3), batches, responsibilities=begin, max_iterations=3)
    assert run.objective[-1] == pytest.approx(logsumexp(joint.numpy(), axis=(1, 2)).mean(), rel=1e-12)
    # changing the counts of one fold changes nothing in the copy that leaves it out
    left_out = np.concatenate([b.rows.numpy() for b in batches if b.fold == 0])
    dense = counts.toarray()
    dense[left_out] = dense[left_out][::-1]
    moved = sp.csr_matrix(dense)
    again = FactorMixture(basis, 3, s, folds=3)
    again.run(batches_of(moved, s, basis), begin, max_iterations=1)
    once = FactorMixture(basis, 3, s, folds=3)
    once.run(batches, begin, max_iterations=1)
    changes = [
        float((mine.components.log_mean - theirs.components.log_mean).abs().max())
        for mine, theirs in zip(again.copies, once.copies, strict=True)
    ]
    assert changes[0] < 1e-6  # leaving a fold out is a subtraction, which rounds
    assert min(changes[1:]) > 1e-2


def test_the_e_step_is_bayes_over_components_and_levels():
    problem = make_problem(30, 20, 3, seed=1)
    model = FactorMixture(problem.basis, 3, problem.size_factors, folds=3)
    model.copies = [some_copy(3, 20, 1)] * 3
    for batch in batches_of(problem.counts, problem.size_factors, problem.basis):
        q, log_likelihood = model.posterior(batch)
        joint = model.joint(batch).numpy()
        np.testing.assert_allclose(log_likelihood, logsumexp(joint, axis=(1, 2)), rtol=1e-12)
        wanted = np.exp(joint - logsumexp(joint, axis=(1, 2), keepdims=True))
        np.testing.assert_allclose(q, wanted, rtol=1e-9, atol=1e-300)


def test_a_mixture_without_responsibilities_says_so():
    problem = make_problem()
    model = FactorMixture(problem.basis, 2, problem.size_factors)
    with pytest.raises(RuntimeError, match="begins at responsibilities"):
        model.joint(problem.batch)


def test_given_weights_need_as_many_columns():
    problem = make_problem()
    model = FactorMixture(problem.basis, 2, problem.size_factors, given_weights=True)
    model.copies = [some_copy(2, 25, 1)] * 5
    with pytest.raises(InputError, match=r"prior of 2 columns"):
        model.joint(problem.batch)


def test_cells_of_one_depth_tell_no_power_of_it_and_do_no_harm():
    """Deep counts whose size factors nearly agree: the powers g are not identified."""
    rng = np.random.default_rng(0)
    n_cells, n_genes = 60, 80
    kind = np.arange(n_cells) % 2
    mean = np.exp(rng.uniform(0, 6, n_genes)) * np.where(
        kind[:, None] == 0, 1.0, rng.choice([0.5, 1, 2], n_genes)
    )
    counts = sp.csr_matrix(rng.poisson(mean * rng.gamma(50, 1 / 50, mean.shape)).astype(np.float32))
    s = np.asarray(counts.sum(1)).ravel().astype(float)
    basis = Basis.of(counts, s)
    batches = batches_of(counts, s, basis)
    model = FactorMixture(basis, 2, s, folds=3)
    begin = model.spread(one_hot(kind, 2), torch.from_numpy(rng.normal(size=(n_cells, 1))))
    joint = model.run(batches, begin, max_iterations=15)
    assert torch.isfinite(joint).all()
    assert adjusted_rand_score(kind, torch.logsumexp(joint, 2).argmax(1).numpy()) == 1
    assert max(float(copy.loadings[:, 0].abs().max()) for copy in model.copies) <= 1

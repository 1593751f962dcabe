from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse as sp
import torch

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.expected_log_likelihood import ExpectedLogLikelihood, expected_log_likelihood
from nbmix.core.m_step import GradientMStep, MStepProblem, NewtonMStep, moment_components
from nbmix.core.parameters import FEWEST_COUNTS, LOG_INV_DISP_RANGE, Components, lowest_log_mean
from nbmix.core.statistics import SufficientStatistics
from tests.helpers.cases import CASES, Case, a_prior
from tests.helpers.cases import random_components as any_components
from tests.helpers.genes import KINDS, genes_of_every_kind
from tests.helpers.problems import make_problem, reference_log_likelihood

NATS = 1e-4  # what a gene may lack of its best log likelihood


def random_components(n_components, n_genes, generator, log_mean=(-16.0, -3.0), log_inv_disp=(-8.0, 12.0)):
    def uniform(low, high):
        return low + (high - low) * torch.rand(
            n_components, n_genes, dtype=torch.float64, generator=generator
        )

    return Components(uniform(*log_mean), uniform(*log_inv_disp))


def random_q(n_cells, n_components, generator, sharpness=2.0):
    scores = torch.randn(n_cells, n_components, dtype=torch.float64, generator=generator)
    return torch.softmax(sharpness * scores, 1)


def q_per_problem(statistics, basis, components):
    """(K, genes) value of Q."""
    problem = ExpectedLogLikelihood.of(statistics, basis)
    flat = problem.value(components.log_mean.flatten(), components.log_inv_disp.flatten())
    return flat.view_as(components.log_mean)


@pytest.fixture
def weighted(problem, generator):
    q = random_q(40, 3, generator)
    return SufficientStatistics.collect(problem.batch, problem.basis, q, torch.float64), q


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("with_prior", [False, True])
def test_newton_steps_of_several_tasks_are_those_of_each(case, with_prior):
    newton = NewtonMStep()
    prior = a_prior(case.n_genes) if with_prior else None
    tasks = [
        MStepProblem(case.statistics * share, any_components(case.n_components, case.n_genes, seed), prior)
        for seed, share in enumerate((1.0, 0.3, 2.0))
    ]
    for task, fit in zip(tasks, newton.together(tasks, case.basis, case.total), strict=True):
        (alone,) = newton.together([task], case.basis, case.total)
        torch.testing.assert_close(fit.components, alone.components, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fit.curvature, alone.curvature, rtol=1e-9, atol=1e-9)


def test_moment_components_have_the_weighted_mean_rate(problem, weighted):
    statistics, q = weighted
    total = problem.size_factors.sum()
    log_mean, log_inv_disp = moment_components(statistics, problem.basis, total)
    x, s = problem.counts.toarray().astype(float), problem.size_factors
    with np.errstate(divide="ignore"):
        want = np.log(q.numpy().T @ x) - np.log(q.numpy().T @ s)[:, None]
    np.testing.assert_allclose(log_mean, np.maximum(want, np.log(FEWEST_COUNTS / total)), rtol=1e-8)
    assert log_mean[0, 0] == lowest_log_mean(total)  # gene 0 is silent
    assert torch.isfinite(log_inv_disp).all()


def test_moment_components_of_a_component_without_cells_are_finite(problem):
    nothing = SufficientStatistics.zeros(problem.basis, 2, "cpu")
    for part in moment_components(nothing, problem.basis, 1e5):
        assert torch.isfinite(part).all()


def best_by_scipy(x, s, weight):
    """The largest weighted log likelihood of one gene within the bounds, over several starts."""
    low_a = lowest_log_mean(s.sum())

    def minus(theta):
        return -weight @ reference_log_likelihood(x[:, None], s, [[theta[0]]], [[theta[1]]])[:, 0]

    mean = max(low_a, math.log(max(weight @ x, 1e-300) / (weight @ s)))
    found = [minus((low_a, b)) for b in (*LOG_INV_DISP_RANGE, 0.0)]
    for b in (-5.0, 0.0, 4.0, 9.0):
        result = scipy.optimize.minimize(
            minus,
            (mean, b),
            method="Nelder-Mead",
            bounds=[(low_a, 5.0), LOG_INV_DISP_RANGE],
            options={"xatol": 1e-7, "fatol": 1e-9, "maxiter": 2_000},
        )
        found.append(result.fun)
    return -min(found)


class Fitted:
    """One component's weighted statistics of ``genes_of_every_kind``, and the best that SciPy finds."""

    def __init__(self):
        x, s = genes_of_every_kind()
        self.x, self.s = x, s
        counts = sp.csr_matrix(x.astype(np.float32))
        self.basis = Basis.of(counts, s)
        batch = CellBatch.build(counts, s, self.basis)
        self.q = torch.rand(len(s), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        self.statistics = SufficientStatistics.collect(batch, self.basis, self.q, torch.float64)
        self.total = float(s.sum())
        self.best = np.array([best_by_scipy(column, s, self.q[:, 0].numpy()) for column in x.T])

    def fit(self, begin=None, m_step=None):
        begin = begin or moment_components(self.statistics, self.basis, self.total)
        return (m_step or NewtonMStep())(self.statistics, self.basis, begin, self.total).components

    def log_likelihood(self, components):
        """(genes,) sum_i q_i ln NB, by SciPy."""
        cells = [
            reference_log_likelihood(self.x[:, [j]], self.s, components[0][:, [j]], components[1][:, [j]])
            for j in range(self.x.shape[1])
        ]
        return self.q[:, 0].numpy() @ np.hstack(cells)

    def of(self, kind):
        each = self.x.shape[1] // len(KINDS)
        return slice(KINDS.index(kind) * each, (KINDS.index(kind) + 1) * each)


@pytest.fixture(scope="module")
def fitted():
    return Fitted()


@pytest.mark.parametrize("kind", KINDS)
def test_newton_reaches_the_best_that_scipy_finds(fitted, kind):
    lacks = (fitted.best - fitted.log_likelihood(fitted.fit()))[fitted.of(kind)]
    assert lacks.max() < NATS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log_inv_disp", [-8.0, -3.0, 4.0, 8.0, 11.0, 12.0])
def test_newton_reaches_the_best_from_any_dispersion(fitted, kind, log_inv_disp):
    """EM starts an M step at the last one's components, which other cells may have made Poisson."""
    begin = moment_components(fitted.statistics, fitted.basis, fitted.total)
    shift = 0.5 * (-1.0) ** torch.arange(begin.log_mean.numel())
    begin = Components(begin.log_mean + shift, torch.full_like(begin.log_mean, log_inv_disp))
    lacks = (fitted.best - fitted.log_likelihood(fitted.fit(begin)))[fitted.of(kind)]
    assert lacks.max() < NATS


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_newton_reaches_the_best_from_a_wrong_mean(fitted, shift):
    begin = moment_components(fitted.statistics, fitted.basis, fitted.total)
    begin = Components(begin.log_mean + shift, begin.log_inv_disp)
    assert (fitted.best - fitted.log_likelihood(fitted.fit(begin))).max() < NATS


def test_under_dispersed_genes_end_at_the_upper_bound(fitted):
    assert (fitted.fit().log_inv_disp[0, fitted.of("under-dispersed")] == LOG_INV_DISP_RANGE[1]).all()


def test_silent_genes_end_at_the_floor_from_wherever_they_start(fitted):
    silent = fitted.of("silent")
    for shift in (0.0, 4.0, 12.0):
        begin = moment_components(fitted.statistics, fitted.basis, fitted.total)
        begin = Components(begin.log_mean + shift, begin.log_inv_disp)
        assert (fitted.fit(begin).log_mean[0, silent] == lowest_log_mean(fitted.total)).all()


def test_a_fixed_point_stays(fitted):
    once = fitted.fit(m_step=NewtonMStep(tolerance=1e-12, max_steps=200))
    again = fitted.fit(once)
    assert torch.equal(once.log_mean, again.log_mean)
    assert torch.equal(once.log_inv_disp, again.log_inv_disp)


def test_newton_stays_within_its_bounds(fitted, generator):
    outside = random_components(1, fitted.x.shape[1], generator, (-60.0, 2.0), (-20.0, 30.0))
    log_mean, log_inv_disp = fitted.fit(outside)
    assert log_mean.min() >= lowest_log_mean(fitted.total)
    assert LOG_INV_DISP_RANGE[0] <= log_inv_disp.min() <= log_inv_disp.max() <= LOG_INV_DISP_RANGE[1]


def test_newton_leaves_its_start_alone(fitted):
    begin = moment_components(fitted.statistics, fitted.basis, fitted.total)
    copies = [t.clone() for t in begin]
    fitted.fit(begin)
    assert all(torch.equal(t, c) for t, c in zip(begin, copies, strict=True))


@pytest.mark.parametrize("max_steps", [1, 2, 5, 50])
@pytest.mark.parametrize("seed", range(4))
def test_newton_never_lowers_q_of_any_gene_from_random_starts(seed, max_steps):
    generator = torch.Generator().manual_seed(seed)
    problem = make_problem(n_cells=30, n_genes=120, n_components=4, seed=seed)
    q = random_q(30, 4, generator, sharpness=10.0)  # some components hold next to nothing
    statistics = SufficientStatistics.collect(problem.batch, problem.basis, q, torch.float64)
    begin = random_components(4, 120, generator)
    newton = NewtonMStep(max_steps=max_steps)
    after = newton(statistics, problem.basis, begin, problem.size_factors.sum()).components
    was, now = (q_per_problem(statistics, problem.basis, c) for c in (begin, after))
    assert (now - was >= -1e-12 * was.abs()).all()


def test_newton_solves_every_component_as_if_alone(problem, weighted):
    """p K separate problems: what else is in the pile changes nothing."""
    statistics, q = weighted
    total = problem.size_factors.sum()
    begin = moment_components(statistics, problem.basis, total)
    together = NewtonMStep()(statistics, problem.basis, begin, total).components
    for k in range(3):
        one = SufficientStatistics.collect(problem.batch, problem.basis, q[:, [k]], torch.float64)
        alone = NewtonMStep()(one, problem.basis, Components(*(t[[k]] for t in begin)), total).components
        torch.testing.assert_close(alone.log_mean[0], together.log_mean[k], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone.log_inv_disp[0], together.log_inv_disp[k], rtol=1e-9, atol=1e-9)


def test_newton_leaves_a_component_without_cells_finite(problem):
    nothing = SufficientStatistics.zeros(problem.basis, 2, "cpu")
    begin = moment_components(nothing, problem.basis, 1e5)
    for part in NewtonMStep()(nothing, problem.basis, begin, 1e5).components:
        assert torch.isfinite(part).all()


def test_gradient_m_step_raises_q_of_every_component(problem, weighted):
    statistics, _ = weighted
    total = problem.size_factors.sum()
    begin = moment_components(statistics, problem.basis, total)
    q = [expected_log_likelihood(statistics, problem.basis, begin)]
    for _ in range(3):
        begin = GradientMStep(lr=1e-2, num_epochs=20)(statistics, problem.basis, begin, total).components
        q.append(expected_log_likelihood(statistics, problem.basis, begin))
    assert (torch.stack(q).diff(dim=0) > 0).all()


def test_gradient_m_step_comes_to_where_newton_comes(problem, weighted):
    statistics, _ = weighted
    total = problem.size_factors.sum()
    begin = moment_components(statistics, problem.basis, total)
    newton = NewtonMStep()(statistics, problem.basis, begin, total).components
    adam = GradientMStep(lr=0.05, num_epochs=1_000)(statistics, problem.basis, begin, total).components
    gap = q_per_problem(statistics, problem.basis, newton) - q_per_problem(statistics, problem.basis, adam)
    assert gap.abs().max() < 0.01


def test_gradient_m_step_stays_within_the_bounds(problem, weighted):
    statistics, _ = weighted
    total = problem.size_factors.sum()
    begin = moment_components(statistics, problem.basis, total)
    log_mean, log_inv_disp = GradientMStep(lr=5.0, num_epochs=10)(
        statistics, problem.basis, begin, total
    ).components
    assert log_mean.min() >= lowest_log_mean(total)
    assert LOG_INV_DISP_RANGE[0] <= log_inv_disp.min() <= log_inv_disp.max() <= LOG_INV_DISP_RANGE[1]

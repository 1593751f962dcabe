"""The compiled Newton against the same in torch."""

from __future__ import annotations

import pytest
import torch

from nbmix.core.expected_log_likelihood import ExpectedLogLikelihood
from nbmix.core.m_step import MStepProblem, NewtonMStep, moment_components
from nbmix.core.parameters import LOG_INV_DISP_RANGE, Components, lowest_log_mean
from tests.helpers.cases import CASES, Case, a_prior, random_components


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


def q_of(case, components, prior):
    """(K, genes), in torch."""
    problem = ExpectedLogLikelihood.of(case.statistics, case.basis, prior)
    return problem.value(*(t.flatten() for t in components)).view(case.n_components, -1)


@pytest.mark.parametrize("start", ["moments", "anywhere"])
@pytest.mark.parametrize("with_prior", [False, True])
def test_compiled_newton_comes_to_where_torch_comes(case, with_prior, start):
    prior = a_prior(case.n_genes) if with_prior else None
    if start == "moments":
        begin = moment_components(case.statistics, case.basis, case.total)
    else:
        begin = random_components(case.n_components, case.n_genes, 7)
    before = [t.clone() for t in begin]
    newton = NewtonMStep()
    floor = lowest_log_mean(case.total)
    inside = Components(begin.log_mean.clamp(min=floor), begin.log_inv_disp.clamp(*LOG_INV_DISP_RANGE))
    was = q_of(case, inside, prior)
    found, _ = newton(case.statistics, case.basis, begin, case.total, prior)
    task = MStepProblem(case.statistics, begin, prior)
    theirs = newton.together([task], case.basis, case.total)[0].components
    mine, other = q_of(case, found, prior), q_of(case, theirs, prior)
    rounding = 1e-11 * (mine.abs() + 1)
    assert ((mine - other).abs() <= newton.tolerance + rounding).all()
    assert (mine >= was - rounding).all()
    assert all(torch.equal(t, kept) for t, kept in zip(begin, before, strict=True))


@pytest.mark.parametrize("max_steps", [1, 2, 5])
def test_compiled_newton_takes_the_steps_of_torch(case, max_steps):
    begin = random_components(case.n_components, case.n_genes, 5)
    newton = NewtonMStep(max_steps=max_steps)
    arguments = (case.statistics, case.basis, begin, case.total, a_prior(case.n_genes))
    task = MStepProblem(case.statistics, begin, a_prior(case.n_genes))
    (fit,) = newton.together([task], case.basis, case.total)
    for mine, theirs in zip(newton(*arguments).components, fit.components, strict=True):
        # a step that is worse by a rounding in one of them is taken in the other
        same = (mine - theirs).abs() < 1e-6 * (1 + theirs.abs())
        assert same.double().mean() > 0.99


def test_what_newton_could_still_gain_is_of_the_size_of_its_tolerance(case):
    prior = a_prior(case.n_genes)
    begin = random_components(case.n_components, case.n_genes, 3)
    arguments = (case.statistics, case.basis, begin, case.total, prior)
    found, curve = NewtonMStep()(*arguments)
    best, _ = NewtonMStep(tolerance=1e-10)(*arguments)
    at_end = q_of(case, found, prior)
    near = (best.log_mean - found.log_mean).abs() < 0.3  # elsewhere it came to another maximum
    assert near.double().mean() > 0.9
    assert (q_of(case, best, prior) - at_end)[near].max() < 5e-5
    assert (curve.value - at_end).abs().max() < 1e-3

"""The compiled Q and its derivatives against the same in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbmix.core.expected_log_likelihood import ExpectedLogLikelihood, curvature, slope
from nbmix.core.parameters import LOG_INV_DISP_RANGE, Components
from nbmix.core.tables import (
    likelihood_tables,
)
from tests.helpers.cases import CASES, Case, a_prior, random_components
from tests.helpers.elsewhere import back, elsewhere


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


def test_the_cases_hold_high_counts_and_silent_genes():
    assert Case("plain").basis.levels.n_high > 10
    assert Case("high counts").basis.levels.n_high > 300
    assert not np.diff(Case("plain").basis.levels.first)[0]


def assert_same_curvature(case, prior, components):
    flat = ExpectedLogLikelihood.of(case.statistics, case.basis, prior).curvature(
        *(t.flatten() for t in components)
    )
    got = curvature(case.statistics, case.basis, components, prior)
    want = [t.view(case.n_components, -1) for t in flat]
    scale = want[0].abs() + 1
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == torch.float64
        assert ((mine - theirs).abs() / scale).max() < 1e-11


@pytest.mark.parametrize("with_prior", [False, True])
def test_compiled_curvature_is_that_of_torch(case, with_prior):
    prior = a_prior(case.n_genes) if with_prior else None
    for seed in range(3):
        assert_same_curvature(case, prior, random_components(case.n_components, case.n_genes, seed))


@pytest.mark.parametrize("log_inv_disp", LOG_INV_DISP_RANGE)
@pytest.mark.parametrize("log_mean", [-30.0, -9.0, 5.0])
def test_compiled_curvature_is_that_of_torch_at_the_bounds(log_mean, log_inv_disp):
    case = Case("high counts")
    shape = (case.n_components, case.n_genes)
    a, b = (torch.full(shape, value, dtype=torch.float64) for value in (log_mean, log_inv_disp))
    assert_same_curvature(case, None, Components(a, b))


def test_curvature_on_other_devices_is_the_same():
    case = Case("plain")
    components = random_components(case.n_components, case.n_genes)
    there = Components(*(elsewhere(t) for t in components))
    got = curvature(case.statistics, case.basis, there, a_prior(case.n_genes))
    want = curvature(case.statistics, case.basis, components, a_prior(case.n_genes))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(back(mine), theirs, rtol=1e-9, atol=1e-6)


def test_the_compiled_slope_is_the_gradient_of_q(case):
    for seed in range(3):
        components = random_components(case.n_components, case.n_genes, seed)
        tables = likelihood_tables(case.basis, *components)
        want = curvature(case.statistics, case.basis, components)
        there = Components(*(elsewhere(t) for t in components))
        for given in (components, there):
            got = slope(case.statistics, case.basis, given, tables)
            for mine, theirs in zip(got, (want.grad_a, want.grad_b), strict=True):
                assert ((back(mine) - theirs).abs() / (want.value.abs() + 1)).max() < 1e-11

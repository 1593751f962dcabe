from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.special import gammaln

from nbmix.core.special import EXACT_COUNT, level_curve, level_terms, log_rising_ratio, tail_curve, tail_terms

LOG_INV_DISP = [-8.0, -3.5, -1.0, 0.0, 0.3, 2.0, 3.0, 5.5, 9.0, 12.0]
COUNTS = [0, 1, 2, 3, 7, 19, 20, 21, 22, 35, 100, 1_000, 12_345, 100_000]


def exact(count, log_inv_disp):
    """D(c, r) with 60 digits."""
    with mpmath.workdps(60):
        r = mpmath.exp(mpmath.mpf(log_inv_disp))
        return float(mpmath.loggamma(count + r) - mpmath.loggamma(r) - count * mpmath.log(r))


def exact_derivatives(count, log_inv_disp):
    """dD/db and d2D/db2 with 60 digits: psi and psi' against b = ln r."""
    with mpmath.workdps(60):
        r = mpmath.exp(mpmath.mpf(log_inv_disp))
        slope = r * (mpmath.psi(0, count + r) - mpmath.psi(0, r))
        bend = r * r * (mpmath.psi(1, count + r) - mpmath.psi(1, r))
        return float(slope - count), float(slope + bend)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("count", COUNTS)
def test_log_rising_ratio_equals_sixty_digits(count):
    b = float64(LOG_INV_DISP)
    want = [exact(count, v) for v in LOG_INV_DISP]
    np.testing.assert_allclose(log_rising_ratio(torch.tensor(count), b), want, rtol=1e-12, atol=1e-15)


def test_log_rising_ratio_is_exactly_zero_for_zero_and_one():
    b = float64(LOG_INV_DISP)
    assert (log_rising_ratio(torch.tensor([[0], [1]]), b) == 0).all()


def test_log_rising_ratio_equals_scipy_where_scipy_does_not_cancel():
    count = torch.arange(0, 2_000)
    b = float64([-8.0, -2.0, 0.0, 2.0])
    c, r = count[:, None].numpy(), np.exp(b.numpy())
    want = gammaln(c + r) - gammaln(r) - c * b.numpy()
    np.testing.assert_allclose(log_rising_ratio(count[:, None], b), want, rtol=1e-10, atol=1e-11)


def test_log_rising_ratio_keeps_its_digits_at_inverse_dispersions_of_1e8():
    b = math.log(1e8)
    for count in (2, 20, 1_000):
        got = float(log_rising_ratio(torch.tensor(count), float64(b)))
        assert got == pytest.approx(exact(count, b), rel=1e-8)


def test_one_more_count_adds_the_next_level_also_across_the_change_of_formula():
    """D(c + 1, r) - D(c, r) = ln(1 + c / r): no jump where the sum gives way to the series."""
    b = float64(LOG_INV_DISP)
    count = torch.arange(EXACT_COUNT - 4, EXACT_COUNT + 5, dtype=torch.float64)[:, None]
    got = log_rising_ratio(count + 1, b) - log_rising_ratio(count, b)
    np.testing.assert_allclose(got, level_terms(count, b), rtol=1e-9, atol=1e-13)


def test_tail_is_zero_with_zero_slope_at_exact_count():
    b = float64(LOG_INV_DISP)
    tail = tail_curve(float64(EXACT_COUNT), b)
    for term in tail:
        np.testing.assert_allclose(term, 0, atol=1e-13)


@pytest.mark.parametrize("count", [c for c in COUNTS if c > EXACT_COUNT])
def test_tail_derivatives_equal_sixty_digits(count):
    got = tail_curve(float64(count), float64(LOG_INV_DISP))
    for i, b in enumerate(LOG_INV_DISP):
        whole, low = exact_derivatives(count, b), exact_derivatives(EXACT_COUNT, b)
        assert float(got.value[i]) == pytest.approx(exact(count, b) - exact(EXACT_COUNT, b), rel=1e-11)
        assert float(got.first[i]) == pytest.approx(whole[0] - low[0], rel=1e-8, abs=1e-11)
        assert float(got.second[i]) == pytest.approx(whole[1] - low[1], rel=1e-8, abs=1e-11)


@pytest.mark.parametrize("curve", [level_curve, tail_curve])
def test_derivatives_equal_autograd(curve):
    count = float64([[21.0], [25.0], [300.0], [20_000.0]])
    b = float64([-6.0, -1.0, 0.5, 3.0, 6.0]).expand(4, 5).clone().requires_grad_()
    got = curve(count, b)
    (first,) = torch.autograd.grad(got.value.sum(), b, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), b)
    torch.testing.assert_close(got.first, first, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got.second, second, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("count", [2, 5, 20])
def test_level_derivatives_add_up_to_the_derivatives_of_the_count(count):
    b = float64(LOG_INV_DISP)
    curve = level_curve(torch.arange(1, count, dtype=torch.float64)[:, None], b)
    want = np.array([exact_derivatives(count, v) for v in LOG_INV_DISP])
    np.testing.assert_allclose(curve.first.sum(0), want[:, 0], rtol=1e-12)
    np.testing.assert_allclose(curve.second.sum(0), want[:, 1], rtol=1e-11)


def test_value_of_the_curves_is_the_plain_function():
    b = float64(LOG_INV_DISP)
    assert torch.equal(level_curve(float64(7), b).value, level_terms(float64(7), b))
    assert torch.equal(tail_curve(float64(77), b).value, tail_terms(float64(77), b))

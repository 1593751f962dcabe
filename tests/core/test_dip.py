"""The dip against its definition as a linear programme, and published quantiles."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.optimize import linprog

from nbmix.core.dip import LEVELS, QUANTILES, SIZES, dip, dip_p_value, null_quantiles


def dip_by_definition(x: np.ndarray) -> float:
    """min over modes m and unimodal G of sup |F - G|, a linear programme for each m of the numbers."""
    x = np.sort(x)
    return max(0.5 / x.size, min(distance_with_mode(x, m) for m in range(x.size)))


def distance_with_mode(x: np.ndarray, m: int) -> float:
    """G is piecewise linear; it may jump at x_m, so it has two heights there, the left and the right one."""
    n = x.size
    at = np.concatenate([x[: m + 1], x[m:]])
    rank = np.concatenate([np.arange(m + 1), np.arange(m, n)])
    before, after = rank / n, (rank + 1) / n
    after[m], before[m + 1] = before[m], after[m + 1]
    rows, bounds = [], []

    def at_most(coefficients: dict[int, float], bound: float) -> None:
        row = np.zeros(n + 2)
        row[list(coefficients)] = list(coefficients.values())
        rows.append(row)
        bounds.append(bound)

    for k in range(n + 1):
        at_most({k: -1, n + 1: -1}, -after[k])
        at_most({k: 1, n + 1: -1}, before[k])
    for k in range(n):
        at_most({k: 1, k + 1: -1}, 0)
    for k in [*range(1, m), *range(m + 2, n)]:
        left, right, sign = 1 / (at[k] - at[k - 1]), 1 / (at[k + 1] - at[k]), 1 if k < m else -1
        at_most({k - 1: -sign * left, k: sign * (left + right), k + 1: -sign * right}, 0)
    cost = np.zeros(n + 2)
    cost[-1] = 1
    found = linprog(cost, A_ub=np.array(rows), b_ub=bounds, bounds=[(None, None)] * (n + 1) + [(0, None)])
    return found.fun


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 13, 20])
def test_dip_is_the_distance_to_the_nearest_unimodal_distribution(n):
    rng = np.random.default_rng(n)
    for shift in (0.0, 2.0, 6.0):
        for _ in range(3):
            x = rng.normal(size=n) + shift * (rng.random(n) < 0.5)
            assert dip(x) == pytest.approx(dip_by_definition(x), abs=1e-7)


def test_dip_of_examples_in_the_literature():
    assert dip(np.array([1, 1, 2, 2])) == pytest.approx(1 / 4)  # the largest there is
    assert dip(np.cumsum(np.arange(4))) == pytest.approx(1 / 8)  # 1 / (2n), the least for n numbers
    assert dip(np.array([0, 2, 3, 5, 6])) == pytest.approx(dip(6 - np.array([0, 2, 3, 5, 6])))


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_equal_numbers_have_one_mode(n):
    assert dip(np.full(n, 3.0)) == pytest.approx(0.5 / n)
    assert dip_p_value(0.5 / n, n) == 1


def test_dip_does_not_depend_on_order_scale_and_direction():
    x = np.random.default_rng(0).normal(size=101)
    x[50:] += 4
    assert dip(x) == pytest.approx(dip(x[::-1]))
    assert dip(x) == pytest.approx(dip(-3e5 * x + 7), abs=1e-6)


def test_dip_of_ties_is_that_of_close_numbers():
    x = np.random.default_rng(0).integers(0, 12, 200)
    spread = np.sort(x) + 1e-6 * np.arange(200)
    assert dip(x) == pytest.approx(dip(spread), abs=1e-4)


# 0.5, 0.9, 0.95, 0.99 and 0.999 quantiles by Maechler's R package diptest (1,000,001 samples)
PUBLISHED = {
    10: [0.0977818, 0.1304621, 0.1396114, 0.1596842, 0.1806112],
    50: [0.0488512, 0.0649136, 0.0702739, 0.0811998, 0.0940930],
    200: [0.0255844, 0.0339968, 0.0368418, 0.0426865, 0.0497198],
    1000: [0.0117439, 0.0156148, 0.0169344, 0.0196080, 0.0228689],
}


@pytest.mark.parametrize("n", PUBLISHED)
def test_p_values_are_those_of_published_quantiles(n):
    for quantile, p in zip(PUBLISHED[n], [0.5, 0.1, 0.05, 0.01, 0.001], strict=True):
        assert dip_p_value(quantile, n) == pytest.approx(p, rel=0.1)


def test_p_values_fall_with_the_dip_and_with_n():
    for n in (6, 30, 300, 3000):
        p = [dip_p_value(t, n) for t in np.linspace(0.5 / n, 0.25, 200)]
        assert p[0] == 1 and (np.diff(p) <= 0).all() and p[-1] >= 0
    assert (np.diff([dip_p_value(0.06, n) for n in range(20, 400)]) < 0).all()


@pytest.mark.parametrize("n", [10, 28, 130])
def test_p_values_are_uniform_under_a_uniform_distribution(n):
    rng = np.random.default_rng(n)
    p = np.array([dip_p_value(dip(rng.random(n)), n) for _ in range(4000)])
    for level in (0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.9):
        assert (p <= level).mean() == pytest.approx(level, abs=5 * np.sqrt(level * (1 - level) / 4000))


@pytest.mark.parametrize("draw", ["normal", "exponential", "laplace"])
def test_p_values_hold_for_other_distributions_with_one_mode(draw):
    rng = np.random.default_rng(0)
    p = np.array([dip_p_value(dip(getattr(rng, draw)(size=60)), 60) for _ in range(500)])
    assert (p < 0.05).mean() < 0.05


def test_table_is_what_it_says():
    row = list(SIZES).index(14)
    drawn = null_quantiles(14, LEVELS, 20_000, np.random.default_rng(1))
    np.testing.assert_allclose(drawn, QUANTILES[row], rtol=0.03)


def test_dip_is_fast():
    x = np.random.default_rng(0).random(1600)
    dip(x)
    start = time.perf_counter()
    for _ in range(20):
        dip(x)
    assert (time.perf_counter() - start) / 20 < 0.005

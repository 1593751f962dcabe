"""Separation of two sides, and gaps between them, on log likelihood ratios of known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import nnls
from scipy.spatial.distance import cdist

from nbmix.core.separation import (
    FEWEST_CELLS,
    WIDEST,
    gap_p_value,
    neighbours,
    ratio_space,
    separation,
    standardised,
    window,
)


def halves(draw, n: int = 4000, share: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One distribution's numbers, with its upper ``share`` the first side, and the boundary at 0."""
    x = draw(np.random.default_rng(seed), n)
    x = x - np.quantile(x, 1 - share)
    return x, x > 0


DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "uniform": lambda rng, n: rng.random(n),
    "exponential": lambda rng, n: rng.exponential(size=n),
    "heavy tails": lambda rng, n: rng.standard_t(4, size=n),
}


@pytest.mark.parametrize(
    ("name", "distance"),
    [("normal", 2 * math.sqrt(2 / math.pi) / math.sqrt(1 - 2 / math.pi)), ("uniform", math.sqrt(12))],
)
def test_separation_of_halves_has_a_zero_of_its_own(name, distance):
    d, first = halves(DISTRIBUTIONS[name], 200_000)
    assert separation(d, first, np.ones(d.size), 1.0) == pytest.approx(distance, rel=0.01)


def by_depth(size_factors: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two sides with slopes 3 and -2 nats a unit of depth, and noise of variance 4 a unit."""
    rng = np.random.default_rng(seed)
    first = rng.random(size_factors.size) < 0.4
    d = np.where(first, 3.0, -2.0) * size_factors + 2 * np.sqrt(size_factors) * rng.normal(size=first.size)
    return d, first


def test_separation_takes_depth_out():
    rng = np.random.default_rng(1)
    narrow, wide = np.full(50_000, 4.0), 4 * rng.lognormal(0, 1, 50_000)
    for s in (narrow, wide):
        assert separation(*by_depth(s), s, 4.0) == pytest.approx(5 * 4 / math.sqrt(4 * 4), rel=0.02)


def test_the_unit_of_size_factors_does_not_matter():
    s = np.random.default_rng(1).lognormal(0, 0.7, 2000)
    d, first = by_depth(s)
    assert separation(d, first, 1e4 * s, 1e4 * 1.5) == pytest.approx(separation(d, first, s, 1.5))
    assert gap_p_value(d, first, 1e4 * s) == pytest.approx(gap_p_value(d, first, s))


def test_swapping_sides_changes_nothing():
    s = np.random.default_rng(1).lognormal(0, 0.7, 999)
    d, first = by_depth(s)
    assert separation(-d, ~first, s, 1.5) == pytest.approx(separation(d, first, s, 1.5))
    assert gap_p_value(-d, ~first, s) == pytest.approx(gap_p_value(d, first, s))


def test_separation_of_few_cells():
    one = np.ones(2)
    assert separation(np.array([5.0, -5.0]), np.array([True, False]), one, 1.0) == WIDEST
    assert separation(np.array([5.0, 4.0]), np.array([True, True]), one, 1.0) == 0
    assert separation(np.array([-5.0, 5.0]), np.array([True, False]), one, 1.0) == 0
    assert separation(np.zeros(2), np.array([True, False]), one, 1.0) == 0
    few = np.repeat([True, False], FEWEST_CELLS - 1)
    assert gap_p_value(np.where(few, 9.0, -9.0), few, np.ones(few.size)) == 1


def test_standardised_ratios_have_noise_of_variance_1_at_every_depth():
    rng = np.random.default_rng(0)
    s = rng.lognormal(0, 0.8, 100_000)
    first = rng.random(s.size) < 0.5
    noise = rng.normal(size=s.size) * np.sqrt(2 * s + 0.5 * s**2)
    mean = np.where(first, 4, -4) * s
    z = standardised(mean + noise, first, s)
    scale = z / (mean + noise)
    for low in (0.0, 0.5, 1.0, 2.0):
        here = (s > low) & (s < low * 2 + 0.5)
        assert (scale * noise)[here].std() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, 3.0])
def test_variances_are_those_of_nonnegative_least_squares(power):
    rng = np.random.default_rng(3)
    s = rng.lognormal(0, 0.5, 400)
    first = rng.random(400) < 0.3
    d = np.where(first, 5.0, -3.0) * s + rng.normal(size=400) * np.sqrt(s**power)
    t = s / np.median(s)
    residual = d - np.where(first, d[first].sum() / s[first].sum(), d[~first].sum() / s[~first].sum()) * s
    want, _ = nnls(np.column_stack([np.ones_like(t), t]), residual**2 / t)
    np.testing.assert_allclose(standardised(d, first, s), d / np.sqrt(want[0] * t + want[1] * t**2))


def test_standardised_ratios_without_noise_are_finite():
    s = np.array([1.0, 2.0, 1.0, 2.0])
    first = np.array([True, True, False, False])
    assert np.isfinite(standardised(np.where(first, s, -s), first, s)).all()


def test_window_has_the_cells_next_to_the_boundary():
    z = np.array([-5.0, -3, -2, -1, 1, 2])
    np.testing.assert_array_equal(window(z, z > 0), [-2, -1, 1, 2])
    np.testing.assert_array_equal(window(z, z > 0, most=1), [-1, 1])
    np.testing.assert_array_equal(window(-z, z < 0), -window(z, z > 0)[::-1])
    assert window(np.linspace(-1, 1, 5000), np.linspace(-1, 1, 5000) > 0, most=40).size == 80


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
def test_a_cut_through_one_mode_is_no_gap(name, share):
    p = [gap_p_value(*halves(DISTRIBUTIONS[name], 1000, share, seed), np.ones(1000)) for seed in range(60)]
    assert np.mean(np.array(p) < 0.05) < 0.15  # 0.05 for the uniform, far less for others
    assert np.mean(np.array(p) < 0.001) < 0.02


@pytest.mark.parametrize("n_first", [20, 100, 1000])
def test_two_modes_are_a_gap(n_first):
    rng = np.random.default_rng(0)
    first = np.arange(2000) < n_first
    s = rng.lognormal(0, 0.4, 2000)
    d = np.where(first, 5.0, -5.0) * s + np.sqrt(s) * rng.normal(size=2000)
    assert gap_p_value(d, first, s) < 1e-3


def test_ratio_space_is_white_within_components_and_turns_with_them():
    rng = np.random.default_rng(0)
    s = rng.lognormal(0, 0.5, 3000)
    label = rng.integers(0, 4, 3000)
    mixing = np.eye(4) + 0.3 * rng.normal(size=(4, 4))
    noise = np.sqrt(s)[:, None] * rng.normal(size=(3000, 4)) @ mixing
    ll = 10 * s[:, None] * np.eye(4)[label] + noise + rng.normal(size=(3000, 1))
    points = ratio_space(ll, s, label)
    assert points.shape == (3000, 3)
    centred = points.copy()
    for c in range(4):
        mine = label == c
        centred[mine] -= np.average(points[mine], axis=0, weights=s[mine])
    np.testing.assert_allclose((s[:, None] * centred).T @ centred / s.sum(), np.eye(3), atol=0.05)
    order = np.array([2, 0, 3, 1])
    turned = ratio_space(ll[:, order], s, np.argsort(order)[label])
    np.testing.assert_allclose(cdist(points[:50], points[:50]), cdist(turned[:50], turned[:50]), atol=1e-8)
    deeper = ratio_space(ll, 100 * s, label)  # the same but for the unit
    np.testing.assert_allclose(cdist(points[:50], points[:50]), cdist(deeper[:50], deeper[:50]), atol=1e-8)


def test_neighbours_are_the_nearest_others():
    points = np.random.default_rng(0).normal(size=(60, 3))
    distance = cdist(points, points)
    np.fill_diagonal(distance, np.inf)
    np.testing.assert_array_equal(neighbours(points, 7), np.argsort(distance, axis=1)[:, :7])


def test_neighbours_of_few_cells_and_of_cells_in_one_place():
    assert neighbours(np.zeros((1, 2)), 5).shape == (1, 0)
    np.testing.assert_array_equal(neighbours(np.array([[0.0], [1.0]]), 5), [[1], [0]])
    found = neighbours(np.zeros((30, 2)), 5)
    assert found.shape == (30, 5)
    assert (found != np.arange(30)[:, None]).all()

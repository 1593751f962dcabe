from __future__ import annotations

import itertools
import math
import warnings

import mpmath
import numpy as np
import pytest
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import psi
from scipy.stats import nbinom, poisson

from nbmix.errors import InputError
from nbmix.genes.em import Gene, fit_pois_gam, fit_pois_log, pois_gam_step, pois_log_step, shape_of_gap
from tests.helpers.problems import reference_log_likelihood

FITS = [fit_pois_gam, fit_pois_log]


def log_likelihood(x, s, log_mean, log_inv_disp):
    return reference_log_likelihood(x[:, None], s, [[log_mean]], [[log_inv_disp]]).sum()


def simulated(seed, log_mean, log_inv_disp, s):
    """As in the source notebook."""
    rng = np.random.default_rng(seed)
    scale = np.exp(log_mean - log_inv_disp)
    return rng.poisson(s * rng.gamma(shape=np.exp(log_inv_disp), scale=scale, size=len(s)))


def example(unequal=False):
    s = np.full(100, 1e5)
    if unequal:
        s *= np.exp(np.random.default_rng(7).normal(0, 0.7, 100))
    return simulated(1, -10, 0, s), s


def maximum_for_equal_size_factors(x, s):
    """By SciPy, over ln r at the mean of the counts, which is the maximum's; or the Poisson's."""
    mean = x.mean()

    def profile(b):
        return -log_likelihood(x, np.ones(len(x)), np.log(mean), b)

    grid = np.linspace(-4, 10, 29)
    best = grid[np.argmin([profile(b) for b in grid])]
    found = minimize_scalar(
        profile, bounds=(best - 0.5, best + 0.5), method="bounded", options={"xatol": 1e-8}
    )
    return max(-found.fun, poisson(mean).logpmf(x).sum())


def maximum(x, s):
    """By SciPy from several starts, and the Poisson."""
    mean = x.sum() / s.sum()
    values = [poisson(s * mean).logpmf(x).sum()]
    for start in np.linspace(-8, 8, 9):
        found = minimize(
            lambda at: -log_likelihood(x, s, *at),
            [np.log(mean), start],
            method="L-BFGS-B",
            bounds=[(-20, 20), (-15, 12)],
        )
        values.append(-found.fun)
    return max(values)


# ---- maxima ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", FITS)
def test_the_example_of_the_source_ends_at_the_maximum(fit):
    x, s = example()
    log_mean, log_inv_disp, trace = fit(x, s)
    assert trace[-1] == pytest.approx(-262.8367378806, abs=1e-9)
    assert trace[-1] == pytest.approx(maximum_for_equal_size_factors(x, s), abs=1e-8)
    assert trace[-1] == pytest.approx(log_likelihood(x, s, log_mean, log_inv_disp), abs=1e-9)
    assert log_mean == pytest.approx(np.log(x.mean() / 1e5), abs=1e-9)
    assert (np.diff(trace) >= 0).all()


def assert_climbs_to(highest, fit, x, s):
    trace = fit(x, s).trace
    assert (np.diff(trace) >= 0).all()
    assert trace[-1] > highest - 1e-6


def test_all_fits_of_the_source_s_grid_climb_to_the_maximum():
    s = np.full(100, 1e5)
    grid = itertools.product(range(5), np.linspace(-12, -6, 7), np.linspace(0, 4, 5))
    for trial, log_mean, log_inv_disp in grid:
        x = simulated(trial, log_mean, log_inv_disp, s)
        highest = maximum_for_equal_size_factors(x, s)
        for fit in FITS:
            assert_climbs_to(highest, fit, x, s)


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_unequal_size_factors_climb_to_the_highest_maximum(spread):
    for seed in range(15):
        rng = np.random.default_rng(seed)
        s = np.exp(rng.normal(2, spread, rng.choice([3, 10, 100])))
        x = simulated(seed, rng.uniform(-2, 2), rng.uniform(-3, 5), s)
        x[0] += 1
        highest = maximum(x, s)
        for fit in FITS:
            assert_climbs_to(highest, fit, x, s)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("unequal", [False, True])
def test_em_alone_climbs_to_the_same_maximum(fit, unequal):
    x, s = example(unequal)
    plain, fast = fit(x, s, accelerate=False), fit(x, s)
    assert (np.diff(plain.trace) >= 0).all()
    assert plain.trace[-1] == pytest.approx(fast.trace[-1], abs=1e-8)
    assert plain[:2] == pytest.approx(fast[:2], abs=1e-4)
    assert len(fast.trace) < len(plain.trace)


# ---- steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unequal", [False, True])
def test_a_poisson_gamma_step_is_the_complete_m_step(unequal):
    x, s = example(unequal)
    a, b = -10.5, 0.7
    shape, rate = x + np.exp(b), s + np.exp(b - a)
    mean, mean_log = (shape / rate).mean(), (psi(shape) - np.log(rate)).mean()
    r = brentq(lambda r: np.log(r) - psi(r) - np.log(mean) + mean_log, 1e-3, 1e3, xtol=1e-13)
    gene = Gene.checked(x, s)
    assert pois_gam_step(gene, gene.at(a, b)) == pytest.approx((np.log(mean), np.log(r)), rel=1e-10)


def test_a_poisson_log_step_is_adamidis_s():
    x, s = example()
    a, b = -10.5, 0.7
    r, odds = np.exp(b), 1e5 * np.exp(a - b)
    theta = odds / (1 + odds)
    clusters = r * (psi(x + r) - psi(r))
    z = -1 / np.log(1 - theta) - (1 - theta) / theta
    above, below = (x - clusters).sum(), clusters.sum() * z
    theta = above / (above + below)
    r = clusters.mean() / -np.log(1 - theta)
    want = np.log(r * theta / (1 - theta) / 1e5), np.log(r)
    gene = Gene.checked(x, s)
    assert pois_log_step(gene, gene.at(a, b)) == pytest.approx(want, rel=1e-10)


def test_a_poisson_log_step_with_unequal_size_factors_is_two_steps_that_climb():
    x, s = example(unequal=True)
    a, b = -10.5, 0.7
    r, rho = np.exp(b), np.exp(a - b)
    r = (r * (psi(x + r) - psi(r))).sum() / np.log1p(s * rho).sum()
    mean = ((x + r) / (s + 1 / rho)).mean()
    values = [
        log_likelihood(x, s, *point)
        for point in [(a, b), (np.log(r * rho), np.log(r)), (np.log(mean), np.log(r))]
    ]
    assert values[0] < values[1] < values[2]
    gene = Gene.checked(x, s)
    assert pois_log_step(gene, gene.at(a, b)) == pytest.approx((np.log(mean), np.log(r)), rel=1e-10)


@pytest.mark.parametrize("log_inv_disp", [-3.0, 0.0, 4.0])
def test_expected_clusters_equal_enumeration(log_inv_disp):
    """p(m, x) from the Poisson and the m-fold convolution of the Log distribution."""
    theta, largest = 0.6, 12
    r = math.exp(log_inv_disp)
    rate = -r * math.log(1 - theta)
    pmf = [0.0] + [-(theta**y) / y / math.log(1 - theta) for y in range(1, largest + 1)]
    sums = np.eye(1, largest + 1)[0]  # of 0 clusters
    joint = []
    for m in range(largest + 1):
        joint.append(sums * math.exp(-rate) * rate**m / math.factorial(m))
        sums = np.convolve(sums, pmf)[: largest + 1]
    joint = np.array(joint)  # (m, x)
    np.testing.assert_allclose(joint.sum(0), nbinom(r, 1 - theta).pmf(np.arange(largest + 1)), rtol=1e-12)
    want = (np.arange(largest + 1) @ joint) / joint.sum(0)
    got = [Gene.checked([x, 1], 1.0).at(0.0, log_inv_disp).clusters - 1 for x in range(largest + 1)]
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("r", [1e-6, 0.1, 1.0, 30.0, 9e4, 1.1e5, 1e9])
def test_shape_of_gap_inverts_the_gap(r):
    with mpmath.workdps(40):
        gap = float(mpmath.log(r) - mpmath.digamma(r))
    assert shape_of_gap(gap) == pytest.approx(r, rel=1e-9)


@pytest.mark.parametrize("log_inv_disp", [12.0, 20.0])
def test_steps_close_to_the_poisson(log_inv_disp):
    """To first order in phi Poisson-Gamma's keeps r, Poisson-Log's gives r mean(x)^2 / mean(x (x - 1))."""
    gene = Gene.checked([0, 1, 2, 1], 10.0)
    at = gene.at(np.log(0.1), log_inv_disp)
    assert pois_gam_step(gene, at) == pytest.approx((np.log(0.1), log_inv_disp), abs=1e-4)
    assert pois_log_step(gene, at) == pytest.approx((np.log(0.1), log_inv_disp + np.log(2)), abs=1e-4)


# ---- the log likelihood ------------------------------------------------------------------------------


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("log_inv_disp", [-5.0, 0.0, 6.0])
@pytest.mark.parametrize("largest", [1, 30, 5_000, 100_000])
def test_the_log_likelihood_and_its_derivatives(unequal, log_inv_disp, largest):
    x, s = example(unequal)
    x[:3] = largest, 1, 0
    gene = Gene.checked(x, s)
    at = gene.at(-9.0, log_inv_disp)
    r = np.exp(log_inv_disp)
    want = nbinom(n=r, p=1 / (1 + s * np.exp(-9.0 - log_inv_disp))).logpmf(x).sum()
    assert at.value == pytest.approx(want, rel=1e-10)
    h = 1e-4
    up, down = gene.at(-9.0 + h, log_inv_disp), gene.at(-9.0 - h, log_inv_disp)
    right, left = gene.at(-9.0, log_inv_disp + h), gene.at(-9.0, log_inv_disp - h)
    near = {"rel": 1e-5, "abs": 1e-4}
    assert at.grad_a == pytest.approx((up.value - down.value) / (2 * h), **near)
    assert at.grad_b == pytest.approx((right.value - left.value) / (2 * h), **near)
    assert at.hess_aa == pytest.approx((up.grad_a - down.grad_a) / (2 * h), **near)
    assert at.hess_ab == pytest.approx((up.grad_b - down.grad_b) / (2 * h), **near)
    assert at.hess_bb == pytest.approx((right.grad_b - left.grad_b) / (2 * h), **near)


@pytest.mark.parametrize("fit", FITS)
def test_large_counts(fit):
    x, s = np.array([100_000, 5, 20, 0, 7_000]), np.ones(5)
    assert fit(x, s).trace[-1] == pytest.approx(maximum_for_equal_size_factors(x, s), abs=1e-6)


# ---- without a maximum -------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("x", "s"),
    [
        ([2, 2, 3], [1.0, 1.0, 1.0]),
        ([5], [2.0]),
        ([0, 1, 1, 0], [3.0, 3.0, 3.0, 3.0]),
        ([1, 2, 8, 16], [1.0, 2.0, 8.0, 16.0]),
        ([0, 1, 0, 1], [1.0, 9.0, 0.5, 9.0]),
    ],
)
@pytest.mark.parametrize("accelerate", [True, False])
def test_underdispersed_counts_are_poisson(fit, x, s, accelerate):
    log_mean, log_inv_disp, trace = fit(x, s, accelerate=accelerate)
    mean = np.sum(x) / np.sum(s)
    assert log_inv_disp == math.inf
    assert log_mean == pytest.approx(np.log(mean), rel=1e-12)
    assert trace[-1] == pytest.approx(poisson(mean * np.array(s)).logpmf(x).sum(), abs=1e-12)
    assert (np.diff(trace) >= 0).all()


@pytest.mark.parametrize("fit", FITS)
def test_a_maximum_away_from_a_poisson_that_is_one_too(fit):
    """The deep cell lies on the mean and pulls to the Poisson, the shallow ones vary."""
    x, s = np.array([1000, *[0, 0, 0, 9, 0, 1, 7, 0, 0, 0] * 2]), np.array([1000.0, *[1.0] * 20])
    assert Gene.checked(x, s).excess() < 0
    assert math.isfinite(fit(x, s).log_inv_disp)
    assert_climbs_to(maximum(x, s), fit, x, s)


@pytest.mark.parametrize("fit", FITS)
def test_a_silent_gene_has_mean_zero(fit):
    log_mean, log_inv_disp, trace = fit([0, 0, 0], [1.0, 2.0, 0.0])
    assert (log_mean, log_inv_disp) == (-math.inf, math.inf)
    assert trace.tolist() == [0.0]


# ---- invariances -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("unequal", [False, True])
def test_cells_without_size_order_and_unit_do_not_matter(fit, unequal):
    x, s = example(unequal)
    want = fit(x, s)
    order = np.random.default_rng(0).permutation(102)
    found = fit(np.append(x, [0, 0])[order], np.append(s, [0.0, 0.0])[order] / 1e3)
    assert found.log_mean == pytest.approx(want.log_mean + np.log(1e3), abs=1e-9)
    assert found.log_inv_disp == pytest.approx(want.log_inv_disp, abs=1e-8)
    np.testing.assert_allclose(found.trace, want.trace, rtol=1e-11)


@pytest.mark.parametrize("fit", FITS)
def test_one_size_factor_serves_all_cells(fit):
    x, s = example()
    want, found = fit(x, s), fit(x.astype(np.float32), 1e5)
    assert found[:2] == want[:2]
    assert found.trace.tolist() == want.trace.tolist()


# ---- input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("x", "s", "message"),
    [
        ([1, -1], 1.0, "x holds negative values"),
        ([1, 0.5], 1.0, "x holds fractional values"),
        ([1, math.nan], 1.0, "x holds NaN"),
        ([1, math.inf], 1.0, "x holds infinite values"),
        (["a"], 1.0, "x holds values of type"),
        ([], 1.0, "x has no cells"),
        ([], [], "x has no cells"),
        (3, 1.0, r"x has shape \(\)"),
        ([[1, 2]], 1.0, r"x has shape \(1, 2\)"),
        ([1, 2], [1.0, 2.0, 3.0], "size_factors holds 3 values for 2 cells"),
        ([1, 2], [1.0, 0.0], "size_factors is 0 for a cell that has counts"),
        ([1, 2], 0.0, "size_factors is 0 for a cell that has counts"),
        ([0, 0], 0.0, "size_factors is 0 for all cells"),
        ([1, 2], -1.0, "size_factors must be finite and not negative"),
        ([1, 2], [1.0, math.nan], "size_factors must be finite and not negative"),
        ([1, 2], math.inf, "size_factors must be finite and not negative"),
    ],
)
def test_unusable_input_is_one_line(fit, x, s, message):
    with pytest.raises(InputError, match=message) as raised:
        fit(x, s)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("fit", FITS)
def test_iterations_are_limited_with_a_warning(fit):
    x, s = example()
    with pytest.warns(UserWarning, match="max_iters=2 ended the fit") as caught:
        found = fit(x, s, max_iters=2, accelerate=False)
    assert caught[0].filename == __file__
    assert len(found.trace) == 3
    with pytest.raises(InputError, match="max_iters=0"):
        fit(x, s, max_iters=0)


@pytest.mark.parametrize("fit", FITS)
def test_a_fit_cut_short_below_the_poisson_is_not_the_poisson(fit):
    x = np.repeat([4, 7, 8, 9, 10, 10, 11, 12, 13, 16], 10)
    x[-1] = 17
    whole = fit(x, 1.0)
    with pytest.warns(UserWarning, match="max_iters=3"):
        short = fit(x, 1.0, max_iters=3, accelerate=False)
    assert short.trace[-1] < poisson(x.mean()).logpmf(x).sum() < whole.trace[-1]
    assert short.log_inv_disp < whole.log_inv_disp < math.inf


@pytest.mark.parametrize("fit", FITS)
def test_no_warning_where_the_last_iteration_is_the_end(fit):
    x, s = example()
    needed = len(fit(x, s).trace) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(fit(x, s, max_iters=needed).trace) == needed + 1

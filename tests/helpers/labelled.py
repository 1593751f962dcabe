"""Labelled counts, and what SciPy says of fits to them."""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import scipy.stats
import torch
from scipy.special import expit, gammaln, psi, xlogy

from nbmix.core.parameters import LOG_INV_DISP_RANGE, lowest_log_mean
from nbmix.genes.supervised import fit_gamma, fit_point, fit_point_gamma

FITS = (fit_point, fit_gamma, fit_point_gamma)


def poisson(x, mean):
    """(genes,) log likelihood of counts (cells, genes)."""
    return scipy.stats.poisson(mean).logpmf(x).sum(0)


def negative_binomial(x, s, log_mean, log_inv_disp):
    """Elementwise, fast enough for SciPy's optimizers; the values of fits are checked by scipy.stats."""
    r, scaled = np.exp(log_inv_disp), s * np.exp(log_mean - log_inv_disp)
    return gammaln(x + r) - gammaln(r) - gammaln(x + 1) + xlogy(x, scaled) - (x + r) * np.log1p(scaled)


def zero_inflated(x, s, log_mean, log_inv_disp, logit_zero):
    count = negative_binomial(x, s, log_mean, log_inv_disp)
    from_count = count - np.logaddexp(0, logit_zero)
    return np.where(x == 0, np.logaddexp(from_count, -np.logaddexp(0, -logit_zero)), from_count)


def best_by_scipy(minus, starts, bounds, jac=None):
    """The largest value that L-BFGS-B finds from several starts."""
    options = {"ftol": 1e-15, "gtol": 1e-9}
    found = [
        scipy.optimize.minimize(minus, at, method="L-BFGS-B", jac=jac, bounds=bounds, options=options)
        for at in starts
    ]
    return -min(result.fun for result in found)


def minus_zero_inflated(at, x, s):
    """Minus the log likelihood of one gene at m, b and l, or at m and b alone; and its gradient.

    m = a - ln(1 + e^l) is the logarithm of the mean of all cells; without l = logit pi, pi is 0.
    """
    b, logit = at[1], at[2] if len(at) == 3 else -np.inf
    a, zero, r = at[0] + np.logaddexp(0, logit), expit(logit), np.exp(at[1])
    scaled = s * np.exp(a - b)
    share, grown = scaled / (1 + scaled), np.log1p(scaled)
    seen = x > 0
    value = -(x + r) * grown
    value[seen] += gammaln(x[seen] + r) - gammaln(r) - gammaln(x[seen] + 1) + x[seen] * np.log(scaled[seen])
    of_a = x - (x + r) * share
    of_b = -r * grown - of_a
    of_b[seen] += r * (psi(x[seen] + r) - psi(r))
    point = np.where(seen, 0, expit(logit - value))  # that a zero is the point mass's
    of_a, of_b = (1 - point) * of_a, (1 - point) * of_b
    value = np.where(seen, value, np.logaddexp(logit, value)) - np.logaddexp(0, logit)
    gradient = [of_a.sum(), of_b.sum(), (point - zero + zero * of_a).sum()]
    return -value.sum(), -np.array(gradient[: len(at)])


def best_gamma(x, s):
    """Of one gene x (cells,)."""
    floor, mean = lowest_log_mean(s.sum()), math.log(x.sum() / s.sum())
    return best_by_scipy(
        lambda at: minus_zero_inflated(at, x, s),
        [(mean, b) for b in (-3.0, 1.0, 6.0, LOG_INV_DISP_RANGE[1])],
        [(floor, 10.0), LOG_INV_DISP_RANGE],
        jac=True,
    )


def best_point_gamma(x, s):
    """Of one gene."""
    floor, mean = lowest_log_mean(s.sum()), math.log(x.sum() / s.sum())
    starts = [(1.0, -2.0), (5.0, 0.0), (3.0, -4.0), (-1.0, 1.0), (12.0, -1.0)]
    inflated = best_by_scipy(
        lambda at: minus_zero_inflated(at, x, s),
        [(mean, *start) for start in starts],
        [(floor, 10.0), LOG_INV_DISP_RANGE, (-25.0, 10.0)],
        jac=True,
    )
    return max(inflated, best_gamma(x, s))


def simulated(n_cells=120, n_genes=12, n_labels=3, seed=0, zero=0.0):
    """Counts, labels "a", "b", ..., and size factors that are not the row sums; gene 0 is silent."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_labels, size=n_cells)
    labels[:n_labels] = np.arange(n_labels)
    s = np.exp(rng.normal(7, 0.5, n_cells))
    mean = np.exp(rng.uniform(-9, -5, (n_labels, n_genes)))
    mean[:, 0] = 0
    r = np.exp(rng.uniform(-1, 3, (n_labels, n_genes)))
    rate = rng.gamma(r[labels], mean[labels] / r[labels]) * (rng.random((n_cells, n_genes)) >= zero)
    return rng.poisson(s[:, None] * rate).astype(float), np.array(list("abcdefgh"))[labels], s


def values(fit, x, labels, s, eta=0.0):
    """(labels, genes) log likelihood of a fit, by SciPy; eta (cells, genes) is ln of what covariates add."""
    code = np.searchsorted(fit.labels, labels)
    log_mean = fit.log_mean.numpy()[code] + eta
    if not hasattr(fit, "log_inv_disp"):
        cells = scipy.stats.poisson(s[:, None] * np.exp(log_mean)).logpmf(x)
    elif not hasattr(fit, "logit_zero"):
        b = fit.log_inv_disp.numpy()[code]
        cells = scipy.stats.nbinom(np.exp(b), 1 / (1 + s[:, None] * np.exp(log_mean - b))).logpmf(x)
    else:
        b, logit = fit.log_inv_disp.numpy()[code], fit.logit_zero.numpy()[code]
        plain = scipy.stats.nbinom(np.exp(b), 1 / (1 + s[:, None] * np.exp(log_mean - b))).logpmf(x)
        cells = np.where(np.isinf(logit), plain, zero_inflated(x, s[:, None], log_mean, b, logit.clip(-99)))
    return np.stack([cells[labels == value].sum(0) for value in fit.labels])


def agrees_with_finite_differences(problem, n_numbers, generator):
    """A problem's curve at random places, against finite differences of its value and gradient."""
    at, h = torch.randn(n_numbers, dtype=torch.float64, generator=generator), 1e-5
    now = problem.curve(at)
    for d in range(at.shape[1]):
        step = torch.zeros_like(at)
        step[:, d] = h
        up, down = problem.curve(at + step), problem.curve(at - step)
        scale = 1 + now.value.abs()
        assert (((up.value - down.value) / (2 * h) - now.gradient[:, d]).abs() / scale).max() < 1e-7
        rows = (up.gradient - down.gradient) / (2 * h)
        assert ((rows - now.hessian[:, d]).abs() / scale[:, None]).max() < 1e-7


def batches(seed=0, n_cells=150):
    """Counts with two covariates that matter: a batch of 0 and 1 and a number far from 0."""
    rng = np.random.default_rng(seed)
    design = np.stack([rng.random(n_cells) < 0.4, rng.normal(40, 5, n_cells)], axis=1)
    x, labels, s = simulated(n_cells, n_genes=6, n_labels=2, seed=seed)
    moved = s * np.exp(design @ [0.8, -0.05] + 2)
    return (
        rng.poisson(rng.gamma(2.0, moved[:, None] * np.exp(-6) / 2, x.shape)).astype(float),
        labels,
        s,
        design,
    )


def inflated_batches():
    """The same, with zeros that the Gamma does not explain in label a alone."""
    x, labels, s, design = batches(n_cells=300)
    lost = (np.random.default_rng(5).random(x.shape) < 0.3) & (labels[:, None] == "a")
    return np.where(lost, 0, x), labels, s, design

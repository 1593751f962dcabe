"""Fits with covariates against SciPy and statsmodels."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from nbmix.core.parameters import LOG_INV_DISP_RANGE
from nbmix.genes.supervised import fit_gamma, fit_point, fit_point_gamma
from tests.helpers.labelled import (
    FITS,
    batches,
    best_by_scipy,
    inflated_batches,
    negative_binomial,
    poisson,
    values,
    zero_inflated,
)

NATS = 1e-6  # what a fit may lack of the best log likelihood


@pytest.mark.parametrize("fit", FITS)
def test_log_likelihood_with_covariates_is_scipys(fit):
    x, labels, s, design = inflated_batches()
    found = fit(x, labels, s, design)
    want = values(found, x, labels, s, design @ found.coefficients.numpy())
    np.testing.assert_allclose(found.log_likelihood, want, rtol=1e-10)


def test_scipy_finds_no_better_point_fit_with_covariates():
    x, labels, s, design = batches()
    fit = fit_point(x, labels, s, design)
    onehot = (labels[:, None] == fit.labels).astype(float)
    z = np.hstack([onehot, design - design.mean(0)])
    for j in range(x.shape[1]):
        result = scipy.optimize.minimize(
            lambda at, j=j: -poisson(x[:, j], s * np.exp(z @ at)), np.r_[-6, -6, 0, 0], method="BFGS"
        )
        assert abs(-result.fun - float(fit.log_likelihood[:, j].sum())) < NATS


def test_statsmodels_finds_the_same_poisson_regression():
    api = pytest.importorskip("statsmodels.api", reason="pip install 'nbmix[test]'")
    x, labels, s, design = batches()
    fit = fit_point(x, labels, s, design)
    z = np.hstack([labels[:, None] == fit.labels, design]).astype(float)
    for j in range(x.shape[1]):
        theirs = api.GLM(x[:, j], z, family=api.families.Poisson(), offset=np.log(s)).fit(tol=1e-12)
        mine = torch.cat([fit.log_mean[:, j], fit.coefficients[:, j]])
        np.testing.assert_allclose(mine, theirs.params, atol=1e-6)
        np.testing.assert_allclose(fit.log_likelihood[:, j].sum(), theirs.llf, atol=1e-8)


def test_scipy_finds_no_better_gamma_fit_with_covariates():
    x, labels, s, design = batches()
    fit = fit_gamma(x, labels, s, design)
    code, z = np.searchsorted(fit.labels, labels), design - design.mean(0)

    def minus(at, j):
        eta = z @ at[4:] / 5
        return -negative_binomial(x[:, j], s * np.exp(eta), at[code], at[2 + code]).sum()

    for j in range(x.shape[1]):
        starts = [(-6, -6, b, b, 0, 0) for b in (0.0, 3.0)]
        bounds = [(-30, 5)] * 2 + [LOG_INV_DISP_RANGE] * 2 + [(-20, 20)] * 2
        best = best_by_scipy(lambda at, j=j: minus(at, j), starts, bounds)
        assert abs(best - float(fit.log_likelihood[:, j].sum())) < NATS


def test_scipy_finds_no_better_point_gamma_fit_with_covariates():
    x, labels, s, design = inflated_batches()
    fit = fit_point_gamma(x, labels, s, design)
    code, z = np.searchsorted(fit.labels, labels), design - design.mean(0)

    def minus(at, j):
        m, b, logit, c = at[:2], at[2:4], at[4:6], at[6:]
        a = (m + np.logaddexp(0, logit))[code] + z @ c / 5
        return -zero_inflated(x[:, j], s, a, b[code], logit[code]).sum()

    for j in range(x.shape[1]):
        starts = [(-6, -6, b, b, -1, logit, 0, 0) for b in (0.0, 3.0) for logit in (-4, -1)]
        bounds = [(-30, 5)] * 2 + [LOG_INV_DISP_RANGE] * 2 + [(-25, 10)] * 2 + [(-20, 20)] * 2
        best = best_by_scipy(lambda at, j=j: minus(at, j), starts, bounds)
        assert best - float(fit.log_likelihood[:, j].sum()) < NATS


def test_a_point_mass_is_found_beside_a_covariate():
    x, labels, s, design = inflated_batches()
    fit, gamma = fit_point_gamma(x, labels, s, design), fit_gamma(x, labels, s, design)
    zero = torch.sigmoid(fit.logit_zero)
    np.testing.assert_allclose(zero[0], 0.3, atol=0.1)
    assert (zero[1] < 0.05).all()
    np.testing.assert_allclose(fit.coefficients.mean(1), [0.8, -0.05], atol=0.1)
    assert (fit.log_likelihood.sum(0) - gamma.log_likelihood.sum(0)).min() > 1


@pytest.mark.parametrize("fit", FITS)
def test_the_unit_of_a_covariate_does_not_matter(fit):
    x, labels, s, design = batches()
    once, again = fit(x, labels, s, design), fit(x, labels, s, design * [10.0, -0.1] + [3.0, 7.0])
    np.testing.assert_allclose(again.log_likelihood, once.log_likelihood, rtol=1e-10)
    scaled = again.coefficients * torch.tensor([[10.0], [-0.1]])
    np.testing.assert_allclose(scaled, once.coefficients, atol=1e-4)


@pytest.mark.parametrize("fit", FITS)
def test_a_gene_of_one_batch_alone_and_of_one_label_alone_stays_finite(fit):
    x, labels, s, design = batches()
    x[design[:, 0] == 1, 0] = 0
    x[labels == "a", 1] = 0
    x[:, 2] = 0
    found = fit(x, labels, s, design[:, :1])
    for part in (found.log_mean, found.log_likelihood, found.coefficients):
        assert torch.isfinite(part).all()
    rest = design[:, 0] == 0
    alone = fit(x[rest][:, :1], labels[rest], s[rest])
    np.testing.assert_allclose(found.log_likelihood[:, :1], alone.log_likelihood, atol=1e-5)
    only = fit(x[labels == "b"][:, [1]], labels[labels == "b"], s[labels == "b"], design[labels == "b", :1])
    np.testing.assert_allclose(found.log_likelihood[1, 1], only.log_likelihood[0, 0], atol=1e-5)
    assert (found.log_likelihood[:, 2].abs() < 2e-3).all()

"""Poisson and negative binomial fits against their closed form and statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nbmix.genes.supervised import fit_gamma, fit_point
from tests.helpers.labelled import (
    poisson,
    simulated,
)


def test_the_point_fit_is_the_closed_form():
    x, labels, s = simulated()
    fit = fit_point(x, labels, s)
    for k, value in enumerate("abc"):
        mine = labels == value
        mean = x[mine].sum(0) / s[mine].sum()
        heard = mean > 0
        np.testing.assert_allclose(fit.log_mean[k][heard], np.log(mean[heard]), rtol=1e-12)
        best = poisson(x[mine], s[mine, None] * mean)
        np.testing.assert_allclose(fit.log_likelihood[k][heard], best[heard], rtol=1e-12)


def test_statsmodels_finds_the_same_negative_binomial():
    discrete = pytest.importorskip("statsmodels.discrete.discrete_model", reason="pip install 'nbmix[test]'")
    x, labels, s = simulated(n_cells=300, n_genes=6, n_labels=1, seed=2)
    fit = fit_gamma(x, labels, s)
    for j in range(1, 6):
        model = discrete.NegativeBinomial(x[:, j], np.ones((len(s), 1)), offset=np.log(s))
        theirs = model.fit(start_params=[math.log(x[:, j].sum() / s.sum()), 0.5], disp=0, method="bfgs")
        assert abs(theirs.llf - float(fit.log_likelihood[0, j])) < 1e-4
        np.testing.assert_allclose(theirs.params[0], fit.log_mean[0, j], atol=1e-3)
        np.testing.assert_allclose(theirs.params[1], torch.exp(-fit.log_inv_disp[0, j]), atol=1e-3)

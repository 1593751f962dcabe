"""Zero-inflated fits, the sums over zeros and their derivatives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from nbmix.genes.supervised import fit_point_gamma
from nbmix.genes.zero_inflated import zero_inflated_genes, zero_nodes
from tests.helpers.labelled import (
    agrees_with_finite_differences,
    simulated,
)


def test_a_point_mass_is_found_where_there_is_one_and_only_there():
    rng = np.random.default_rng(0)
    s = np.exp(rng.normal(7, 0.3, 4000))
    rate = rng.gamma(5.0, np.exp(-5) / 5, (4000, 2)) * (rng.random((4000, 2)) > [0.4, 0.0])
    fit = fit_point_gamma(rng.poisson(s[:, None] * rate), np.zeros(4000, int), s)
    assert abs(torch.sigmoid(fit.logit_zero[0, 0]) - 0.4) < 0.03
    assert torch.sigmoid(fit.logit_zero[0, 1]) < 0.01
    np.testing.assert_allclose(fit.log_mean[0], -5, atol=0.05)
    np.testing.assert_allclose(fit.log_inv_disp[0], math.log(5), atol=0.15)


@pytest.mark.parametrize("n_cells", [60, 1500])
def test_zeros_are_summed_exactly(n_cells):
    """At the size factors themselves, or at nodes; pi = 1e-4 brings the branch points near."""
    s = np.exp(np.random.default_rng(0).normal(7, 0.6, n_cells))
    s[3] = 0  # an empty cell has a zero for sure, whatever the components
    log_nodes, spread = zero_nodes(s)
    assert log_nodes.size < n_cells

    def term(log_s, a, b, logit):
        return np.logaddexp(logit, -np.exp(b) * np.logaddexp(0, log_s + a - b))

    for at in ((-5.0, 8.0, -9.2), (-4.0, 12.0, -5.0), (-6.0, -2.0, 1.0), (-4.5, 2.0, -3.0)):
        want = term(np.log(s[s > 0]), *at).sum()
        np.testing.assert_allclose(np.asarray(spread.sum(0)).ravel() @ term(log_nodes, *at), want, atol=1e-8)


def test_zero_inflated_curve_equals_finite_differences(generator):
    x, _, s = simulated(n_genes=15, zero=0.5)
    problem = zero_inflated_genes(sp.csr_matrix(x.astype(np.float32)), s / s.mean())
    agrees_with_finite_differences(problem, (15, 3), generator)

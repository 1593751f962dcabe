"""The loops of the mixture with shared axes against the sums that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from scipy.special import expit

from nbmix.core.kernels.factor import LARGEST_POWER, LoadingProblem, loading_rows


@pytest.fixture
def loadings():
    """Of 5 genes, 2 components, 4 nodes and 2 effects; no count of the last gene grows with size."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(-1, 0.5, (2, 5)), rng.normal(1, 0.5, (2, 5))
    log_nodes, node = np.linspace(-1, 2, 4), rng.uniform(5, 20, (2, 4))
    effects = np.stack([log_nodes - log_nodes.mean(), rng.normal(size=4)])
    rate = rng.poisson(node * np.exp(a.T[:, :, None] + log_nodes)).astype(float)
    rate[4] = rate[4].sum() * node * np.exp(-3 * log_nodes) / (node * np.exp(-3 * log_nodes)).sum()
    return a, b, LoadingProblem(log_nodes[None], effects[None], rate, node[None], np.array([0.5, 4.0]))


def test_newton_comes_to_the_loadings_of_the_highest_q(loadings):
    a, b, problem = loadings
    v, bend = np.zeros((5, 2)), np.empty((5, 2))
    loading_rows(0, 5, a, b, problem, 50, v, bend)
    for j in range(5):
        r = np.exp(b[:, j])[:, None]
        both = problem.rate[j] + r * problem.node[0]

        def reach(v, j=j):
            return (a - b)[:, j, None] + problem.log_nodes[0] + v @ problem.effects[0]

        def lowered(v, j=j, both=both):
            gained = (problem.rate[j] * (v @ problem.effects[0])).sum() - (
                both * np.logaddexp(0, reach(v))
            ).sum()
            return problem.precision @ v**2 / 2 - gained

        bounds = [(-LARGEST_POWER, LARGEST_POWER), (None, None)]
        best = scipy.optimize.minimize(lowered, np.zeros(2), bounds=bounds, options={"ftol": 1e-15})
        assert lowered(v[j]) <= best.fun + 1e-8
        share = expit(reach(v[j]))
        curvature = (both * share * (1 - share) * problem.effects[0][:, None] ** 2).sum((1, 2))
        np.testing.assert_allclose(bend[j], curvature + problem.precision, rtol=1e-9)
    assert v[4, 0] == -LARGEST_POWER


def test_genes_are_solved_each_for_itself(loadings):
    a, b, problem = loadings
    whole, part, bend = np.zeros((5, 2)), np.zeros((5, 2)), np.empty((5, 2))
    loading_rows(0, 5, a, b, problem, 8, whole, bend)
    loading_rows(1, 3, a, b, problem, 8, part, bend)
    np.testing.assert_array_equal(part[1:3], whole[1:3])
    assert (part[[0, 3, 4]] == 0).all()

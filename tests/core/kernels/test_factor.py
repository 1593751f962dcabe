"""The loops of the mixture with shared axes against the sums that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from scipy.special import expit

from nbmix.core.kernels.factor import (
    LARGEST_POWER,
    MOST_MULTIPLIED,
    CellPairs,
    LoadingProblem,
    Memberships,
    UsedPairs,
    joint_rows,
    loading_rows,
    statistics_rows,
)


@pytest.mark.parametrize("counts", [[1, 2, 3, 1], [MOST_MULTIPLIED, MOST_MULTIPLIED + 1, 400, 7]])
def test_joint_is_the_sum_over_the_nonzeros_of_a_cell(counts):
    rng = np.random.default_rng(0)
    indptr, codes, gene = np.array([0, 3, 3, 5]), np.array([0, 1, 3, 2, 3]), np.array([0, 1, 1, 2])
    size = np.array([0.5, 1.0, 30.0])
    count, depth = np.array(counts, float), np.log(size)
    n_components, levels = 2, rng.normal(size=(3, 1))
    linear, power = rng.normal(size=(4, n_components + 2)), rng.normal(0, 0.3, 3)
    rho = rng.lognormal(size=(3, 6))
    found = np.empty((3, 6))
    cells = CellPairs(indptr, codes, gene, count, linear, size, depth)
    joint_rows(0, 3, cells, power, rho, levels, found)
    for i in range(3):
        u = codes[indptr[i] : indptr[i + 1]]
        j, c = gene[u], count[u]
        reach = size[i] * np.exp(power[j] * depth[i])
        taken_off = (c[:, None] * np.log1p(reach[:, None] * rho[j])).sum(0).reshape(n_components, 3)
        of_components, of_depth, of_axis = linear[u, :2].sum(0), linear[u, 2].sum(), linear[u, 3].sum()
        expected = of_components[:, None] + depth[i] * of_depth + levels[:, 0] * of_axis - taken_off
        np.testing.assert_allclose(found[i].reshape(2, 3), expected, rtol=1e-11, atol=1e-11)


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


def test_statistics_are_the_sums_over_the_cells_of_each_pair():
    rng = np.random.default_rng(2)
    # pairs 0 and 2 of gene 0 and pair 5 of gene 1 are low, pair 7 of gene 1 is high
    used, gene, counts = np.array([0, 2, 5, 7]), np.array([0, 0, 1, 1]), np.array([1.0, 3.0, 2.0, 40.0])
    cells_of = [[0, 2], [1], [0, 1, 2], [1]]
    indptr, cells = np.cumsum([0, *map(len, cells_of)]), np.concatenate(cells_of)
    pairs = UsedPairs(np.array([0, 2, 3]), np.array([3, 3, 4]), used, counts, indptr, cells)
    q, weights = rng.dirichlet(np.ones(4), 3), rng.dirichlet(np.ones(3), 3)  # (cells, K L), (cells, nodes)
    q[1, 2] = 0
    rows, component = np.nonzero(q)
    members = Memberships(np.searchsorted(rows, np.arange(4)), component, q[rows, component], weights)
    rate, pair = np.ones((2, 4, 3)), np.zeros((9, 2))
    statistics_rows(0, 2, pairs, np.empty(0, np.int64), members, 2, rate, pair)
    expected_rate, expected_pair = np.ones((2, 4, 3)), np.zeros((9, 2))
    for u in range(4):
        for i in cells_of[u]:
            expected_rate[gene[u]] += counts[u] * np.outer(q[i], weights[i])
            expected_pair[used[u]] += q[i].reshape(2, 2).sum(1)
    np.testing.assert_allclose(rate, expected_rate, rtol=1e-12)
    np.testing.assert_allclose(pair, expected_pair, rtol=1e-12)

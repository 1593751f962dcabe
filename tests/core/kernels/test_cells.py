"""Loops over cells against the sums that they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from nbmix.core.kernels.cells import (
    MOST_MULTIPLIED,
    CellPairs,
    Memberships,
    UsedPairs,
    joint_rows,
    statistics_rows,
)


@pytest.mark.parametrize("counts", [[1, 2, 3, 1], [MOST_MULTIPLIED, MOST_MULTIPLIED + 1, 400, 7]])
@pytest.mark.parametrize("origin", [[], [1, 0, 1]])
def test_joint_is_the_sum_over_the_nonzeros_of_a_cell(counts, origin):
    rng = np.random.default_rng(0)
    indptr, codes, gene = np.array([0, 3, 3, 5]), np.array([0, 1, 3, 2, 3]), np.array([0, 1, 1, 2])
    size = np.array([0.5, 1.0, 30.0])
    count, depth = np.array(counts, float), np.log(size)
    n_components, levels = 2, rng.normal(size=(3, 1))
    linear, power = rng.normal(size=(4, n_components + 2)), rng.normal(0, 0.3, 3)
    rho = rng.lognormal(size=(3, 6))
    found = np.empty((3, 6))
    moved, origin = rng.normal(0, 0.5, (2, 3)), np.array(origin, np.int64)
    cells = CellPairs(indptr, codes, gene, count, linear, size, depth, origin)
    joint_rows(0, 3, cells, power, rho, levels, moved, found)
    for i in range(3):
        u = codes[indptr[i] : indptr[i + 1]]
        j, c = gene[u], count[u]
        shift = moved[origin[i], j] if origin.size else np.zeros(len(j))
        reach = size[i] * np.exp(power[j] * depth[i] + shift)
        taken_off = (c[:, None] * np.log1p(reach[:, None] * rho[j])).sum(0).reshape(n_components, 3)
        of_components, of_depth, of_axis = linear[u, :2].sum(0), linear[u, 2].sum(), linear[u, 3].sum()
        of_components = of_components + c @ shift
        expected = of_components[:, None] + depth[i] * of_depth + levels[:, 0] * of_axis - taken_off
        np.testing.assert_allclose(found[i].reshape(2, 3), expected, rtol=1e-11, atol=1e-11)


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
    first, none = np.searchsorted(rows, np.arange(4)), np.empty(0, np.int64)
    members = Memberships(first, component, q[rows, component], weights, none)
    rate, pair = np.ones((2, 4, 3)), np.zeros((9, 2))
    statistics_rows(0, 2, pairs, np.empty((0, 0), np.int32), members, 2, rate, pair)
    expected_rate, expected_pair = np.ones((2, 4, 3)), np.zeros((9, 2))
    for u in range(4):
        for i in cells_of[u]:
            expected_rate[gene[u]] += counts[u] * np.outer(q[i], weights[i])
            expected_pair[used[u]] += q[i].reshape(2, 2).sum(1)
    np.testing.assert_allclose(rate, expected_rate, rtol=1e-12)
    np.testing.assert_allclose(pair, expected_pair, rtol=1e-12)
    # rows of genes in origins: gene 0 has one for the first alone
    origin, row = np.array([0, 1, 0]), np.array([[2, 0], [-1, 1]], np.int32)
    some, expected = np.zeros((3, 4, 3)), np.zeros((3, 4, 3))
    members = members._replace(origin=origin)
    statistics_rows(0, 2, pairs, row, members, 2, some, np.empty((0, 0)))
    for u in range(4):
        for i in cells_of[u]:
            if row[origin[i], gene[u]] >= 0:
                expected[row[origin[i], gene[u]]] += counts[u] * np.outer(q[i], weights[i])
    np.testing.assert_allclose(some, expected, rtol=1e-12)

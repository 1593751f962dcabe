"""The loops of a minibatch against the sums that they stand for; against autograd: core/test_minibatch.py."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import gammaln

from nbmix.core.kernels.minibatch import (
    GeneParameters,
    MinibatchPairs,
    MinibatchSums,
    likelihood_rows,
    likelihood_slope_rows,
    weight_slope_rows,
)
from nbmix.core.levels import CountLevels
from tests.helpers.problems import make_problem

N_CELLS, N_GENES, N_COMPONENTS = 12, 9, 2


@pytest.fixture(scope="module")
def problem():
    return make_problem(n_cells=N_CELLS, n_genes=N_GENES, seed=3)


@pytest.fixture(scope="module")
def x(problem):
    return problem.counts.toarray().astype(float)


@pytest.fixture(scope="module")
def pairs(problem, x):
    levels = CountLevels.of(problem.counts)
    gene, count = levels.gene.numpy(), levels.count.numpy()
    cells = [np.flatnonzero(x[:, j] == c) for j, c in zip(gene, count, strict=True)]
    indptr = np.cumsum([0, *map(len, cells)])
    return MinibatchPairs(np.arange(gene.size), gene, count, levels.places(), indptr, np.concatenate(cells))


@pytest.fixture(scope="module")
def components():
    """(K, genes) ln mu and ln r; means from very small to large, so that both ways to sum zeros are taken."""
    rng = np.random.default_rng(0)
    return rng.uniform(-14, -3, (N_COMPONENTS, N_GENES)), rng.uniform(-2, 4, (N_COMPONENTS, N_GENES))


def nodes_of(problem):
    return np.median(problem.size_factors) * np.array([0.5, 1.0, 2.0])


def of_nonzeros(x, s, a, b):
    """(cells, K) sum_j c (ln mu - ln(1 + s rho)) + ln G(c + r) - ln G(r) - c ln r."""
    c, s, r = x[:, None], s[:, None, None], np.exp(b)
    return (c * (a - np.log1p(s * np.exp(a - b)) - b) + gammaln(c + r) - gammaln(r)).sum(2)


def of_zeros(nodes, a, b):
    """(K, nodes) sum_j r ln(1 + S_m rho)."""
    return (np.exp(b)[:, :, None] * np.log1p(np.exp(a - b)[:, :, None] * nodes)).sum(1)


def summed(problem, pairs, a, b, genes_at_once):
    r, rho = np.exp(b), np.exp(a - b)
    genes, nodes = GeneParameters(r, rho, np.stack([a.T, r.T, rho.T])), nodes_of(problem)
    n_chunks = -(-N_GENES // genes_at_once)
    shapes = (N_COMPONENTS, 3, N_GENES), (n_chunks, N_COMPONENTS, 3), (n_chunks, N_CELLS, N_COMPONENTS)
    sums = MinibatchSums(*(np.zeros(shape) for shape in shapes))
    given = genes, nodes, problem.size_factors, pairs
    for begin in range(0, N_GENES, genes_at_once):
        end = min(begin + genes_at_once, N_GENES)
        likelihood_rows(begin, end, *given, genes_at_once, sums)
    return given, sums


@pytest.mark.parametrize("genes_at_once", [2, N_GENES])
def test_every_chunk_holds_the_sums_of_its_genes(problem, pairs, x, components, genes_at_once):
    a, b = components
    _, sums = summed(problem, pairs, a, b, genes_at_once)
    for chunk, begin in enumerate(range(0, N_GENES, genes_at_once)):
        some = slice(begin, begin + genes_at_once)
        wanted = of_nonzeros(x[:, some], problem.size_factors, a[:, some], b[:, some])
        np.testing.assert_allclose(sums.total[chunk], wanted, rtol=1e-10, atol=1e-10)
        wanted = of_zeros(nodes_of(problem), a[:, some], b[:, some])
        np.testing.assert_allclose(sums.zero[chunk], wanted, rtol=1e-10)


@pytest.mark.parametrize("number", [0, 1], ids=["log_mean", "log_inv_disp"])
def test_slopes_are_finite_differences_of_the_sums(problem, pairs, x, components, number):
    rng = np.random.default_rng(1)
    q, node = rng.dirichlet(np.ones(N_COMPONENTS), N_CELLS), rng.uniform(0, 5, (N_COMPONENTS, 3))
    given, sums = summed(problem, pairs, *components, N_GENES)
    out = np.full((2, N_COMPONENTS, N_GENES), np.nan)
    likelihood_slope_rows(0, N_GENES, *given, (sums.grown, node, q), out)

    def value(a, b):
        zeros = (node * of_zeros(nodes_of(problem), a, b)).sum()
        return (q * of_nonzeros(x, problem.size_factors, a, b)).sum() - zeros

    step = 1e-5
    for k, j in np.ndindex(N_COMPONENTS, N_GENES):
        ends = []
        for sign in (1, -1):
            moved = [part.copy() for part in components]
            moved[number][k, j] += sign * step
            ends.append(value(*moved))
        assert out[number, k, j] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-5)


def test_the_slope_of_a_layer_is_the_dense_product(pairs, x):
    slope, value = np.random.default_rng(2).normal(size=(N_CELLS, 4)), np.log1p(pairs.value)
    out = np.full((N_GENES, 4), np.nan)
    weight_slope_rows(0, 5, pairs._replace(value=value), slope, out)
    assert np.isnan(out[5:]).all()
    weight_slope_rows(5, N_GENES, pairs._replace(value=value), slope, out)
    np.testing.assert_allclose(out, np.log1p(x).T @ slope, rtol=1e-10, atol=1e-12)

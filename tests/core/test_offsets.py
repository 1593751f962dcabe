"""Offsets against a dense evaluation by SciPy, and where they begin."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from scipy.special import gammaln

from nbmix.core.expected_log_likelihood import expected_log_likelihood
from nbmix.core.m_step import sizes_of_components
from nbmix.core.offsets import (
    LARGEST_OFFSET,
    LEAST_GAIN,
    LONGEST_OFFSET_STEP,
    SCREENED_GAIN,
    GammaRates,
    Loadings,
    OriginMargins,
    add_shifted_,
    mean_offset,
    offset_step,
    offset_variance,
    screened,
    spanning_offsets,
    zeros_of_genes,
)
from nbmix.core.parameters import Components
from nbmix.core.statistics import SufficientStatistics
from tests.helpers.origins import BatchedCells


@pytest.fixture(scope="module")
def cells():
    return BatchedCells(n=120, p=15)


@pytest.fixture(scope="module")
def components(cells):
    generator = torch.Generator().manual_seed(0)
    shape = (2, cells.counts.shape[1])
    log_mean = torch.randn(shape, generator=generator, dtype=torch.float64) - 3
    return Components(log_mean, torch.randn(shape, generator=generator, dtype=torch.float64))


def seen_of(cells, origin):
    """Statistics of an origin's cells, and these."""
    rows = np.flatnonzero(cells.origins == origin)
    statistics = SufficientStatistics.zeros(cells.basis, 2, "cpu")
    statistics.add_batch_(cells.batch(rows), cells.basis, cells.q[rows], torch.float64)
    return statistics, rows


def dense_log_likelihood(cells, rows, components, offset):
    """(genes,) sum over cells and components of q ln NB(x), by SciPy."""
    x, s, q = cells.counts[rows].toarray(), cells.s[rows, None], cells.q[rows].numpy()
    total = np.zeros(x.shape[1])
    for k, (a, b) in enumerate(zip(*(t.numpy() for t in components), strict=True)):
        r = np.exp(b)
        of_cells = scipy.stats.nbinom.logpmf(x, r, 1 / (1 + s * np.exp(a + offset) / r))
        total += q[:, k] @ of_cells
    return total


def test_newton_comes_to_the_offset_of_the_highest_likelihood_with_its_prior(cells, components):
    seen, rows = seen_of(cells, 1)
    n_genes = cells.counts.shape[1]
    variance = torch.linspace(0.05, 2.0, n_genes, dtype=torch.float64)
    none = Loadings.none(n_genes, len(cells.basis.nodes.log_nodes))
    offset = torch.zeros(n_genes, dtype=torch.float64)
    for _ in range(30):
        offset, information = offset_step(
            seen, cells.basis.nodes, GammaRates.of(components), offset, variance, none
        )
    for j in range(n_genes):

        def lowered(d, j=j):
            value = dense_log_likelihood(cells, rows, components, np.full(n_genes, d))[j]
            return d**2 / (2 * float(variance[j])) - value

        best = scipy.optimize.minimize_scalar(lowered, bounds=(-LARGEST_OFFSET, LARGEST_OFFSET))
        assert float(offset[j]) == pytest.approx(best.x, abs=2e-4)
        h = 1e-3
        at = float(offset[j])
        bend = (lowered(at + h) + lowered(at - h) - 2 * lowered(at)) / h**2
        assert float(information[j] + 1 / variance[j]) == pytest.approx(bend, rel=1e-2)


def test_a_step_and_an_offset_are_bounded(cells, components):
    seen, _ = seen_of(cells, 1)
    n_genes = cells.counts.shape[1]
    far = Components(components.log_mean - 20, components.log_inv_disp)
    none, wide = Loadings.none(n_genes, len(cells.basis.nodes.log_nodes)), torch.full((n_genes,), 1e6)
    begin = torch.zeros(n_genes, dtype=torch.float64)
    once = offset_step(seen, cells.basis.nodes, GammaRates.of(far), begin, wide, none).offset
    assert once.abs().max() <= LONGEST_OFFSET_STEP + 1e-12
    for _ in range(20):
        begin = offset_step(seen, cells.basis.nodes, GammaRates.of(far), begin, wide, none).offset
    assert begin.max() == LARGEST_OFFSET


def test_shifted_statistics_have_the_likelihood_of_shifted_cells(cells, components):
    rng = np.random.default_rng(1)
    offsets = torch.from_numpy(rng.normal(0, 0.5, (2, cells.counts.shape[1])))
    nodes = spanning_offsets(cells.basis.nodes, offsets)
    total, expected, sizes = None, np.zeros(()), np.zeros((2, cells.counts.shape[1]))
    for origin in range(2):
        seen, rows = seen_of(cells, origin)
        total = zeros_of_genes(cells.basis.levels, 2, nodes.log_nodes.shape[1]) if total is None else total
        add_shifted_(total, seen, offsets[origin], cells.basis.nodes, nodes)
        d = offsets[origin].numpy()
        x = cells.counts[rows].toarray()
        free = x * (np.log(cells.s[rows, None]) + d) - gammaln(x + 1)  # no component depends on it
        expected = expected + dense_log_likelihood(cells, rows, components, d).sum() - free.sum()
        sizes += np.einsum("ik,i,j->kj", cells.q[rows].numpy(), cells.s[rows], np.exp(d))
    moved = cells.basis._replace(nodes=nodes)
    found = float(expected_log_likelihood(total, moved, components).sum())
    assert found == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(sizes_of_components(total, moved).numpy(), sizes, rtol=2e-3)
    assert float(total.weight.sum()) == pytest.approx(len(cells.s))


def test_nodes_reach_a_step_beyond_every_offset(cells):
    offsets = torch.tensor([[0.0, 2.0, -1.0], [0.0, -2.0, 0.5]], dtype=torch.float64)
    found = spanning_offsets(cells.basis.nodes, offsets).log_nodes
    low, high = np.log(cells.s.min()), np.log(cells.s.max())
    width = (high - low) / 2 + LONGEST_OFFSET_STEP
    # Chebyshev nodes lie within their interval, most of it
    half = (found.max(1).values - found.min(1).values) / 2
    for gene, spread in enumerate((0.0, 4.0, 1.5)):
        assert 0.9 * (width + spread / 2) < float(half[gene]) <= width + spread / 2


def test_first_offsets_are_near_those_that_counts_were_drawn_by():
    cells = BatchedCells(n=2000, p=40, g=3)
    margins = OriginMargins.of(cells.batches(), cells.basis, cells.q, 5, 3)
    offsets, variance, _ = margins.first_offsets(None)
    assert np.abs(offsets.numpy() - cells.offsets).mean() < 0.1
    assert float(variance.mean()) == pytest.approx(0.36, rel=0.5)
    others = margins.first_offsets(0).offsets
    assert not torch.equal(others, offsets)


def test_margins_are_sums_over_cells(cells):
    margins = OriginMargins.of(cells.batches(), cells.basis, cells.q, 5, 2)
    x, q = cells.counts.toarray().astype(float), cells.q.numpy()
    of_origin = np.eye(2)[cells.origins]
    np.testing.assert_allclose(margins.of_origin.sum(0), of_origin.T @ x)
    np.testing.assert_allclose(margins.of_component.sum(0), q.T @ x)
    np.testing.assert_allclose(margins.size.sum(0), (of_origin * cells.s[:, None]).T @ q)
    np.testing.assert_array_equal(margins.n_cells.sum(0), cells.n_cells)


def test_genes_that_are_worth_an_offset_are_not_overlooked():
    cells = BatchedCells(n=600, p=120, g=4, spread=0.03)
    margins = OriginMargins.of(cells.batches(), cells.basis, cells.q, 5, 4)
    counts, size, n_cells = (t.sum(0) for t in (margins.of_origin, margins.size, margins.n_cells))
    mean = margins.of_component.sum(0) / size.sum(0)[:, None]
    gammas = GammaRates.of(Components(torch.log(mean), torch.full_like(mean, float(np.log(3)))))
    variance, none = torch.full((120,), 0.05, dtype=torch.float64), torch.zeros(4, 120, dtype=torch.float64)
    found = screened(counts, size, n_cells, gammas, none, variance)
    loadings = Loadings.none(120, len(cells.basis.nodes.log_nodes))
    worth = 0
    for origin in range(4):
        seen, _ = seen_of(cells, origin)
        step, information = offset_step(seen, cells.basis.nodes, gammas, none[origin], variance, loadings)
        gain = information * step**2 / 2
        overlooked = found.gain[origin] <= SCREENED_GAIN
        assert float(gain[overlooked].max()) < 0.5  # what an offset gains on average where there is none
        assert float(gain[overlooked].sum()) < 0.02 * float(gain.sum())
        error = (found.information[origin] / information - 1).abs()
        assert float(error.median()) < 0.1 and float(error.max()) < 0.5
        worth += int((gain > LEAST_GAIN).sum())
    assert 50 < worth < 450  # there was something to choose


def test_mean_offset_is_that_of_the_average_cell():
    offsets = torch.tensor([[1.0, 0.0], [-1.0, 3.0]], dtype=torch.float64)
    assert mean_offset(offsets, torch.tensor([3, 1])).tolist() == [0.5, 0.75]


def test_variance_is_learned_and_an_origin_without_cells_says_nothing():
    information = torch.tensor([[1e6] * 200, [1e6] * 200, [0.0] * 200], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    offsets = 0.5 * torch.randn(3, 200, generator=generator, dtype=torch.float64)
    offsets[2] = 0
    variance = torch.full((200,), 0.1, dtype=torch.float64)
    for _ in range(10):
        variance = offset_variance(offsets, information, variance)
    assert 0.1 < float(variance.mean()) < 0.6
    noise = offset_variance(torch.zeros(3, 200, dtype=torch.float64), information, variance)
    assert float(noise.max()) < float(variance.min())

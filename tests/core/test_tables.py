from __future__ import annotations

import numpy as np
import pytest
import torch

from nbmix.core.batch import FLOAT32_NODE_NATS, Basis, CellBatch, Precision
from nbmix.core.kernels.blocks import LINE
from nbmix.core.levels import CountLevels
from nbmix.core.nodes import NODE_TOLERANCE, SizeFactorNodes
from nbmix.core.tables import (
    FEWEST_CELLS_FOR_STEPS,
    FLOAT32_NATS,
    batch_log_likelihood,
    likelihood_tables,
    split_table,
    step_table,
)
from tests.helpers.pairs import csr
from tests.helpers.problems import make_problem, reference_log_likelihood


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size_factors", ["all equal", "only empty cells", "one cell"])
def test_batches_of_one_node_equal_scipy(problem, size_factors, dtype):
    counts, s = problem.counts, np.full(40, 3e4)
    if size_factors == "only empty cells":
        counts, s = csr(np.zeros((40, 25))), np.where(np.arange(40) == 7, 5e3, 0.0)
    basis = Basis.of(counts, s)
    pick = np.array([8]) if size_factors == "one cell" else np.arange(40)
    batch = CellBatch.build(counts, s, basis, pick=pick)
    assert batch.to_own.shape[0] == 1
    got = batch_log_likelihood(
        batch, basis, likelihood_tables(basis, problem.log_mean, problem.log_inv_disp, dtype)
    )
    want = reference_log_likelihood(counts[pick].toarray(), s[pick], problem.log_mean, problem.log_inv_disp)
    atol = 8 * FLOAT32_NATS if dtype == torch.float32 else 0
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=atol)


def test_batch_log_likelihood_equals_scipy(problem):
    tables = likelihood_tables(problem.basis, problem.log_mean, problem.log_inv_disp, torch.float64)
    got = batch_log_likelihood(problem.batch, problem.basis, tables)
    want = reference_log_likelihood(
        problem.counts.toarray(), problem.size_factors, problem.log_mean, problem.log_inv_disp
    )
    np.testing.assert_allclose(got, want, rtol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_float32_products_keep_the_contrasts_between_components(seed):
    problem = make_problem(n_cells=80, n_genes=400, n_components=5, seed=seed)
    narrow, wide = (
        batch_log_likelihood(
            problem.batch,
            problem.basis,
            likelihood_tables(problem.basis, problem.log_mean, problem.log_inv_disp, dtype),
        )
        for dtype in (torch.float32, torch.float64)
    )
    assert narrow.dtype == torch.float64
    wrong = (narrow - narrow[:, :1]) - (wide - wide[:, :1])
    assert wrong.abs().max() < 0.02


def deep_problem(depth, n_genes, log_range, n_cells=60):
    """A batch of cells of about ``depth`` counts, on the nodes of more spread out data, and its tables."""
    rng = np.random.default_rng(0)
    s = depth * np.exp(rng.uniform(-log_range / 2, log_range / 2, n_cells))
    share = rng.dirichlet(np.ones(n_genes))
    counts = csr(np.minimum(rng.poisson(s[:, None] * share), 2**23))
    nodes = SizeFactorNodes.spanning(np.array([depth / 30, depth * 30]))
    basis = Basis(nodes, CountLevels.of(counts))
    log_mean = torch.from_numpy(np.log(share) + rng.normal(0, 2, (3, n_genes)))
    log_inv_disp = torch.from_numpy(rng.uniform(-8, 12, (3, n_genes)))
    return CellBatch.build(counts, s, basis), basis, likelihood_tables(basis, log_mean, log_inv_disp)


def in_both(batch, basis, tables, **bounds):
    """(cells, K) of ``tables`` in float32, and the same in float64."""
    return (
        batch_log_likelihood(batch, basis, tables._replace(dtype=dtype), **bounds)
        for dtype in (torch.float32, torch.float64)
    )


@pytest.mark.parametrize("log_range", [0.01, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("n_genes", [1, 10, 300])
@pytest.mark.parametrize("depth", [1e3, 1e4, 1e6])
def test_float32_sums_are_as_close_as_they_claim(depth, n_genes, log_range):
    batch, basis, tables = deep_problem(depth, n_genes, log_range, FEWEST_CELLS_FOR_STEPS)
    narrow, wide = in_both(batch, basis, tables)
    assert (narrow - wide).abs().max() < 8 * FLOAT32_NATS


def test_float32_sums_of_shared_parts_of_thousands_of_nats_are_close():
    """Components that differ by little: all but that is the same large number."""
    batch, basis, _ = deep_problem(2e3, 200, 0.5)
    generator = torch.Generator().manual_seed(0)
    spread = 0.1 * torch.randn(5, 200, dtype=torch.float64, generator=generator)
    narrow, wide = in_both(batch, basis, likelihood_tables(basis, -9 + spread, 1 + spread))
    assert wide.abs().min() > 3e3
    assert (narrow - wide).abs().max() < 1e-3


def test_values_are_cut_where_steps_between_nodes_would_round():
    """Counts of 1e6 times steps of several nats: float32 sums of the steps are off by hundredths."""
    batch, basis, tables = deep_problem(1e6, 50, 3.0, FEWEST_CELLS_FOR_STEPS)
    narrow, wide = in_both(batch, basis, tables)
    assert (narrow - wide).abs().max() < 1e-3
    uncut, _ = in_both(batch, basis, tables, step_nats=np.inf)
    assert (uncut - wide).abs().max() > 1e-3


@pytest.mark.parametrize("thinned", [1.0, 1e-3])  # cells of far fewer counts than size factors let expect
@pytest.mark.parametrize("unit", [1.0, 1e-4])
@pytest.mark.parametrize("depth", [30.0, 2e3, 1e5])
def test_the_nodes_of_float32_are_fewer_and_lose_no_more_than_they_may(depth, unit, thinned):
    rng = np.random.default_rng(0)
    s = depth * np.exp(rng.uniform(-1, 1, 300))
    share = rng.dirichlet(np.full(200, 0.3))
    kept = np.where(np.arange(300) % 2, thinned, 1.0)
    counts = csr(rng.poisson((kept * s)[:, None] * share))
    s, share = s * unit, share / unit
    exact, close = (Basis.of(counts, s, Precision.of(dtype)) for dtype in (torch.float64, torch.float32))
    assert close.nodes.log_nodes.numel() < exact.nodes.log_nodes.numel()
    log_mean = torch.from_numpy(np.log(share) + rng.normal(0, 1, (4, 200)))
    log_inv_disp = torch.from_numpy(rng.uniform(-3, 6, (4, 200)))
    found = []
    for basis in (exact, close):
        tables = likelihood_tables(basis, log_mean, log_inv_disp, torch.float64)
        batches = [CellBatch.build(counts, s, basis, pick=rows) for rows in np.array_split(np.argsort(s), 3)]
        found.append(torch.cat([batch_log_likelihood(batch, basis, tables) for batch in batches]))
    assert 0 < (found[0] - found[1]).abs().max() < FLOAT32_NODE_NATS


def test_rows_of_float32_tables_begin_at_cache_lines(problem):
    rate = torch.zeros(25, 3, 2, dtype=torch.float64)
    pair = torch.zeros(problem.basis.levels.n_pairs, 3, dtype=torch.float64)
    for make in (step_table, split_table):
        table = make(problem.batch, problem.basis, rate, pair, 2.0**-10)
        assert table.data_ptr() % (4 * LINE) == table.stride(0) % LINE == 0


def test_batches_of_a_basis_give_the_rows_of_the_whole(problem):
    tables = likelihood_tables(problem.basis, problem.log_mean, problem.log_inv_disp, torch.float64)
    whole = batch_log_likelihood(problem.batch, problem.basis, tables)
    for rows in (np.array([0]), np.arange(7, 20), np.array([39, 3, 11])):
        part = CellBatch.build(problem.counts[rows], problem.size_factors[rows], problem.basis)
        got = batch_log_likelihood(part, problem.basis, tables)
        # each interpolates between nodes of its own
        torch.testing.assert_close(got, whole[rows], rtol=NODE_TOLERANCE, atol=0)
        want = reference_log_likelihood(
            problem.counts[rows].toarray(), problem.size_factors[rows], problem.log_mean, problem.log_inv_disp
        )
        np.testing.assert_allclose(got, want, rtol=1e-8)


def test_basis_of_counts_serves_cells_without_any_count():
    counts, s = csr(np.zeros((3, 4))), np.zeros(3)
    basis = Basis.of(counts, s)
    a = torch.zeros(2, 4, dtype=torch.float64)
    got = batch_log_likelihood(CellBatch.build(counts, s, basis), basis, likelihood_tables(basis, a, a))
    assert (got == 0).all()

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from nbmix.products import (
    NODE_TOLERANCE,
    Basis,
    CellBatch,
    CentredTable,
    CountLevels,
    CsrMatrix,
    SizeFactorNodes,
    batch_log_likelihood,
    likelihood_tables,
    node_softplus,
    pair_table,
)
from nbmix.special import EXACT_COUNT, log_rising_ratio
from tests.conftest import make_problem, reference_log_likelihood


def csr(rows) -> sp.csr_matrix:
    return sp.csr_matrix(np.asarray(rows, dtype=np.float32))


# ---- CsrMatrix -------------------------------------------------------------------------------------

MATRICES = {
    "plain": [[1, 0, 2], [0, 3, 0], [4, 5, 6]],
    "empty rows at both ends and between": [[0, 0, 0], [1, 2, 0], [0, 0, 0], [0, 0, 7], [0, 0, 0]],
    "no entries": [[0, 0], [0, 0], [0, 0]],
    "one row": [[0, 9, 0, 1]],
    "one column": [[0], [3], [1]],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("name", MATRICES)
def test_matmul_is_the_dense_product(name, width, dtype):
    matrix = csr(MATRICES[name])
    dense = torch.from_numpy(np.random.default_rng(0).normal(size=(matrix.shape[1], width))).to(dtype)
    got = CsrMatrix.from_scipy(matrix).matmul(dense)
    assert got.dtype == dtype
    assert got.shape == (matrix.shape[0], width)
    want = matrix.toarray().astype(float) @ dense.double().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MATRICES)
def test_matmul_without_values_is_the_product_with_ones(name, dtype):
    matrix = csr(np.asarray(MATRICES[name]) > 0)
    dense = torch.arange(matrix.shape[1] * 2, dtype=dtype).view(-1, 2)
    ones = CsrMatrix.from_scipy(matrix, ones=True)
    assert ones.values is None
    np.testing.assert_array_equal(ones.matmul(dense), matrix.toarray() @ dense.numpy())


def test_float64_matmul_keeps_what_float32_would_lose():
    got = CsrMatrix.from_scipy(csr([[1, 1, 1]])).matmul(
        torch.tensor([[1e9], [1.0], [-1e9]], dtype=torch.float64)
    )
    assert got.item() == 1.0


def test_matmul_rejects_a_dense_matrix_of_other_height():
    with pytest.raises(ValueError, match="3 columns times 2 rows"):
        CsrMatrix.from_scipy(csr([[1, 2, 3]])).matmul(torch.ones(2, 1))


def test_from_scipy_shares_the_arrays_of_canonical_counts():
    matrix = csr([[1, 0, 2]])
    wrapped = CsrMatrix.from_scipy(matrix)
    assert wrapped.values is not None
    assert wrapped.values.data_ptr() == matrix.data.ctypes.data


def test_the_first_product_of_a_process_prints_no_warning():
    """torch announces once a process that CSR tensors are in beta: nobody here asked for them."""
    program = (
        "import numpy, torch\n"
        "from nbmix.likelihood import component_log_likelihood\n"
        "component_log_likelihood(numpy.eye(3), 1.0, torch.zeros(2, 3), torch.zeros(2, 3))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- SizeFactorNodes -------------------------------------------------------------------------------

RANGES = {
    "one cell": np.array([1234.5]),
    "all equal": np.full(7, 1e4),
    "equal but for rounding": 1e4 * (1 + 1e-13 * np.arange(5)),
    "very close": 1e4 * (1 + 1e-10 * np.arange(5)),
    "close": np.linspace(9_990, 10_010, 50),
    "usual": np.geomspace(800, 30_000, 200),
    "unusually wide": np.geomspace(10, 1e6, 300),
    "around one": np.geomspace(0.05, 20, 100),
}
LOG_RHO = np.linspace(-40, 15, 111)


@pytest.mark.parametrize("name", RANGES)
def test_interpolation_holds_its_tolerance_for_every_cell_and_rho(name):
    s = RANGES[name]
    nodes = SizeFactorNodes.spanning(s)
    log_rho = torch.from_numpy(LOG_RHO)
    at_nodes = node_softplus(nodes, log_rho, torch.zeros_like(log_rho))  # (nodes, rhos)
    got = nodes.weights(torch.from_numpy(s)) @ at_nodes
    want = np.log1p(s[:, None] * np.exp(LOG_RHO))
    np.testing.assert_allclose(got, want, rtol=NODE_TOLERANCE)


@pytest.mark.parametrize("name", RANGES)
def test_interpolation_weights_of_a_cell_sum_to_one(name):
    s = RANGES[name]
    weights = SizeFactorNodes.spanning(s).weights(torch.from_numpy(s))
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)


def test_a_looser_tolerance_takes_fewer_nodes_and_is_held_too():
    s = RANGES["usual"]
    loose, tight = SizeFactorNodes.spanning(s, 1e-3), SizeFactorNodes.spanning(s, 1e-10)
    assert loose.log_nodes.numel() < tight.log_nodes.numel()
    log_rho = torch.from_numpy(LOG_RHO)
    got = loose.weights(torch.from_numpy(s)) @ node_softplus(loose, log_rho, torch.zeros_like(log_rho))
    np.testing.assert_allclose(got, np.log1p(s[:, None] * np.exp(LOG_RHO)), rtol=1e-3)


def test_a_size_factor_on_a_node_takes_that_node_alone():
    nodes = SizeFactorNodes.spanning(RANGES["usual"])
    s = torch.exp(nodes.log_nodes)
    on_node = torch.log(s) == nodes.log_nodes  # exp and log round
    assert on_node.any()
    weights = nodes.weights(s)
    assert torch.isfinite(weights).all()
    assert torch.equal(weights[on_node], torch.eye(len(s), dtype=torch.float64)[on_node])
    np.testing.assert_allclose(weights, np.eye(len(s)), atol=1e-11)


@pytest.mark.parametrize("others", [[50.0, 7e3], [50.0], []])
def test_a_zero_size_factor_has_a_row_of_zeros(others):
    s = np.array([0.0, *others, 0.0])
    weights = SizeFactorNodes.spanning(s).weights(torch.from_numpy(s))
    assert (weights[[0, -1]] == 0).all()
    np.testing.assert_allclose(weights[1:-1].sum(1), 1, rtol=1e-12)


# ---- CountLevels -----------------------------------------------------------------------------------

COUNTS = csr(
    [
        [0, 1, 2, 0, 25, 3],
        [0, 1, 5, 0, 20, 21],
        [0, 0, 0, 0, 0, 0],
        [0, 1, 3, 0, 900, 1],
        [0, 0, 2, 0, 25, 2],
    ]
)


def test_levels_hold_a_place_for_every_count_up_to_the_largest_of_the_gene():
    levels = CountLevels.of(COUNTS)
    places = [(int(j), int(t) + 1) for j, t in zip(levels.gene, levels.level, strict=True)]
    want = [(2, c) for c in range(2, 6)] + [(4, c) for c in range(2, 21)] + [(5, c) for c in range(2, 21)]
    assert places == want
    high = list(zip(levels.high_gene.tolist(), levels.high_count.tolist(), strict=True))
    assert high == [(4, 25.0), (4, 900.0), (5, 21.0)]
    assert (levels.n_low, levels.n_pairs, levels.n_genes) == (len(want), len(want) + 3, 6)


@pytest.mark.parametrize("seed", range(3))
def test_incidence_marks_the_pair_of_every_count_of_two_or_more(seed):
    counts = COUNTS if seed == 0 else make_problem(seed=seed).counts
    levels = CountLevels.of(counts)
    count_of = np.concatenate([levels.level.numpy() + 1, levels.high_count.numpy()])
    gene_of = np.concatenate([levels.gene.numpy(), levels.high_gene.numpy()])
    incidence = levels.incidence(counts)
    assert incidence.shape == (counts.shape[0], levels.n_pairs)
    assert (incidence.data == 1).all()
    rebuilt = np.zeros(counts.shape)
    rows, pairs = incidence.nonzero()
    rebuilt[rows, gene_of[pairs]] = count_of[pairs]
    want = counts.toarray()
    np.testing.assert_array_equal(rebuilt, np.where(want > 1, want, 0))
    assert incidence.nnz == (want > 1).sum()


def test_levels_of_all_cells_serve_some_of_them():
    levels = CountLevels.of(COUNTS)
    some = [4, 2, 0]
    want = levels.incidence(COUNTS).toarray()[some]
    np.testing.assert_array_equal(levels.incidence(COUNTS[some]).toarray(), want)


@pytest.mark.parametrize(
    ("gene", "count"),
    [(0, 2), (1, 2), (2, 6), (2, 30), (4, 26), (4, 899), (4, 901), (5, 22), (5, 1e6)],
)
def test_a_pair_that_is_not_listed_is_a_key_error(gene, count):
    row = np.zeros((1, 6))
    row[0, gene] = count
    with pytest.raises(KeyError):
        CountLevels.of(COUNTS).incidence(csr(row))


@pytest.mark.parametrize("rows", [np.eye(3), np.zeros((2, 3))])
def test_counts_of_at_most_one_have_no_pairs(rows):
    counts = csr(rows)
    levels = CountLevels.of(counts)
    assert levels.n_pairs == 0
    assert levels.incidence(counts).shape == (len(rows), 0)
    assert pair_table(levels, torch.zeros(2, 3, dtype=torch.float64)).shape == (0, 2)
    assert levels.reaching(torch.zeros(0, 2, dtype=torch.float64)).shape == (0, 2)


def test_only_counts_above_the_exact_ones_are_placed_and_found():
    counts = csr([[EXACT_COUNT + 1, 0], [EXACT_COUNT, 2 * EXACT_COUNT]])
    levels = CountLevels.of(counts)
    b = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    got = levels.incidence(counts).toarray() @ pair_table(levels, b).numpy()
    d = log_rising_ratio(torch.from_numpy(counts.toarray()), b).numpy().sum(1)
    np.testing.assert_allclose(got[:, 0], d, rtol=1e-12)


def test_running_sum_adds_the_levels_of_the_same_gene(generator):
    levels = CountLevels.of(COUNTS)
    terms = torch.rand(levels.n_low, 2, dtype=torch.float64, generator=generator)
    got = levels.running_sum(terms)
    for i in range(levels.n_low):
        same = (levels.gene == levels.gene[i]) & (levels.level <= levels.level[i])
        torch.testing.assert_close(got[i], terms[same].sum(0))


def test_reaching_adds_the_weights_of_the_larger_counts_of_the_same_gene(generator):
    levels = CountLevels.of(COUNTS)
    weights = torch.rand(levels.n_pairs, 2, dtype=torch.float64, generator=generator)
    got = levels.reaching(weights)
    gene = torch.cat([levels.gene, levels.high_gene])
    count = torch.cat([levels.level + 1, levels.high_count])
    for i in range(levels.n_low):
        above = (gene == levels.gene[i]) & (count > levels.level[i])
        torch.testing.assert_close(got[i], weights[above].sum(0))


def test_reaching_is_the_transpose_of_the_table(generator):
    """sum_c B_c D(c, r) = sum_t reaching_t ln(1 + t / r) + the tails, the identity of the M step."""
    levels = CountLevels.of(make_problem(seed=4).counts)
    weights = torch.rand(levels.n_pairs, 1, dtype=torch.float64, generator=generator)
    b = torch.rand(1, levels.n_genes, dtype=torch.float64, generator=generator)
    low_only = weights.clone()
    low_only[levels.n_low :] = 0
    want = (low_only * pair_table(levels, b)).sum()
    terms = torch.log1p(levels.level * torch.exp(-b[0, levels.gene]))
    torch.testing.assert_close((levels.reaching(low_only)[:, 0] * terms).sum(), want)


def test_pair_table_is_the_log_rising_ratio_of_every_pair():
    levels = CountLevels.of(COUNTS)
    b = torch.linspace(-8, 12, 12, dtype=torch.float64).view(2, 6)
    gene = torch.cat([levels.gene, levels.high_gene])
    count = torch.cat([levels.level + 1, levels.high_count])
    want = log_rising_ratio(count[:, None], b.T[gene])
    torch.testing.assert_close(pair_table(levels, b), want, rtol=1e-11, atol=1e-14)


# ---- CentredTable, CellBatch and their product -----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centred_table_is_the_product_with_the_table(dtype, generator):
    matrix = csr(np.random.default_rng(0).poisson(0.7, (30, 40)))
    table = torch.randn(40, 6, dtype=torch.float64, generator=generator) - 1e4
    got = CentredTable(table, dtype).product(CsrMatrix.from_scipy(matrix))
    assert got.dtype == torch.float64
    atol = 1e-3 if dtype == torch.float32 else 1e-8
    np.testing.assert_allclose(got, matrix.toarray().astype(float) @ table.numpy(), rtol=0, atol=atol)


def test_centred_table_in_float32_stays_exact_where_contrasts_are_large():
    """Counts of 1e6 times contrasts of 1e1 would round to whole nats in float32."""
    matrix = csr(np.random.default_rng(0).integers(0, 2**20, (20, 50)))
    table = torch.from_numpy(np.random.default_rng(1).normal(0, 10, (50, 4)))
    got = CentredTable(table, torch.float32).product(CsrMatrix.from_scipy(matrix))
    np.testing.assert_allclose(got, matrix.toarray().astype(float) @ table.numpy(), rtol=0, atol=1e-2)


def test_a_batch_survives_the_way_to_its_device(problem):
    prior, labels = np.full((40, 3), 1 / 3), np.arange(40)
    batch = CellBatch.build(
        problem.counts,
        problem.size_factors,
        problem.basis.levels,
        rows=np.arange(40)[::-1].copy(),
        fold=2,
        prior=prior,
        labels=labels,
    )
    moved = batch.to("cpu")
    assert (moved.fold, moved.n_cells) == (2, 40)
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        assert type(before) is type(after)
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after)
    basis = problem.basis.to("cpu")
    tables = likelihood_tables(basis, problem.log_mean, problem.log_inv_disp)
    assert torch.equal(
        batch_log_likelihood(batch, problem.basis, tables), batch_log_likelihood(moved, basis, tables)
    )


def test_a_batch_holds_both_orientations_of_the_same_matrices(problem):
    batch = problem.batch
    eye = torch.eye(batch.n_cells, dtype=torch.float64)
    genes = torch.eye(problem.counts.shape[1], dtype=torch.float64)
    pairs = torch.eye(problem.basis.levels.n_pairs, dtype=torch.float64)
    assert torch.equal(batch.counts_t.matmul(eye).T, batch.counts.matmul(genes))
    assert torch.equal(batch.pairs_t.matmul(eye).T, batch.pairs.matmul(pairs))


def test_building_a_batch_leaves_the_counts_alone(problem):
    before = problem.counts.copy()
    CellBatch.build(problem.counts, problem.size_factors, problem.basis.levels)
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(problem.counts, part), getattr(before, part))


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


def test_batches_of_a_basis_give_the_rows_of_the_whole(problem):
    tables = likelihood_tables(problem.basis, problem.log_mean, problem.log_inv_disp, torch.float64)
    whole = batch_log_likelihood(problem.batch, problem.basis, tables)
    for rows in (np.array([0]), np.arange(7, 20), np.array([39, 3, 11])):
        part = CellBatch.build(problem.counts[rows], problem.size_factors[rows], problem.basis.levels)
        torch.testing.assert_close(
            batch_log_likelihood(part, problem.basis, tables), whole[rows], rtol=1e-12, atol=1e-9
        )


def test_basis_of_counts_serves_cells_without_any_count():
    counts, s = csr(np.zeros((3, 4))), np.zeros(3)
    basis = Basis.of(counts, s)
    a = torch.zeros(2, 4, dtype=torch.float64)
    got = batch_log_likelihood(
        CellBatch.build(counts, s, basis.levels), basis, likelihood_tables(basis, a, a)
    )
    assert (got == 0).all()

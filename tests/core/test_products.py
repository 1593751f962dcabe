from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.special
import torch

from nbmix.core.batch import FLOAT32_NODE_NATS, Basis, CellBatch, Precision, pair_product
from nbmix.core.csr import CsrMatrix
from nbmix.core.levels import CountCensus, CountLevels
from nbmix.core.nodes import NODE_TOLERANCE, SizeFactorNodes, node_softplus
from nbmix.core.special import EXACT_COUNT, log_rising_ratio
from nbmix.core.tables import (
    FLOAT32_NATS,
    LINE,
    _split_table,
    _step_table,
    batch_log_likelihood,
    likelihood_tables,
    pair_table,
)
from tests.helpers.problems import make_problem, reference_log_likelihood


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


@pytest.mark.parametrize("name", MATRICES)
def test_transposed_is_the_transpose_of_the_ones(name):
    matrix = csr(np.asarray(MATRICES[name]) > 0)
    turned = CsrMatrix.from_scipy(matrix, ones=True).transposed()
    assert (turned.n_rows, turned.n_columns) == matrix.shape[::-1]
    eye = torch.eye(matrix.shape[0], dtype=torch.float64)
    np.testing.assert_array_equal(turned.matmul(eye), matrix.toarray().T)


def test_only_a_matrix_of_ones_is_transposed():
    with pytest.raises(ValueError, match="ones"):
        CsrMatrix.from_scipy(csr([[1, 2]])).transposed()


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
    at_nodes = node_softplus(nodes, log_rho, torch.zeros_like(log_rho))  # (rhos, nodes)
    got = nodes.weights(torch.from_numpy(s)) @ at_nodes.T
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
    got = loose.weights(torch.from_numpy(s)) @ node_softplus(loose, log_rho, torch.zeros_like(log_rho)).T
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


def coded(levels, counts, rows=None):
    """(rows, pairs) dense one-hot of what ``levels.code`` finds."""
    rows = np.arange(counts.shape[0]) if rows is None else np.asarray(rows)
    codes, _ = levels.code(counts, rows)
    lengths = np.diff(counts.indptr)[rows]
    marks = np.zeros((rows.size, levels.n_pairs))
    np.add.at(marks, (np.repeat(np.arange(rows.size), lengths), codes), 1)
    return marks


def test_levels_hold_a_place_for_every_count_up_to_the_largest_of_the_gene():
    levels = CountLevels.of(COUNTS)
    places = [(int(j), int(t) + 1) for j, t in zip(levels.gene, levels.level, strict=False)]
    want = [(1, 1), *((2, c) for c in range(1, 6)), *((j, c) for j in (4, 5) for c in range(1, 21))]
    assert places == want
    high = list(zip(levels.high_gene.tolist(), levels.high_count.tolist(), strict=True))
    assert high == [(4, 25.0), (4, 900.0), (5, 21.0)]
    pairs = list(zip(levels.gene.tolist(), levels.count.tolist(), strict=True))
    assert pairs == want + high
    assert (levels.n_low, levels.n_high, levels.n_genes) == (len(want), 3, 6)
    assert levels.n_pairs == len(want) + 3


@pytest.mark.parametrize("seed", range(3))
def test_codes_mark_the_pair_of_every_count(seed):
    counts = COUNTS if seed == 0 else make_problem(seed=seed).counts
    levels = CountLevels.of(counts)
    marks = coded(levels, counts)
    assert set(np.unique(marks)) == {0, 1}
    assert marks.sum() == counts.nnz
    rebuilt = np.zeros(counts.shape)
    rows, pairs = marks.nonzero()
    rebuilt[rows, levels.gene[pairs]] = levels.count[pairs]
    np.testing.assert_array_equal(rebuilt, counts.toarray())


def test_levels_of_all_cells_serve_some_of_them():
    levels = CountLevels.of(COUNTS)
    some = [4, 2, 0]
    want = coded(levels, COUNTS)[some]
    np.testing.assert_array_equal(coded(levels, COUNTS[some]), want)
    np.testing.assert_array_equal(coded(levels, COUNTS, some), want)


def test_codes_come_with_the_log_factorials_of_each_row():
    counts = csr([[0, 1, 2, 0, 25, 3], [0, 0, 0, 0, 0, 0], [0, 1023, 1024, 1025, 2**23, 1]])
    _, constant = CountLevels.of(counts).code(counts, np.array([2, 0, 1]))
    want = -scipy.special.gammaln(counts.toarray().astype(float) + 1).sum(1)
    np.testing.assert_allclose(constant, want[[2, 0, 1]], rtol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_a_census_over_parts_finds_the_levels_of_the_whole(seed):
    counts = COUNTS if seed == 0 else make_problem(seed=seed).counts
    census = CountCensus(counts.shape[1])
    for rows in np.array_split(np.random.default_rng(seed).permutation(counts.shape[0]), 4):
        census.add(counts[rows])
    census.add(counts[:0])
    got, want = census.levels(), CountLevels.of(counts)
    for field in fields(want):
        assert torch.equal(getattr(got, field.name), getattr(want, field.name))


@pytest.mark.parametrize(
    ("gene", "count"),
    [
        (0, 1),
        (0, 2),
        (0, 21),
        (3, 1),
        (1, 2),
        (2, 6),
        (2, 30),
        (4, 26),
        (4, 899),
        (4, 901),
        (5, 22),
        (5, 1e6),
    ],
)
def test_a_pair_that_is_not_listed_is_a_key_error(gene, count):
    row = np.zeros((1, 6))
    row[0, gene] = count
    counts, levels = csr(row), CountLevels.of(COUNTS)
    with pytest.raises(KeyError):
        levels.code(counts, np.array([0]))
    basis = Basis(SizeFactorNodes.spanning(np.array([1e4])), levels)
    with pytest.raises(KeyError):
        CellBatch.build(counts, np.array([1e4]), basis)


def test_a_pair_that_is_not_listed_is_found_in_any_row():
    levels = CountLevels.of(COUNTS)
    counts = sp.vstack([COUNTS, csr([[7, 0, 0, 0, 0, 0]])]).tocsr()
    levels.code(counts, np.arange(5))
    with pytest.raises(KeyError):
        levels.code(counts, np.array([1, 5, 2]))


@pytest.mark.parametrize("rows", [np.eye(3), np.zeros((2, 3))])
def test_pairs_of_counts_of_at_most_one_add_nothing_to_the_tables(rows):
    counts = csr(rows)
    levels = CountLevels.of(counts)
    n_pairs = counts.nnz
    assert (levels.n_pairs, levels.n_high) == (n_pairs, 0)
    assert coded(levels, counts).shape == (len(rows), n_pairs)
    table = pair_table(levels, torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(table, torch.zeros(n_pairs, 2, dtype=torch.float64))
    assert levels.reaching(torch.zeros(n_pairs, 2, dtype=torch.float64)).shape == (n_pairs, 2)


def test_only_counts_above_the_exact_ones_are_placed_and_found():
    counts = csr([[EXACT_COUNT + 1, 0], [EXACT_COUNT, 2 * EXACT_COUNT]])
    levels = CountLevels.of(counts)
    b = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    got = coded(levels, counts) @ pair_table(levels, b).numpy()
    d = log_rising_ratio(torch.from_numpy(counts.toarray()), b).numpy().sum(1)
    np.testing.assert_allclose(got[:, 0], d, rtol=1e-12)


def test_running_sum_adds_the_levels_of_the_same_gene(generator):
    levels = CountLevels.of(COUNTS)
    terms = torch.rand(levels.n_low, 2, dtype=torch.float64, generator=generator)
    got = levels.running_sum(terms)
    for i in range(levels.n_low):
        same = (levels.gene[: levels.n_low] == levels.gene[i]) & (levels.level <= levels.level[i])
        torch.testing.assert_close(got[i], terms[same].sum(0))


def test_reaching_adds_the_weights_of_the_larger_counts_of_the_same_gene(generator):
    levels = CountLevels.of(COUNTS)
    weights = torch.rand(levels.n_pairs, 2, dtype=torch.float64, generator=generator)
    got = levels.reaching(weights)
    for i in range(levels.n_low):
        above = (levels.gene == levels.gene[i]) & (levels.count > levels.level[i])
        torch.testing.assert_close(got[i], weights[above].sum(0))


def test_reaching_is_the_transpose_of_the_table(generator):
    """sum_c B_c D(c, r) = sum_t reaching_t ln(1 + t / r) + the tails, the identity of the M step."""
    levels = CountLevels.of(make_problem(seed=4).counts)
    weights = torch.rand(levels.n_pairs, 1, dtype=torch.float64, generator=generator)
    b = torch.rand(1, levels.n_genes, dtype=torch.float64, generator=generator)
    low_only = weights.clone()
    low_only[levels.n_low :] = 0
    want = (low_only * pair_table(levels, b)).sum()
    terms = torch.log1p(levels.level * torch.exp(-b[0, levels.gene[: levels.n_low]]))
    torch.testing.assert_close((levels.reaching(low_only)[:, 0] * terms).sum(), want)


def test_pair_table_is_the_log_rising_ratio_of_every_pair():
    levels = CountLevels.of(COUNTS)
    b = torch.linspace(-8, 12, 12, dtype=torch.float64).view(2, 6)
    want = log_rising_ratio(levels.count[:, None], b.T[levels.gene])
    torch.testing.assert_close(pair_table(levels, b), want, rtol=1e-11, atol=1e-14)


# ---- CellBatch and its products --------------------------------------------------------------------


def test_a_batch_survives_the_way_to_its_device(problem):
    prior, labels = np.full((40, 3), 1 / 3), np.arange(40)
    batch = CellBatch.build(
        problem.counts,
        problem.size_factors,
        problem.basis,
        rows=np.arange(40)[::-1].copy(),
        fold=2,
        prior=prior,
        labels=labels,
        keep=True,
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


@pytest.mark.parametrize("keep", [False, True])
def test_a_batch_holds_both_orientations_of_its_pairs(problem, keep):
    batch = CellBatch.build(problem.counts, problem.size_factors, problem.basis, keep=keep)
    assert (batch.pairs_t is not None) == keep
    eye = torch.eye(batch.n_cells, dtype=torch.float64)
    used = torch.eye(batch.used.numel(), dtype=torch.float64)
    assert torch.equal(batch.turned().matmul(eye).T, batch.pairs.matmul(used))


def test_a_batch_lists_the_pairs_that_occur_in_its_cells_alone(problem):
    rows = np.array([11, 3, 0])
    batch = CellBatch.build(problem.counts, problem.size_factors, problem.basis, pick=rows)
    marks = coded(problem.basis.levels, problem.counts, rows)
    np.testing.assert_array_equal(batch.used, np.flatnonzero(marks.any(0)))
    used = torch.eye(batch.used.numel(), dtype=torch.float64)
    np.testing.assert_array_equal(batch.pairs.matmul(used), marks[:, batch.used])
    assert batch.deepest == problem.counts[rows].sum(1).max()


@pytest.mark.parametrize("rows", [np.arange(40), np.array([39, 3, 11]), np.array([0]), np.arange(0)])
def test_a_batch_holds_all_of_its_counts(problem, rows):
    batch = CellBatch.build(problem.counts, problem.size_factors, problem.basis, pick=rows)
    levels = problem.basis.levels
    table = torch.zeros(batch.used.numel(), levels.n_genes)
    table[torch.arange(batch.used.numel()), levels.gene[batch.used]] = levels.count[batch.used].float()
    got = pair_product(batch, table)
    np.testing.assert_array_equal(got, problem.counts[rows].toarray())


@pytest.mark.parametrize("rows", [np.arange(40), np.array([39, 3, 11]), np.array([0]), np.arange(0)])
def test_picked_cells_make_the_batch_of_the_matrix_of_those_cells(problem, rows):
    picked = CellBatch.build(problem.counts, problem.size_factors, problem.basis, pick=rows, keep=True)
    cut = CellBatch.build(
        problem.counts[rows], problem.size_factors[rows], problem.basis, rows=rows, keep=True
    )
    for field in fields(CellBatch):
        mine, theirs = getattr(picked, field.name), getattr(cut, field.name)
        if isinstance(mine, CsrMatrix):
            assert (mine.n_rows, mine.n_columns) == (theirs.n_rows, theirs.n_columns)
            mine, theirs = (torch.cat([m.indptr, m.indices]) for m in (mine, theirs))
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


@pytest.mark.parametrize("keep", [False, True])
def test_the_product_with_the_pairs_has_the_gradient_of_its_transpose(problem, keep, generator):
    batch = CellBatch.build(
        problem.counts, problem.size_factors, problem.basis, pick=np.array([0, 5, 9]), keep=keep
    )
    table = torch.rand(batch.used.numel(), 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: pair_product(batch, t), (table,))


def test_cells_of_like_size_factors_need_few_nodes_and_interpolate_as_well(problem):
    order = np.argsort(problem.size_factors)
    rows = order[10:16]
    batch = CellBatch.build(problem.counts, problem.size_factors, problem.basis, pick=rows)
    assert batch.to_own.shape[0] == batch.weights.shape[1] < problem.basis.nodes.log_nodes.numel() / 2
    log_rho = torch.from_numpy(LOG_RHO)
    at_nodes = node_softplus(problem.basis.nodes, log_rho, torch.zeros_like(log_rho))
    got = batch.weights @ (at_nodes @ batch.to_own.T).T
    want = np.log1p(problem.size_factors[rows][:, None] * np.exp(LOG_RHO))
    np.testing.assert_allclose(got, want, rtol=2 * NODE_TOLERANCE)  # to the batch's nodes, and from them


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


def test_building_a_batch_leaves_the_counts_alone(problem):
    before = problem.counts.copy()
    CellBatch.build(problem.counts, problem.size_factors, problem.basis)
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


def deep_problem(depth, n_genes, log_range, seed=0):
    """A batch of cells of about ``depth`` counts, on the nodes of more spread out data, and its tables."""
    rng = np.random.default_rng(seed)
    s = depth * np.exp(rng.uniform(-log_range / 2, log_range / 2, 60))
    share = rng.dirichlet(np.ones(n_genes))
    counts = csr(np.minimum(rng.poisson(s[:, None] * share), 2**23))
    nodes = SizeFactorNodes.spanning(np.array([depth / 30, depth * 30]))
    basis = Basis(nodes, CountLevels.of(counts))
    log_mean = torch.from_numpy(np.log(share) + rng.normal(0, 2, (3, n_genes)))
    log_inv_disp = torch.from_numpy(rng.uniform(-8, 12, (3, n_genes)))
    return CellBatch.build(counts, s, basis), basis, likelihood_tables(basis, log_mean, log_inv_disp)


def in_both(batch, basis, tables):
    """(cells, K) of ``tables`` in float32, and the same in float64."""
    return (
        batch_log_likelihood(batch, basis, tables._replace(dtype=dtype))
        for dtype in (torch.float32, torch.float64)
    )


@pytest.mark.parametrize("log_range", [0.01, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("n_genes", [1, 10, 300])
@pytest.mark.parametrize("depth", [1e3, 1e4, 1e6])
def test_float32_sums_are_as_close_as_they_claim(depth, n_genes, log_range, monkeypatch):
    monkeypatch.setattr("nbmix.core.tables.FEWEST_CELLS_FOR_STEPS", 1)
    batch, basis, tables = deep_problem(depth, n_genes, log_range)
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


def test_values_are_cut_where_steps_between_nodes_would_round(monkeypatch):
    """Counts of 1e6 times steps of several nats: float32 sums of the steps are off by hundredths."""
    monkeypatch.setattr("nbmix.core.tables.FEWEST_CELLS_FOR_STEPS", 1)
    batch, basis, tables = deep_problem(1e6, 50, 3.0)
    narrow, wide = in_both(batch, basis, tables)
    assert (narrow - wide).abs().max() < 1e-3
    monkeypatch.setattr("nbmix.core.tables.FLOAT32_NATS", np.inf)
    uncut, _ = in_both(batch, basis, tables)
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
    for make in (_step_table, _split_table):
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

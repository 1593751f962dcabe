from __future__ import annotations

import numpy as np
import pytest
import torch

from nbmix.components import Components, expected_log_likelihood
from nbmix.data.simulate import simulated_count_data
from nbmix.products import Basis, CellBatch
from nbmix.statistics import SufficientStatistics
from tests.conftest import make_problem, reference_log_likelihood


def random_q(n_cells, n_components, generator):
    return torch.softmax(2 * torch.randn(n_cells, n_components, dtype=torch.float64, generator=generator), 1)


def collect(problem, q, rows=slice(None), dtype=torch.float64):
    batch = CellBatch.build(problem.counts[rows], problem.size_factors[rows], problem.basis.levels)
    return SufficientStatistics.collect(batch, problem.basis, q[rows], dtype)


def assert_same(got, want, rtol=1e-12, atol=1e-10):
    for mine, theirs in zip(got.tensors(), want.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def test_statistics_are_the_sums_they_are_defined_as(problem, generator):
    q = random_q(40, 3, generator)
    got = collect(problem, q)
    x = torch.from_numpy(problem.counts.toarray()).double()
    w = problem.basis.nodes.weights(torch.from_numpy(problem.size_factors))
    levels = problem.basis.levels
    gene = torch.cat([levels.gene, levels.high_gene])
    count = torch.cat([levels.level + 1, levels.high_count])
    want = SufficientStatistics(
        torch.einsum("im,ik,ij->mkj", w, q, x),
        torch.stack([((x[:, j] == c)[:, None] * q).sum(0) for j, c in zip(gene, count, strict=True)]),
        torch.einsum("im,ik->mk", w, q),
        q.sum(0),
    )
    assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_add_up_to_the_whole(problem, generator, dtype):
    q = random_q(40, 3, generator)
    total = SufficientStatistics.zeros(problem.basis, 3, "cpu")
    for rows in np.array_split(np.random.default_rng(0).permutation(40), 6):
        total.add_(collect(problem, q, rows, dtype))
    if dtype == torch.float64:
        assert_same(total, collect(problem, q))
    else:
        assert_same(total, collect(problem, q), rtol=1e-5, atol=1e-3)


def test_statistics_are_float64_also_from_float32_products(problem, generator):
    got = collect(problem, random_q(40, 3, generator).float(), dtype=torch.float32)
    assert {t.dtype for t in got.tensors()} == {torch.float64}


def test_total_minus_a_fold_is_the_other_folds(problem, generator):
    q = random_q(40, 3, generator)
    folds = np.array_split(np.random.default_rng(1).permutation(40), 4)
    parts = [collect(problem, q, rows) for rows in folds]
    total = parts[0] + parts[1] + parts[2] + parts[3]
    for f, part in enumerate(parts):
        others = np.concatenate([rows for g, rows in enumerate(folds) if g != f])
        assert_same(total - part, collect(problem, q, others))


def test_addition_and_subtraction_leave_their_terms_alone(problem, generator):
    q = random_q(40, 3, generator)
    one, two = collect(problem, q, slice(0, 20)), collect(problem, q, slice(20, 40))
    before = [t.clone() for t in one.tensors() + two.tensors()]
    _ = (one + two) - one * 2.0
    assert all(torch.equal(a, b) for a, b in zip(one.tensors() + two.tensors(), before, strict=True))


def test_scaled_statistics_are_those_of_scaled_cell_weights(problem, generator):
    q = random_q(40, 3, generator)
    assert_same(collect(problem, q) * 0.3, collect(problem, 0.3 * q))


def test_pooled_statistics_are_those_of_one_component(problem, generator):
    q = random_q(40, 3, generator)
    assert_same(collect(problem, q).pooled(), collect(problem, torch.ones(40, 1, dtype=torch.float64)))


def test_statistics_of_permuted_components_are_permuted(problem, generator):
    q = random_q(40, 3, generator)
    permuted, plain = collect(problem, q[:, [2, 0, 1]]), collect(problem, q)
    assert_same(permuted.pooled(), plain.pooled())
    torch.testing.assert_close(permuted.rate, plain.rate[:, [2, 0, 1]])
    torch.testing.assert_close(permuted.pair, plain.pair[:, [2, 0, 1]])


@pytest.mark.parametrize("seed", range(4))
def test_expected_log_likelihood_is_the_weighted_sum_for_any_components(seed, generator):
    """sum_i q_ik l_ik from the statistics alone, whatever the components, against the dense form."""
    problem = make_problem(seed=seed)
    rng = np.random.default_rng(seed)
    q = random_q(40, 3, generator)
    a = torch.from_numpy(rng.uniform(-16, -3, (3, 25)))
    b = torch.from_numpy(rng.uniform(-8, 12, (3, 25)))
    got = expected_log_likelihood(collect(problem, q), problem.basis, Components(a, b))
    got = got + problem.batch.constant @ q
    dense = torch.from_numpy(reference_log_likelihood(problem.counts.toarray(), problem.size_factors, a, b))
    torch.testing.assert_close(got, (q * dense).sum(0), rtol=1e-8, atol=0)


def test_weights_of_any_sign_are_collected_as_well(problem, generator):
    """The backward pass collects gradients, which are no probabilities."""
    q = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    components = Components(problem.log_mean, problem.log_inv_disp)
    got = expected_log_likelihood(collect(problem, q), problem.basis, components) + problem.batch.constant @ q
    dense = reference_log_likelihood(problem.counts.toarray(), problem.size_factors, *components)
    torch.testing.assert_close(got, (q * torch.from_numpy(dense)).sum(0), rtol=1e-7, atol=1e-6)


def test_a_batch_without_cells_adds_nothing():
    data = simulated_count_data(20, 10, 2)
    basis = Basis.of(data.counts, data.size_factors)
    batch = CellBatch.build(data.counts[:0], data.size_factors[:0], basis.levels)
    nothing = SufficientStatistics.collect(batch, basis, torch.zeros(0, 2, dtype=torch.float64))
    assert all(
        torch.equal(mine, zeros)
        for mine, zeros in zip(
            nothing.tensors(), SufficientStatistics.zeros(basis, 2, "cpu").tensors(), strict=True
        )
    )

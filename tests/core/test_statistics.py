from __future__ import annotations

import numpy as np
import pytest
import torch

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.expected_log_likelihood import curvature, expected_log_likelihood
from nbmix.core.nodes import NODE_TOLERANCE
from nbmix.core.parameters import Components
from nbmix.core.statistics import SufficientStatistics
from nbmix.data.simulate import simulated_count_data
from tests.helpers.elsewhere import back, elsewhere
from tests.helpers.problems import make_problem, reference_log_likelihood


def random_q(n_cells, n_components, generator):
    return torch.softmax(2 * torch.randn(n_cells, n_components, dtype=torch.float64, generator=generator), 1)


def collect(problem, q, rows=slice(None), dtype=torch.float64):
    batch = CellBatch.build(problem.counts[rows], problem.size_factors[rows], problem.basis)
    return SufficientStatistics.collect(batch, problem.basis, q[rows], dtype)


def assert_same(got, want, rtol=1e-12, atol=1e-10):
    for mine, theirs in zip(got.tensors(), want.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def assert_same_meaning(got, want, basis):
    """The same Q of any components, gradient and Hessian: batches interpolate at nodes of their own."""
    torch.testing.assert_close(got.pair, want.pair, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(got.weight, want.weight, rtol=1e-12, atol=1e-10)
    rng = np.random.default_rng(0)
    shape = got.rate.shape[1::-1]
    for _ in range(5):
        a, b = rng.uniform(-16, -3, shape), rng.uniform(-8, 12, shape)
        components = Components(torch.from_numpy(a), torch.from_numpy(b))
        mine, theirs = (curvature(statistics, basis, components) for statistics in (got, want))
        scale = theirs.value.abs() + 1
        for one, other in zip(mine, theirs, strict=True):
            assert ((one - other).abs() / scale).max() < NODE_TOLERANCE


@pytest.mark.parametrize("keep", [False, True])
def test_statistics_are_the_sums_they_are_defined_as(problem, generator, keep):
    q = random_q(40, 3, generator)
    batch = CellBatch.build(problem.counts, problem.size_factors, problem.basis, keep=keep)
    got = SufficientStatistics.collect(batch, problem.basis, q, torch.float64)
    x = torch.from_numpy(problem.counts.toarray()).double()
    w = problem.basis.nodes.weights(torch.from_numpy(problem.size_factors))
    levels = problem.basis.levels
    pairs = zip(levels.gene, levels.count, strict=True)
    want = SufficientStatistics(
        torch.einsum("im,ik,ij->jkm", w, q, x),
        torch.stack([((x[:, j] == c)[:, None] * q).sum(0) for j, c in pairs]),
        torch.einsum("im,ik->km", w, q),
        q.sum(0),
    )
    assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_gathered_as_on_other_devices(problem, generator, dtype):
    batch = CellBatch.build(problem.counts, problem.size_factors, problem.basis, pick=np.arange(5, 30))
    q = torch.rand(batch.n_cells, 3, dtype=torch.float64, generator=generator)
    mine, theirs = (SufficientStatistics.zeros(problem.basis, 3, "cpu") for _ in range(2))
    for statistics, given in ((mine, q), (theirs, elsewhere(q))):
        for _ in range(2):  # they add
            statistics.add_batch_(batch, problem.basis, given, dtype)
    theirs = SufficientStatistics(*(back(t) for t in theirs.tensors()))
    assert theirs.pair.sum() > 0
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for got, want in ((mine.rate, theirs.rate), (mine.pair, theirs.pair)):  # weights of both signs cancel
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.max()))


def test_batches_add_up_to_the_whole(problem, generator):
    q = random_q(40, 3, generator)
    narrow, wide = (SufficientStatistics.zeros(problem.basis, 3, "cpu") for _ in range(2))
    for rows in np.array_split(np.random.default_rng(0).permutation(40), 6):
        wide.add_(collect(problem, q, rows))
        narrow.add_(collect(problem, q, rows, torch.float32))
    assert_same_meaning(wide, collect(problem, q), problem.basis)
    assert_same(narrow, wide, rtol=1e-5, atol=1e-3)


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
        assert_same_meaning(total - part, collect(problem, q, others), problem.basis)


def test_a_fold_whose_cells_are_no_others_leaves_exactly_nothing_of_it(problem, generator):
    """The same batches in the same sums: no interpolation stands between them."""
    q = random_q(40, 3, generator)
    parts = [collect(problem, q, rows) for rows in np.array_split(np.arange(40), 4)]
    total = parts[0] + parts[1] + parts[2] + parts[3]
    for f, part in enumerate(parts):
        first, *others = (other for g, other in enumerate(parts) if g != f)
        for other in others:
            first = first + other
        assert_same(total - part, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adding_a_batch_is_adding_its_statistics(problem, generator, dtype):
    q = random_q(40, 3, generator)
    batch = CellBatch.build(problem.counts, problem.size_factors, problem.basis, pick=np.arange(7, 19))
    total = collect(problem, q)
    want = total + SufficientStatistics.collect(batch, problem.basis, q[7:19], dtype)
    assert_same(total.add_batch_(batch, problem.basis, q[7:19], dtype), want)


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
    batch = CellBatch.build(data.counts[:0], data.size_factors[:0], basis)
    nothing = SufficientStatistics.collect(batch, basis, torch.zeros(0, 2, dtype=torch.float64))
    assert all(
        torch.equal(mine, zeros)
        for mine, zeros in zip(
            nothing.tensors(), SufficientStatistics.zeros(basis, 2, "cpu").tensors(), strict=True
        )
    )


def test_sums_of_sets_are_statistics_of_summed_weights(problem, generator):
    q = random_q(40, 4, generator)
    members = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
    assert_same_meaning(collect(problem, q).summed(members), collect(problem, q @ members.T), problem.basis)


def test_the_complement_of_each_component_is_all_others(problem, generator):
    statistics = collect(problem, random_q(40, 3, generator))
    complements = statistics.summed(1 - torch.eye(3, dtype=torch.float64))
    assert_same_meaning(complements, statistics.others(), problem.basis)

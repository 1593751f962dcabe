from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.special
import torch

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.levels import CountCensus, CountLevels
from nbmix.core.nodes import SizeFactorNodes
from nbmix.core.special import EXACT_COUNT, log_rising_ratio
from nbmix.core.tables import (
    pair_table,
)
from tests.helpers.pairs import coded, csr
from tests.helpers.problems import make_problem

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

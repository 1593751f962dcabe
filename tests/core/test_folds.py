"""Cells in folds, in blocks of like size factors, and shared over ranks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from nbmix.core.folds import CELLS_A_PACK, CUT_TOLERANCE, copy_ranks, fold_blocks, packs_of
from nbmix.core.nodes import SizeFactorNodes


def some_sizes(n_cells, seed=0):
    """Size factors as of cells, one of them empty."""
    s = np.exp(np.random.default_rng(seed).normal(8, 0.6, n_cells))
    s[n_cells // 2] = 0
    return s


@pytest.mark.parametrize(
    ("n_cells", "folds", "block_size"), [(100, 5, 7), (103, 4, 1_000), (7, 7, 3), (50, 1, 8), (1, 1, 5)]
)
def test_fold_blocks_are_a_balanced_partition(n_cells, folds, block_size):
    blocks = fold_blocks(some_sizes(n_cells), folds, block_size, np.random.default_rng(0))
    rows = np.concatenate([rows for _, rows in blocks])
    np.testing.assert_array_equal(np.sort(rows), np.arange(n_cells))
    assert max(len(rows) for _, rows in blocks) <= block_size
    assert all((np.diff(rows) > 0).all() for _, rows in blocks)
    assert {fold for fold, _ in blocks} == ({-1} if folds == 1 else set(range(folds)))
    sizes = [sum(len(rows) for fold, rows in blocks if fold == f) for f in {fold for fold, _ in blocks}]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("n_cells", [0, 2])
def test_folds_without_cells_have_an_empty_block(n_cells):
    blocks = fold_blocks(np.full(n_cells, 1e4), 3, 5, np.random.default_rng(0))
    assert [fold for fold, _ in blocks] == [0, 1, 2]
    assert sum(len(rows) for _, rows in blocks) == n_cells


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("n_cells", "folds"), [(100, 5), (31, 3), (5, 4), (20, 1)])
def test_ranks_share_the_folds_without_overlap_in_as_many_blocks(n_cells, folds, world_size):
    s = some_sizes(n_cells)
    of_rank = [
        fold_blocks(s, folds, 4, np.random.default_rng(0), rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    together = [(fold, row) for blocks in of_rank for fold, rows in blocks for row in rows]
    alone = [(f, row) for f, rows in fold_blocks(s, folds, 4, np.random.default_rng(0)) for row in rows]
    assert sorted(together) == sorted(alone)
    assert len({tuple(fold for fold, _ in blocks) for blocks in of_rank}) == 1
    assert max(len(rows) for blocks in of_rank for _, rows in blocks) <= 4


@pytest.mark.parametrize("folds", [1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_ranks_have_as_much_work_in_few_folds_and_fit_the_copies_of_those(folds, world_size):
    s, fitters = some_sizes(480 * folds), copy_ranks(folds, world_size)
    met, work = [], []
    for rank in range(world_size):
        blocks = fold_blocks(s, folds, 100, np.random.default_rng(0), rank=rank, world_size=world_size)
        met.append({fold for fold, rows in blocks if rows.size})
        work.append([sum(s[rows].sum() for f, rows in blocks if max(f, 0) == fold) for fold in range(folds)])
    shares = np.array(work) / np.sum(work, axis=0)  # of each fold
    np.testing.assert_allclose(shares.sum(1), folds / world_size, rtol=0, atol=2 * folds * s.max() / s.sum())
    assert sum(map(len, met)) <= folds + world_size - 1
    assert all(max(fold, 0) in {max(f, 0) for f in met[fitters[fold]]} for fold in range(folds))
    fitted = np.bincount(fitters, minlength=world_size)
    assert fitted.sum() == (1 if folds == 1 else folds + 1)
    assert fitted.max() <= -(-fitted.sum() // world_size) + 1


def test_a_fold_that_ranks_share_is_cut_between_shallow_and_deep_cells():
    s = spread_sizes()
    first, second = (
        fold_blocks(s, 3, 10**6, np.random.default_rng(0), rank=rank, world_size=2) for rank in range(2)
    )
    shared = [[rows for fold, rows in blocks if fold == 1 and rows.size] for blocks in (first, second)]
    assert max(s[rows].max() for rows in shared[0]) <= min(s[rows].min() for rows in shared[1])
    alone = [rows for fold, rows in fold_blocks(s, 3, 10**6, np.random.default_rng(0)) if fold == 1]
    assert len(shared[0]) + len(shared[1]) <= len(alone) + 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_have_as_many_blocks_where_folds_are_cut_by_size_factor(world_size):
    s = spread_sizes()
    of_rank = [
        fold_blocks(s, 3, 1_000, np.random.default_rng(0), rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({tuple(fold for fold, _ in blocks) for blocks in of_rank}) == 1
    assert len(of_rank[0]) > 3 * 4_000 / 1_000 / world_size
    rows = np.concatenate([rows for blocks in of_rank for _, rows in blocks])
    np.testing.assert_array_equal(np.sort(rows), np.arange(s.size))


def spread_sizes(n_cells=12_000):
    """Shallow cells and deep ones, with a few far outside."""
    rng = np.random.default_rng(0)
    s = np.exp(rng.normal(np.where(rng.random(n_cells) < 0.5, 7.0, 10.0), 0.3))
    s[rng.choice(n_cells, 20, replace=False)] *= 30
    return s


@pytest.mark.parametrize(("folds", "block_size"), [(1, 10**6), (3, 10**6), (1, 500), (3, 500)])
def test_blocks_of_a_fold_do_not_overlap_in_their_size_factors(folds, block_size):
    s = spread_sizes()
    blocks = fold_blocks(s, folds, block_size, np.random.default_rng(0))
    assert len(blocks) > folds
    for fold in {fold for fold, _ in blocks}:
        ranges = sorted((s[rows].min(), s[rows].max()) for f, rows in blocks if f == fold and rows.size)
        assert all(one[1] <= other[0] for one, other in pairwise(ranges))


def test_an_outlying_size_factor_costs_most_other_cells_no_nodes():
    rng = np.random.default_rng(0)
    s = np.exp(rng.normal(8, 0.3, 5_000))
    s[17] *= 1_000
    blocks = fold_blocks(s, 1, 10**6, np.random.default_rng(0))
    usual = SizeFactorNodes.spanning(np.delete(s, 17), CUT_TOLERANCE).log_nodes.numel()
    assert SizeFactorNodes.spanning(s, CUT_TOLERANCE).log_nodes.numel() > 2 * usual
    needed = {
        len(rows): SizeFactorNodes.spanning(s[rows], CUT_TOLERANCE).log_nodes.numel() for _, rows in blocks
    }
    assert sum(size for size, nodes in needed.items() if nodes > usual) <= s.size / 4


def test_cells_of_one_size_factor_stay_in_one_block():
    assert len(fold_blocks(np.full(5_000, 1e4), 1, 10**6, np.random.default_rng(0))) == 1


def test_an_empty_cell_leaves_the_blocks_of_the_others_as_they_are():
    s = spread_sizes(4_000)
    with_empty = fold_blocks(np.append(s, 0.0), 1, 10**6, np.random.default_rng(0))
    without = fold_blocks(s, 1, 10**6, np.random.default_rng(0))
    assert len(with_empty) == len(without)
    nodes = [
        [SizeFactorNodes.spanning(sizes[rows]).log_nodes.numel() for _, rows in blocks]
        for sizes, blocks in ((np.append(s, 0.0), with_empty), (s, without))
    ]
    assert nodes[0] == nodes[1]


def test_fold_blocks_follow_their_generator():
    def draw(seed):
        blocks = fold_blocks(some_sizes(60), 3, 9, np.random.default_rng(seed))
        return np.concatenate([rows for _, rows in blocks])

    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


def test_small_origins_share_a_pack_and_large_ones_have_their_own():
    n_cells = np.array([CELLS_A_PACK // 2, CELLS_A_PACK // 2, 3 * CELLS_A_PACK, 5, 7])
    packs = packs_of(n_cells)
    assert packs.tolist() == [0, 0, 1, 2, 2]
    origins = np.random.default_rng(0).permutation(np.repeat(np.arange(5), n_cells))
    blocks = fold_blocks(some_sizes(origins.size), 3, 400, np.random.default_rng(1), origins=origins)
    of_blocks = [np.unique(packs[origins[rows]]) for _, rows in blocks]
    assert all(packs.size == 1 for packs in of_blocks)
    assert np.all(np.diff([int(packs[0]) for packs in of_blocks]) >= 0)
    assert sorted(np.concatenate([rows for _, rows in blocks])) == list(range(origins.size))

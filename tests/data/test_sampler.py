"""Shuffled batches: every cell once an epoch over all ranks, and the same again after a resume."""

from __future__ import annotations

import numpy as np
import pytest

from nbmix.data.sampler import BatchSchedule, ShuffledBatches

ROWS = np.arange(5, 42)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_all_ranks_together_see_every_cell_once(world_size, batch_size):
    ranks = [list(ShuffledBatches(ROWS, batch_size, 0, rank, world_size)) for rank in range(world_size)]
    seen = np.concatenate([batch for batches in ranks for batch in batches])
    assert np.array_equal(np.sort(seen), ROWS)
    assert len({len(batches) for batches in ranks}) == 1  # or the ranks would wait for each other
    assert max(len(batch) for batches in ranks for batch in batches) <= batch_size


@pytest.mark.parametrize("n_cells", [2, 25, 37])
def test_ranks_share_the_batches_of_one_process(n_cells):
    whole = ShuffledBatches(ROWS[:n_cells], 12, 0)
    ranks = [ShuffledBatches(ROWS[:n_cells], 4, 0, rank, 3) for rank in range(3)]
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert sorted(batch) == sorted(np.concatenate(shares))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_length_is_the_number_of_batches():
    sampler = ShuffledBatches(ROWS, 4, 0, rank=1, world_size=2)
    assert len(sampler) == len(list(sampler))


def test_order_follows_seed_and_epoch_alone():
    def epoch(number: int, seed: int = 0) -> list[int]:
        sampler = ShuffledBatches(ROWS, 4, seed)
        sampler.set_epoch(number)
        return np.concatenate(list(sampler)).tolist()

    assert epoch(3) == epoch(3)
    assert epoch(3) != epoch(2)
    assert epoch(3) != epoch(3, seed=1)


def test_the_epoch_may_be_set_until_the_first_batch_is_asked_for():
    # Lightning does so when it resumes
    sampler, whole = ShuffledBatches(ROWS, 4, 0), ShuffledBatches(ROWS, 4, 0)
    batches = iter(sampler)
    sampler.set_epoch(2)
    whole.set_epoch(2)
    assert np.array_equal(next(batches), next(iter(whole)))


ORIGINS = np.repeat([2, 0, 1], [20, 14, 3])


@pytest.mark.parametrize("world_size", [1, 3])
def test_batches_are_of_one_origin(world_size):
    ranks = [
        list(ShuffledBatches(ROWS, 4, 0, rank, world_size, origins=ORIGINS)) for rank in range(world_size)
    ]
    seen = np.concatenate([batch for batches in ranks for batch in batches])
    assert np.array_equal(np.sort(seen), ROWS)
    for shares in zip(*ranks, strict=True):
        cells = np.concatenate(shares)
        assert len(set(ORIGINS[cells - 5])) == 1
        assert cells.size <= 4 * world_size


def test_batches_of_origins_take_turns_at_random():
    sampler = ShuffledBatches(ROWS, 2, 0, origins=ORIGINS)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append([int(ORIGINS[batch[0] - 5]) for batch in sampler])
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    assert len(sampler) == 19


@pytest.mark.parametrize(
    "n_cells, batch, epochs",
    [(1, 64, 1), (3_400, 64, 1), (32_768, 512, 1), (32_769, 512, 2), (10**6, 1024, 31)],
)
def test_auto_takes_larger_batches_and_shares_of_a_pass_of_more_cells(n_cells, batch, epochs):
    assert BatchSchedule.of("auto", n_cells) == (batch, epochs)
    assert BatchSchedule.of("auto", n_cells, world_size=4) == (batch, epochs)  # of all ranks


def test_a_number_is_that_of_each_rank_and_an_epoch_is_a_pass():
    assert BatchSchedule.of(64, 10**6, world_size=2) == (128, 1)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("has_origins", [False, True])
def test_epochs_share_out_a_pass(world_size, has_origins):
    rows = np.arange(40_003)
    origins = np.minimum(rows, 2) if has_origins else None  # two of a single cell

    def epoch(number: int) -> list[list[np.ndarray]]:
        ranks = [
            ShuffledBatches(rows, "auto", 0, rank, world_size, origins=origins) for rank in range(world_size)
        ]
        for sampler in ranks:
            sampler.set_epoch(number)
        assert {len(sampler) for sampler in ranks} == {len(ShuffledBatches(rows, "auto", 0, origins=origins))}
        return [list(sampler) for sampler in ranks]

    seen = [np.concatenate([b for ranks in epoch(number) for b in ranks]) for number in range(4)]
    for first in (0, 2):
        assert np.array_equal(np.sort(np.concatenate(seen[first : first + 2])), rows)
    assert set(seen[0]) != set(seen[2])

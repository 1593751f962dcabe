"""Splits, folds and shards of the cells."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from nbmix.data.module import CountsDataModule, from_h5ad, from_simulation
from nbmix.errors import InputError
from tests.helpers.running import small_data


def module(data=None, rank=0, world_size=1, device="cpu", **settings):
    made = CountsDataModule(lambda: data or small_data(), **settings)
    made.setup()
    made.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        strategy=SimpleNamespace(root_device=torch.device(device)),
        training=True,
    )
    return made


def rows_of(loader):
    return np.concatenate([batch.rows.numpy() for batch in loader])


def test_split_is_a_partition_that_the_seed_alone_decides():
    data = small_data()
    first, again = module(data, seed=1), module(replace(data, labels=data.labels[::-1]), seed=1)
    assert np.array_equal(np.sort(np.r_[first.training_rows, first.validation_rows]), np.arange(60))
    assert first.validation_rows.size == 6
    assert np.array_equal(first.validation_rows, again.validation_rows)
    assert np.array_equal(first.validation_rows, module(replace(data, labels=None), seed=1).validation_rows)
    assert not np.array_equal(first.validation_rows, module(data, seed=2).validation_rows)


def test_nothing_held_out():
    data = module(validation_share=0.0)
    assert data.training_data is data.data
    assert data.val_dataloader() == []


def test_training_data_are_the_training_cells():
    data = module()
    assert np.array_equal(data.training_data.cell_names, data.data.cell_names[data.training_rows])
    assert np.array_equal(data.training_data.positions, data.training_rows)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("folds", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_hold_every_cell_once(shuffle, folds, world_size):
    settings = {"shuffle": shuffle, "folds": folds, "batch_size": 7}
    ranks = [module(rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    whole = ranks[0]
    for loader, expected in (
        ("train_dataloader", whole.training_rows),
        ("val_dataloader", whole.validation_rows),
        ("predict_dataloader", np.arange(60)),
    ):
        batches = [list(getattr(rank, loader)()) for rank in ranks]
        seen = np.concatenate([batch.rows.numpy() for rank in batches for batch in rank])
        assert np.array_equal(np.sort(seen), expected), loader
        if loader != "predict_dataloader":
            assert len({len(rank) for rank in batches}) == 1, loader


@pytest.mark.parametrize("world_size", [1, 2])
def test_folds_do_not_depend_on_the_ranks(world_size):
    def fold_of(ranks):
        return {
            int(row): batch.fold for rank in ranks for batch in rank.train_dataloader() for row in batch.rows
        }

    ranks = [module(rank=r, world_size=world_size, folds=3) for r in range(world_size)]
    whole = fold_of([module(folds=3)])
    assert fold_of(ranks) == whole
    assert sorted(np.bincount(list(whole.values())).tolist()) == [18, 18, 18]


def test_held_out_cells_belong_to_no_fold():
    data = module(folds=3)
    assert all(batch.fold == -1 for batch in data.val_dataloader())
    folds = {int(row): batch.fold for batch in data.predict_dataloader() for row in batch.rows}
    assert {folds[row] for row in data.validation_rows} == {-1}


def test_batches_hold_what_the_data_holds():
    source = replace(small_data(), prior=np.full((60, 2), 0.5))
    data = module(source, batch_size=11)
    for batch in data.train_dataloader():
        rows = batch.rows.numpy()
        levels, pairs = data.basis.levels, batch.pairs
        codes = batch.used[pairs.indices]
        parts = (levels.count[codes].numpy(), levels.gene[codes].numpy(), pairs.indptr.numpy())
        held = sp.csr_matrix(parts, shape=(len(rows), source.n_genes))
        assert np.array_equal(held.toarray(), source.counts[rows].toarray())
        assert np.array_equal(batch.size_factors.numpy(), source.size_factors[rows])
        assert batch.log_prior.shape == (len(rows), 2)
        assert np.array_equal(batch.labels.numpy(), np.unique(source.labels, return_inverse=True)[1][rows])


def test_fixed_batches_are_made_once():
    data = module(batch_size=20)
    first, second = list(data.train_dataloader()), list(data.train_dataloader())
    assert all(a is b for a, b in zip(first, second, strict=True))


def test_minibatches_are_cut_on_the_device():
    for device in ("cpu", "meta"):
        batches = list(module(shuffle=True, batch_size=16, device=device).train_dataloader())
        assert sum(batch.n_cells for batch in batches) == 54
        assert {batch.pairs.indices.device.type for batch in batches} == {device}


def test_fixed_batches_stay_on_the_device_until_the_fit_ends():
    data, meta = module(folds=3), torch.device("meta")
    (first, *_), (held_out,) = data.train_dataloader(), data.val_dataloader()
    moved = data.transfer_batch_to_device(first, meta, 0)
    assert moved.pairs.indices.device.type == "meta"
    assert data.transfer_batch_to_device(first, meta, 0) is moved
    data.trainer.training = False
    assert data.transfer_batch_to_device(held_out, meta, 0).size_factors.device.type == "meta"
    data.trainer.training = True
    data.teardown("fit")
    assert data.transfer_batch_to_device(first, meta, 0) is not moved


def test_data_is_read_once():
    calls = []
    data = CountsDataModule(lambda: calls.append(1) or small_data())
    data.setup("fit")
    data.setup("predict")
    assert calls == [1]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"batch_size": 0}, r"data\.batch_size=0"),
        ({"validation_share": 1.0}, r"data\.validation_share=1"),
        ({"validation_share": -0.1}, r"data\.validation_share"),
        ({"folds": 55}, r"model\.folds=55: there are only 54 cells"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(InputError, match=words):
        module(**settings)


def test_size_factors_that_no_experiment_has():
    data = small_data()
    size_factors = data.size_factors.copy()
    size_factors[0] = 1e-9
    with pytest.raises(InputError, match=r"size factors range from 1e-09.*data\.size_factor_key"):
        module(replace(data, size_factors=size_factors))


def test_the_file_is_read_at_setup_not_before():
    data = from_h5ad("/no/such.h5ad", batch_size=8)
    with pytest.raises(InputError, match="no such file"):
        data.setup()


def test_simulation_has_its_own_seed():
    def counts(seed, simulation_seed):
        data = from_simulation(
            n_cells=10, n_genes=20, n_components=2, simulation_seed=simulation_seed, seed=seed
        )
        return data.data.counts.toarray()

    assert np.array_equal(counts(0, 1), counts(5, 1))
    assert counts(0, 1).shape != counts(0, 2).shape or not np.array_equal(counts(0, 1), counts(0, 2))


@pytest.mark.parametrize("folds", [1, 4])
def test_cell_folds_are_those_of_the_batches(folds):
    made = module(folds=folds, batch_size=7, seed=3)
    wanted = np.full(60, -1)
    for batch in made.train_dataloader():
        wanted[batch.rows] = batch.fold
    np.testing.assert_array_equal(made.cell_folds, wanted)
    assert (made.cell_folds[made.validation_rows] == -1).all()

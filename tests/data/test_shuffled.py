"""Random batches from a file: every training cell once a pass, of blocks that are read once each."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import nbmix
from nbmix.data.module import CountsDataModule
from nbmix.data.read import read_h5ad
from nbmix.data.shuffled import cut_into_blocks
from tests.helpers.running import NO_PICTURES, run_here

N_CELLS = 400
COUNTS = nbmix.simulate(n=N_CELLS, p=30, k=2, s=1e3, seed=2).counts
DONORS = np.where(np.arange(N_CELLS) < 250, "a", np.where(np.arange(N_CELLS) % 9 == 0, "rare", "b"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    adata = ad.AnnData(COUNTS, obs=pd.DataFrame({"donor": DONORS}, index=[f"c{i}" for i in range(N_CELLS)]))
    adata.obs["cell_type"] = np.where(DONORS == "a", "x", "y")
    path = tmp_path_factory.mktemp("shuffled") / "cells.h5ad"
    adata.write_h5ad(path)
    return path


def module(path, *, backed=True, batch_size=16, rank=0, world_size=1, validation_share=0.1, **reading):
    data = read_h5ad(path, backed=backed, **({"slab_nonzeros": 1600} if backed else {}), **reading)
    made = CountsDataModule(
        lambda: data, batch_size=batch_size, shuffle=True, validation_share=validation_share, seed=3
    )
    made.setup()
    if world_size > 1:
        made.trainer = type("Trainer", (), {"global_rank": rank, "world_size": world_size})()
    return made


def epoch(made, number=0):
    loader = made.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def rows_of(batches):
    return [batch.rows.tolist() for batch in batches]


def cells_in(batches):
    return sorted(row for rows in batches for row in rows)


def test_an_epoch_has_every_training_cell_once_as_it_is(path):
    made = module(path)
    batches = epoch(made)
    assert cut_into_blocks(made.data)[1].max() > 20  # several rounds
    assert len(batches) == len(made.train_dataloader())
    assert cells_in(rows_of(batches)) == made.training_rows.tolist()
    memory = module(path, backed=False)
    cells = memory.train_dataloader().dataset
    for batch in batches:
        expected = cells[batch.rows.numpy()]
        np.testing.assert_array_equal(batch.pairs.indices, expected.pairs.indices)
        np.testing.assert_array_equal(batch.constant, expected.constant)
        np.testing.assert_array_equal(batch.labels, expected.labels)


def test_the_order_follows_from_seed_and_epoch(path):
    made = module(path)
    first, second = rows_of(epoch(made, 0)), rows_of(epoch(made, 1))
    assert first != second
    assert rows_of(epoch(module(path), 1)) == second
    # an epoch that ended in the midst leaves nothing behind
    loader = made.train_dataloader()
    next(iter(loader))
    loader.sampler.set_epoch(1)
    assert rows_of(loader) == second


def test_a_batch_holds_cells_of_several_blocks_but_of_few(path):
    made = module(path)
    block = cut_into_blocks(made.data)[1]
    spread = [np.unique(block[rows]).size for rows in rows_of(epoch(made))]
    assert np.median(spread) > 5
    assert max(spread) <= 2 * 16  # of two rounds at most


def test_ranks_share_the_batches_of_one_process(path):
    whole = rows_of(epoch(module(path, batch_size=32)))
    ranks = [rows_of(epoch(module(path, rank=rank, world_size=2))) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(whole)
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(rows) for rows in whole]


def test_cells_of_a_batch_have_one_origin(path):
    made = module(path, batch_key="donor")
    batches = rows_of(epoch(made))
    assert cells_in(batches) == made.training_rows.tolist()
    assert all(np.unique(DONORS[rows]).size == 1 for rows in batches)
    origins = [DONORS[rows[0]] for rows in batches]
    assert set(origins) == {"a", "b", "rare"}
    assert origins != sorted(origins)


def test_a_pass_may_take_several_epochs(path):
    made = module(path, validation_share=0.0)
    loader = made.train_dataloader()
    loader.sampler.batches.schedule = loader.sampler.batches.schedule._replace(epochs_a_pass=3)
    parts = []
    for number in range(3):
        loader.sampler.set_epoch(number)
        parts.append(rows_of(loader))
    assert len({len(batches) for batches in parts}) == 1
    assert cells_in(batch for batches in parts for batch in batches) == list(range(N_CELLS))


def test_held_out_cells_and_predictions_come_from_the_file_too(path):
    made = module(path)
    held_out = cells_in(rows_of(made.val_dataloader()))
    assert held_out == made.validation_rows.tolist()
    assert cells_in(rows_of(made.predict_dataloader())) == list(range(N_CELLS))


@pytest.mark.parametrize("model", ["amortized", "gmvae"])
def test_models_of_random_batches_fit_and_go_on_from_the_file(path, tmp_path, model):
    settings = (
        *("data=h5ad", f"data.path={path}", "data.backed=true", "+data.slab_nonzeros=1600"),
        *(f"model={model}", "model.n_components=2", "start=labels", NO_PICTURES),
    )
    if model == "amortized":
        settings += ("data.batch_key=donor",)
    whole = run_here(tmp_path / "whole", *settings, "trainer.max_epochs=2")
    run_here(tmp_path / "part", *settings, "trainer.max_epochs=1")
    last = f"ckpt_path={tmp_path}/part/checkpoints/last.ckpt"
    rest = run_here(tmp_path / "rest", *settings, "trainer.max_epochs=2", last)
    assert {**rest, "seconds": 0} == {**whole, "seconds": 0}
    assert np.isfinite(whole["heldout_log_likelihood"])
    result = ad.read_h5ad(tmp_path / "rest" / "result.h5ad")
    assert np.isfinite(result.obsm["X_nbmix"]).all()

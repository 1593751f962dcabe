"""Starts from files: responsibilities, means, checkpoints."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from nbmix.core.parameters import Components
from nbmix.core.settings import MixtureSettings
from nbmix.data.checkpoint import SECTION
from nbmix.data.module import CountsDataModule
from nbmix.errors import InputError
from nbmix.models.mixture_em import MixtureEM
from nbmix.starts.given import CheckpointStart, MeansStart, ResponsibilitiesStart
from nbmix.training.saved_fit import Progress, SavedFit, save_fit
from tests.helpers.running import small_data

SETTINGS = MixtureSettings(2)


def generator():
    return np.random.default_rng(0)


def saved(path, array):
    np.save(path, array)
    return str(path)


def test_responsibilities_are_normalised(tmp_path):
    weights = np.random.default_rng(1).uniform(size=(60, 2))
    make = ResponsibilitiesStart(saved(tmp_path / "q.npy", weights))
    q = make(small_data(), SETTINGS, generator()).responsibilities
    np.testing.assert_allclose(q.numpy(), weights / weights.sum(1, keepdims=True), rtol=1e-15)


def test_rows_of_the_file_are_those_of_the_whole_data(tmp_path):
    weights = np.random.default_rng(1).dirichlet([1, 1], 60)
    rows = np.array([3, 7, 50])
    make = ResponsibilitiesStart(saved(tmp_path / "q.npy", weights))
    q = make(small_data().select_cells(rows), SETTINGS, generator()).responsibilities
    np.testing.assert_allclose(q.numpy(), weights[rows], rtol=1e-15)


@pytest.mark.parametrize(
    "array, words",
    [
        (np.ones((59, 2)), r"has shape \(59, 2\); the cells and components need \(60, 2\)"),
        (np.ones((60, 3)), r"need \(60, 2\)"),
        (np.full((60, 2), np.nan), "finite"),
        (np.full((60, 2), -1.0), "not negative"),
        (np.zeros((60, 2)), "not all 0"),
        (np.ones(60), "two-dimensional"),
        (np.full((60, 2), "a"), "numbers"),
    ],
)
def test_bad_responsibilities(array, words, tmp_path):
    make = ResponsibilitiesStart(saved(tmp_path / "q.npy", array))
    with pytest.raises(InputError, match=words):
        make(small_data(), SETTINGS, generator())


def test_means_are_taken_as_they_are(tmp_path):
    data = small_data()
    mean = np.exp(np.random.default_rng(1).uniform(-9, -5, (2, data.n_genes)))
    mean[0, 0] = 0  # gets the floor
    components = MeansStart(saved(tmp_path / "m.npy", mean), 2.5)(data, SETTINGS, generator()).components
    np.testing.assert_allclose(components.log_mean.exp().numpy()[mean > 0], mean[mean > 0], rtol=1e-12)
    assert -30 < float(components.log_mean[0, 0]) < -9
    assert set(components.log_inv_disp.unique().tolist()) == {2.5}


@pytest.mark.parametrize("shape, value", [((2, 3), 1.0), ((2, None), np.inf), ((2, None), -1.0)])
def test_bad_means(shape, value, tmp_path):
    data = small_data()
    path = saved(tmp_path / "m.npy", np.full((shape[0], shape[1] or data.n_genes), value))
    with pytest.raises(InputError, match=r"start\.path="):
        MeansStart(path)(data, SETTINGS, generator())


@pytest.mark.parametrize("make", [ResponsibilitiesStart, MeansStart])
def test_files_that_are_no_array(make, tmp_path):
    text, archive = tmp_path / "text.npy", tmp_path / "archive.npz"
    text.write_text("not an array")
    np.savez(archive, a=np.ones(2))
    for path in (tmp_path / "missing.npy", text, archive, tmp_path):
        with pytest.raises(InputError, match=r"start\.path=") as refused:
            make(str(path))(small_data(), SETTINGS, generator())
        assert "\n" not in str(refused.value)


@pytest.fixture
def checkpoint(tmp_path):
    """(path, model) of components for all genes but the last, in reverse order."""
    data = small_data()
    model = MixtureEM(data.gene_names[:-1][::-1], n_components=2, folds=1)
    shape = (2, data.n_genes - 1)
    draw = torch.Generator().manual_seed(0)
    model.mixture.set_components(
        Components(torch.rand(shape, generator=draw) - 9, torch.rand(shape, generator=draw))
    )
    content = {"state_dict": model.state_dict()}
    content[SECTION] = {
        "model": "em",
        "settings": model.plain,
        "gene_names": model.gene_names.tolist(),
        "median_size_factor": 1e3,
        "cells": "",
    }
    torch.save(content, tmp_path / "a.ckpt")
    return str(tmp_path / "a.ckpt"), model


def test_genes_of_a_checkpoint_are_matched_by_name(checkpoint):
    path, model = checkpoint
    data = small_data()
    components = CheckpointStart(path)(data, SETTINGS, generator()).components
    assert torch.equal(components.log_mean[:, :-1].flip(1), model.mixture.components().log_mean)
    assert torch.equal(components.log_inv_disp[:, :-1].flip(1), model.mixture.components().log_inv_disp)
    pooled = np.log(data.counts[:, -1].sum() / data.size_factors.sum())
    np.testing.assert_allclose(components.log_mean[:, -1].numpy(), pooled, rtol=1e-6)


def test_genes_that_are_silent_in_the_cells_to_fit(checkpoint):
    data = small_data()
    dense = data.counts.toarray()
    dense[:, -1] = 0
    silent = replace(data, counts=sp.csr_matrix(dense))
    components = CheckpointStart(checkpoint[0])(silent, SETTINGS, generator()).components
    assert torch.isfinite(components.log_mean).all()


def test_a_checkpoint_with_another_number_of_components(checkpoint):
    with pytest.raises(InputError, match=r"holds 2 components; set model\.n_components=2"):
        CheckpointStart(checkpoint[0])(small_data(), MixtureSettings(3), generator())


def test_batches_of_a_checkpoint_are_matched_by_name(tmp_path):
    data = replace(small_data(), origins=np.arange(60) % 2, origin_names=("b", "new"))
    model = MixtureEM(data.gene_names[::-1], n_components=2, folds=3)
    model.know_origins(("a", "b"))
    model.mixture.origins.offsets.normal_(generator=torch.Generator().manual_seed(0))
    module = CountsDataModule(lambda: data)
    module.setup()
    fitted = model.as_checkpoint(module, model.state_dict())
    save_fit(tmp_path / "a.ckpt", SavedFit(fitted, Progress.of(model), {}))
    offsets, variance = CheckpointStart(tmp_path / "a.ckpt")(data, SETTINGS, generator()).offsets
    assert torch.equal(offsets[0].flip(0), model.mixture.origins.offsets[-1, 1])
    assert not offsets[1].any()
    assert torch.equal(variance.flip(0), model.mixture.origins.variance[-1])
    assert CheckpointStart(tmp_path / "a.ckpt")(small_data(), SETTINGS, generator()).offsets is None

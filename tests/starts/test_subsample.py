"""Starts from a part of the cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from nbmix.core.settings import MixtureSettings
from nbmix.errors import InputError
from nbmix.starts.base import new_mixture, prepare
from nbmix.starts.random import RandomStart
from nbmix.starts.subsample import FirstBatchStart, SubsampleStart
from tests.helpers.running import small_data


def generator():
    return np.random.default_rng(0)


def assigned(data, components):
    basis, batches = prepare(data, 1, generator())
    mixture = new_mixture(data, MixtureSettings(components.log_mean.shape[0], folds=1), basis)
    mixture.set_components(components)
    (batch,) = batches
    return mixture.posterior(batch).responsibilities.argmax(1).numpy()


@pytest.mark.parametrize("folds", [1, 5])
@pytest.mark.parametrize("inner", [None, RandomStart(n_starts=2)], ids=["kmeans", "random"])
def test_components_of_a_part_divide_the_whole(folds, inner):
    data = small_data(n_cells=90)
    given = {} if inner is None else {"inner": inner}
    make = SubsampleStart(n_cells=50, iterations=10, folds=folds, **given)
    start = make(data, MixtureSettings(2), generator())
    assert start.responsibilities is None
    assert adjusted_rand_score(data.labels, assigned(data, start.components)) == 1


def test_no_more_components_than_cells_of_the_part():
    with pytest.raises(InputError, match=r"start\.n_cells=4: too few for model\.n_components=5"):
        SubsampleStart(n_cells=4)(small_data(), MixtureSettings(5), generator())


@pytest.mark.parametrize("setting", ["n_cells", "iterations", "folds"])
def test_bad_settings(setting):
    with pytest.raises(InputError, match=rf"start\.{setting}=0"):
        SubsampleStart(**{setting: 0})


def test_first_batch_gives_components_that_differ():
    start = FirstBatchStart(n_cells=20)(small_data(), MixtureSettings(2), generator())
    assert start.responsibilities is None
    first, second = start.components.log_mean
    assert torch.isfinite(start.components.log_mean).all()
    assert not torch.equal(first, second)

"""The random start: ranked by held-out likelihood, blind to labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from nbmix.errors import InputError
from nbmix.mixture import MixtureSettings
from nbmix.start.random import RandomStart
from tests.running import small_data


def generator():
    return np.random.default_rng(0)


def test_finds_the_groups_of_a_simulation():
    data = small_data()
    start = RandomStart(n_starts=3, iterations=15)(data, MixtureSettings(2), generator())
    assert start.responsibilities is not None and start.components is not None
    assert adjusted_rand_score(data.labels, start.responsibilities.argmax(1).numpy()) == 1
    assert start.components.log_mean.shape == (2, data.n_genes)


def test_labels_are_not_seen():
    data, make = small_data(), RandomStart(n_starts=2, iterations=3)
    with_labels = make(data, MixtureSettings(2), generator())
    for other in (replace(data, labels=None), replace(data, labels=data.labels[::-1])):
        without = make(other, MixtureSettings(2), generator())
        assert torch.equal(with_labels.components.log_mean, without.components.log_mean)


def test_cells_beyond_max_cells_get_components_alone():
    start = RandomStart(n_starts=2, iterations=2, max_cells=30)(small_data(), MixtureSettings(2), generator())
    assert start.responsibilities is None
    assert start.components is not None


def test_the_best_run_by_held_out_likelihood_is_taken(caplog):
    with caplog.at_level("INFO", "nbmix.start.random"):
        three = RandomStart(n_starts=3, iterations=4)(small_data(), MixtureSettings(2), generator())
    scores = caplog.records[-1].args[1]
    best = int(np.argmax(scores)) + 1
    # the runs draw one after the other, so as many runs as the best one's place end with the same start
    same = RandomStart(n_starts=max(best, 2), iterations=4)(small_data(), MixtureSettings(2), generator())
    assert len(scores) == 3
    assert torch.equal(three.components.log_mean, same.components.log_mean)


@pytest.mark.parametrize("make, n_components", [(RandomStart(n_starts=1), 2), (RandomStart(), 1)])
def test_plain_random_responsibilities(make, n_components):
    start = make(small_data(), MixtureSettings(n_components), generator())
    assert start.components is None
    assert start.responsibilities.shape == (60, n_components)


def test_annealed_runs():
    make = RandomStart(n_starts=2, iterations=12, anneal_from=0.1, anneal_growth=1.5)
    start = make(small_data(), MixtureSettings(2), generator())
    assert torch.isfinite(start.components.log_mean).all()


@pytest.mark.parametrize(
    "setting",
    [
        {"n_starts": 0},
        {"iterations": 0},
        {"max_cells": 0},
        {"folds": 1},
        {"anneal_from": 0.0},
        {"anneal_from": 1.5},
        {"anneal_growth": 1.0},
    ],
    ids=str,
)
def test_bad_settings(setting):
    with pytest.raises(InputError, match=rf"start\.{next(iter(setting))}="):
        RandomStart(**setting)


def test_rare_genes_wait_at_their_pooled_mean():
    data = small_data()
    totals = np.asarray(data.counts.sum(0)).ravel()
    rare = totals < 1.5 * data.n_cells
    assert rare.any() and not rare.all()
    start = RandomStart(n_starts=2, iterations=3, gene_share=1.5)(data, MixtureSettings(2), generator())
    pooled = torch.from_numpy(np.log(totals / data.size_factors.sum()))
    means = start.components.log_mean
    torch.testing.assert_close(means[:, rare], pooled[rare].expand(2, -1), rtol=1e-12, atol=0)
    assert not torch.allclose(means[0, ~rare], means[1, ~rare])


def test_the_best_run_goes_on_with_more_cells_where_there_are_many():
    data = small_data()
    few = RandomStart(n_starts=2, iterations=3, max_cells=20, refine_cells=60)
    more = replace(few, refine_cells=30)
    starts = [make(data, MixtureSettings(2), generator()) for make in (few, more)]
    assert not torch.equal(starts[0].components.log_mean, starts[1].components.log_mean)
    assert starts[1].responsibilities is None

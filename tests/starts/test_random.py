"""The random start: ranked by held-out likelihood, blind to labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import kstest
from sklearn.metrics import adjusted_rand_score

from nbmix.core.settings import MixtureSettings
from nbmix.data.counts import CountData
from nbmix.errors import InputError
from nbmix.starts.random import DirichletStart, RandomStart
from tests.helpers.running import small_data


def generator():
    return np.random.default_rng(0)


def test_finds_the_groups_of_a_simulation():
    data = small_data()
    start = RandomStart()(data, MixtureSettings(2), generator())
    assert adjusted_rand_score(data.labels, start.responsibilities.argmax(1).numpy()) == 1
    torch.testing.assert_close(start.responsibilities.sum(1), torch.ones(60, dtype=torch.float64))


@pytest.mark.parametrize("n_starts", [2, 3])
@pytest.mark.parametrize("n_axes", [0, 1, 2])
@pytest.mark.parametrize("surplus", [0.0, 1.0])
def test_any_search_ends_with_as_many_components_as_wanted(n_starts, n_axes, surplus):
    make = RandomStart(n_starts=n_starts, n_axes=n_axes, surplus=surplus)
    start = make(small_data(), MixtureSettings(3), generator())
    assert start.responsibilities.shape == (60, 3)
    assert torch.isfinite(start.responsibilities).all()


@pytest.mark.parametrize("setting", [{}, {"n_axes": 0}, {"surplus": 0.0}])
def test_empty_cells_do_not_disturb_the_search(setting):
    data = small_data()
    counts = data.counts.copy()
    counts.data[: counts.indptr[2]] = 0
    counts.eliminate_zeros()
    sizes = np.where(np.arange(60) < 2, 0.0, data.size_factors)
    some_empty = replace(data, counts=counts, size_factors=sizes)
    start = RandomStart(n_starts=2, **setting)(some_empty, MixtureSettings(2), generator())
    assert torch.isfinite(start.responsibilities).all()
    found = start.responsibilities.argmax(1).numpy()[2:]
    assert adjusted_rand_score(data.labels[2:], found) == 1


def test_labels_are_not_seen():
    data, make = small_data(), RandomStart(n_starts=2)
    with_labels = make(data, MixtureSettings(2), generator())
    for other in (replace(data, labels=None), replace(data, labels=data.labels[::-1])):
        without = make(other, MixtureSettings(2), generator())
        assert torch.equal(with_labels.responsibilities, without.responsibilities)


def test_cells_beyond_max_cells_get_components_alone():
    start = RandomStart(n_starts=2, max_cells=30)(small_data(), MixtureSettings(2), generator())
    assert start.responsibilities is None
    assert start.components.log_mean.shape == (2, small_data().n_genes)
    assert torch.isfinite(start.components.log_mean).all()


def test_the_found_components_go_on_with_more_cells_where_there_are_many():
    few = RandomStart(n_starts=2, max_cells=20, refine_cells=60)
    more = replace(few, refine_cells=30)
    starts = [make(small_data(), MixtureSettings(2), generator()) for make in (few, more)]
    assert not torch.equal(starts[0].components.log_mean, starts[1].components.log_mean)


def test_one_component_has_all_cells():
    start = RandomStart()(small_data(), MixtureSettings(1), generator())
    assert start.components is None
    assert start.responsibilities.tolist() == [[1.0]] * 60


def test_random_responsibilities_are_uniform_on_the_simplex():
    q = DirichletStart()(small_data(), MixtureSettings(2), generator()).responsibilities
    torch.testing.assert_close(q.sum(1), torch.ones(60, dtype=torch.float64))
    assert kstest(q[:, 0].numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize(("random_every", "at_random"), [(0, 0), (1, 4), (2, 2), (4, 1)])
def test_some_runs_begin_at_random_responsibilities(random_every, at_random):
    make = RandomStart(random_every=random_every)
    begins = make.begins(make.search(small_data(), generator()), 2, 4, generator())
    assert len(begins) == 4
    assert sum(bool((q.max(1).values < 1).any()) for q in begins) == at_random


@pytest.mark.parametrize(("surplus", "n_first"), [(0.0, 2), (0.5, 6), (10.0, 6)])
def test_runs_begin_with_more_components_than_wanted_as_far_as_cells_go(surplus, n_first):
    make = RandomStart(surplus=surplus)  # 60 cells, of which 10 a component
    begins = make.begins(make.search(small_data(), generator()), 2, make.n_surplus(2), generator())
    assert {q.shape for q in begins} == {(60, n_first)}


def test_runs_with_given_weights_begin_at_random_with_no_more_components():
    data = replace(small_data(), prior=np.tile([0.9, 0.1], (60, 1)))
    make = RandomStart()
    search = make.search(data, generator(), weights_are_given=True)
    for q in make.begins(search, 2, 4, generator()):
        assert q.shape == (60, 2)
        assert (q.max(1).values < 1).all()
        assert q[:, 0].mean() > 0.7


def test_a_rare_kind_is_kept_rather_than_a_large_one_cut():
    """A large kind varies along a gradient; 8 cells of 320 are of a kind of their own."""
    rng = np.random.default_rng(0)
    kind = np.repeat([0, 1, 2], [200, 112, 8])
    log_mean = np.tile(rng.uniform(-1.5, 1.0, 200), (320, 1))
    for k in (1, 2):
        log_mean[np.ix_(kind == k, np.arange(30 * k, 30 * (k + 1)))] += rng.choice([-1.5, 1.5], 30)
    log_mean[:, 150:] += np.where(kind == 0, rng.uniform(-0.8, 0.8, 320), 0)[:, None] * rng.choice(
        [-1, 1], 50
    )
    counts = sp.csr_matrix(rng.poisson(np.exp(log_mean)).astype(np.float32))
    names = np.arange(320).astype(str)
    data = CountData(
        counts, np.asarray(counts.sum(1)).ravel().astype(float), names, np.arange(200).astype(str)
    )
    for seed in range(3):
        start = RandomStart()(data, MixtureSettings(3), np.random.default_rng(seed))
        found = start.responsibilities.argmax(1).numpy()
        assert adjusted_rand_score(kind, found) > 0.95
        assert (found == found[-1]).sum() == 8


def cells_of_two_kinds(n_programmes):
    """240 cells, whose genes rise and fall together along programmes."""
    rng = np.random.default_rng(0)
    kind = np.arange(240) % 2
    log_mean = np.tile(rng.uniform(-1, 1.5, 200), (240, 1))
    log_mean[kind == 1, :40] += rng.choice([-1, 1], 40)
    for _ in range(n_programmes):
        genes = rng.choice(200, 60, replace=False)
        log_mean[:, genes] += rng.normal(0, 0.7, (240, 1)) * rng.choice([-1, 1], 60)
    counts = sp.csr_matrix(rng.poisson(np.exp(log_mean)).astype(np.float32))
    sizes = np.asarray(counts.sum(1)).ravel().astype(float)
    return CountData(counts, sizes, np.arange(240).astype(str), np.arange(200).astype(str)), kind


@pytest.mark.parametrize(("n_programmes", "n_components"), [(0, 2), (3, 8)])
def test_more_components_than_groups_only_where_genes_depend_on_each_other(n_programmes, n_components):
    data, kind = cells_of_two_kinds(n_programmes)
    settings = MixtureSettings(8, n_groups=2, may_be_fewer=True)
    for seed in (0, 1):
        found = RandomStart(n_starts=2)(data, settings, np.random.default_rng(seed))
        assert found.n_components == n_components
    if n_components == 2:
        assert adjusted_rand_score(kind, found.responsibilities.argmax(1).numpy()) == 1
        fixed = RandomStart(n_starts=2)(data, replace(settings, may_be_fewer=False), np.random.default_rng(0))
        assert fixed.n_components == 8


def test_given_weights_decide_which_component_is_which():
    data = small_data()
    codes = np.unique(data.labels, return_inverse=True)[1]
    for order in ([0, 1], [1, 0]):
        prior = np.eye(2)[codes][:, order] * 0.98 + 0.01
        start = RandomStart()(replace(data, prior=prior), MixtureSettings(2, weights="given"), generator())
        assert (start.responsibilities.argmax(1).numpy() == prior.argmax(1)).all()


def test_given_weights_that_the_data_lack_are_an_input_error():
    with pytest.raises(InputError, match=r"data\.prior_key"):
        RandomStart()(small_data(), MixtureSettings(2, weights="given"), generator())


@pytest.mark.parametrize("n_cells", [2, 3, 7])
def test_a_handful_of_cells(n_cells):
    data = small_data().select_cells(np.arange(n_cells))
    start = RandomStart()(data, MixtureSettings(2), generator())
    assert start.responsibilities.shape == (n_cells, 2)
    assert torch.isfinite(start.responsibilities).all()


@pytest.mark.parametrize(
    "setting",
    [
        {"n_starts": 0},
        {"random_every": -1},
        {"surplus": -0.5},
        {"n_axes": 4},
        {"n_axes": -1},
        {"max_cells": 0},
        {"max_genes": 0},
        {"folds": 1},
    ],
    ids=str,
)
def test_bad_settings(setting):
    with pytest.raises(InputError, match=rf"start\.{next(iter(setting))}="):
        RandomStart(**setting)

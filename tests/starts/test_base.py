"""What all starts share."""

from __future__ import annotations

import numpy as np
import pytest

from nbmix.core.em_loop import run_em
from nbmix.core.settings import MixtureSettings
from nbmix.errors import InputError
from nbmix.starts.base import (
    StartState,
    check_components,
    choose_cells,
    new_mixture,
    one_hot,
    prepare,
    random_responsibilities,
)
from tests.helpers.running import small_data


def test_batches_hold_every_cell_once_each_within_a_fold():
    data = small_data()
    _, batches = prepare(data, 3, np.random.default_rng(0))
    assert np.array_equal(np.sort(np.concatenate([b.rows.numpy() for b in batches])), np.arange(60))
    assert sorted({b.fold for b in batches}) == [0, 1, 2]


def test_chosen_cells_are_distinct_and_in_order():
    chosen = choose_cells(small_data(), 20, np.random.default_rng(0))
    assert chosen.n_cells == 20
    assert (np.diff(chosen.positions) > 0).all()


def test_all_cells_where_there_are_no_more():
    data = small_data()
    assert choose_cells(data, 60, np.random.default_rng(0)) is data


def test_one_hot():
    assert one_hot(np.array([1, 0]), 3).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_random_responsibilities_are_distributions():
    q = random_responsibilities(50, 3, np.random.default_rng(0)).numpy()
    assert (q >= 0).all()
    np.testing.assert_allclose(q.sum(1), 1, rtol=1e-12)


def test_a_fit_from_responsibilities_begins_at_the_prior_that_a_start_has_learned():
    data, q = small_data(), random_responsibilities(60, 2, np.random.default_rng(0))
    settings = MixtureSettings(2, folds=3, pseudo_cells="auto")

    def first_m_step(prior):
        basis, batches = prepare(data, 3, np.random.default_rng(0))
        mixture = new_mixture(data, settings, basis, StartState(q, prior=prior))
        run_em(mixture, batches, responsibilities=q, max_iterations=1)
        return mixture

    plain = first_m_step(None).gene_prior(0)
    narrow = plain._replace(
        log_mean=plain.log_mean[:5],  # of other genes
        log_mean_variance=plain.log_mean_variance[:5] * 0 + 1e-6,
        log_inv_disp=plain.log_inv_disp[:5],
    )
    told = first_m_step(narrow)
    assert told.gene_prior(0).log_mean_variance.max() < 1e-5 < plain.log_mean_variance.min()
    assert told.components(0).log_mean.std(0).max() < 0.01


def test_a_component_needs_a_cell():
    check_components(small_data(), MixtureSettings(60))
    with pytest.raises(InputError, match=r"model\.n_components=61: there are only 60 cells"):
        check_components(small_data(), MixtureSettings(61))

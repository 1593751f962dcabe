"""Held-out labels: depth tells what it tells, and noise tells nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nbmix.errors import InputError
from nbmix.evaluation.baselines.logistic import labels_from_counts, labels_from_size_factors
from tests.helpers.running import small_data


def test_groups_of_a_simulation_are_told_from_counts_and_not_from_depth():
    data = small_data(n_cells=100, n_components=2)
    assert (labels_from_counts(data) == data.labels).all()
    largest = np.unique(data.labels, return_counts=True)[1].max() / 100
    steady = replace(data, size_factors=np.full(100, 7.0))  # says nothing, so the larger label is the guess
    assert (labels_from_size_factors(steady) == data.labels).mean() == pytest.approx(largest)


def test_labels_that_are_depth():
    data = small_data(n_cells=60)
    sizes = np.r_[np.linspace(900, 1100, 30), np.linspace(2900, 3100, 30)]
    data = replace(data, size_factors=sizes, labels=np.repeat(["shallow", "deep"], 30))
    assert (labels_from_size_factors(data) == data.labels).all()
    molecules = replace(data, size_factors=sizes * 1e6)  # the unit does not matter
    np.testing.assert_array_equal(labels_from_size_factors(molecules), labels_from_size_factors(data))


def test_a_cell_is_judged_by_others():
    # 300 genes tell 60 cells apart by heart: in-sample every label would be right
    data = small_data(n_cells=60, n_genes=300, n_components=1)
    noise = replace(data, labels=np.random.default_rng(0).permutation(np.repeat(["a", "b"], 30)))
    assert 0.25 < (labels_from_counts(noise) == noise.labels).mean() < 0.75


@pytest.mark.parametrize("predict", [labels_from_counts, labels_from_size_factors])
def test_labels_that_cannot_be_learned(predict):
    data = small_data(n_cells=30)
    with pytest.raises(InputError, match="needs labels"):
        predict(replace(data, labels=None))
    with pytest.raises(InputError, match="label 'same' has 30 of 30 cells; there must be two labels"):
        predict(replace(data, labels=np.full(30, "same")))
    with pytest.raises(InputError, match=r"label 'few' has 4 of 30 cells; .* each with 10 cells or more"):
        predict(replace(data, labels=np.repeat(["few", "many"], [4, 26])))
    with pytest.raises(InputError, match=r"label 'few' has 4 .* each with 5 cells or more"):
        predict(replace(data, labels=np.repeat(["few", "many"], [4, 26])), folds=5)

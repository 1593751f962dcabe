"""The number of components: an elbow by hand, and found in simulations without labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nbmix.core.settings import MixtureSettings
from nbmix.errors import InputError
from nbmix.starts.choice import Choice, Range, choose_n_components, elbow
from nbmix.starts.random import RandomStart
from tests.helpers.running import small_data


def curve_of(gains):
    return np.concatenate([[-100.0], -100 + np.cumsum(gains)])


@pytest.mark.parametrize(
    "gains, errors, wanted",
    [
        ([20, 9, 4, 0.5, 0.5, 0.2], 0.01, 4),
        ([8, 0.9, 1.1, 0.3, 0], 0.05, 2),
        ([24, 6, 13, 5, 0.4, 0.3], 0.01, 5),  # a gain that comes late counts as if it had come early
        ([9, 0.001, -0.002, 0.001], 0.01, 2),  # what is below noise is no elbow
        ([0.001, -0.01, 0.002], 0.01, 1),
        ([8, 4, 2, 1], 1e-6, 5),  # it never falls off
    ],
)
def test_elbow(gains, errors, wanted):
    gain_errors = np.concatenate([[0.0], np.full(len(gains), errors)])
    assert elbow(curve_of(gains), gain_errors, 1, len(gains) + 1) == wanted


def test_elbow_stays_in_the_range():
    curve, errors = curve_of([20, 9, 4, 0.5, 0.4, 0.1]), np.full(7, 0.01)
    assert elbow(curve, errors, 2, 3) in (2, 3)
    assert elbow(curve, errors, 6, 6) == 6


@pytest.mark.parametrize(
    "value, wanted",
    [("auto", Range(1, 12)), ("2-8", Range(2, 8)), (" 3 - 3 ", Range(3, 3)), (4, None)],
)
def test_ranges(value, wanted):
    assert Range.parse(value) == wanted


@pytest.mark.parametrize("value", ["8-2", "0-4", "four"])
def test_what_is_no_range(value):
    with pytest.raises(InputError, match=rf"model\.n_components={value}"):
        Range.parse(value)


def test_too_few_cells():
    data = small_data().select_cells(np.arange(12))
    with pytest.raises(InputError, match="12 cells are too few"):
        choose_n_components(data, MixtureSettings(1), Range(3, 8), np.random.default_rng(0))


def test_the_number_of_a_simulation_is_found_without_labels():
    data = small_data()
    runs = [
        choose_n_components(some, MixtureSettings(1), Range(1, 4), np.random.default_rng(0), RandomStart())
        for some in (data, replace(data, labels=data.labels[::-1]))
    ]
    assert runs[0].recommended == len(np.unique(data.labels)) == 2
    assert runs[0].n_components.tolist() == list(range(1, len(runs[0].log_likelihood) + 1))
    assert runs[0].start.responsibilities.shape == (data.n_cells, 2)
    for name in ("log_likelihood", "gain_error"):
        assert (getattr(runs[0], name) == getattr(runs[1], name)).all()


def test_a_choice_comes_back_from_plain_values():
    choice = Choice(np.array([1, 2, 3]), np.array([-3.0, -2.1, -2.0]), np.array([0.0, 0.1, 0.1]), 2, None)
    again = Choice.of(choice.plain)
    for name in ("n_components", "log_likelihood", "gain_error"):
        np.testing.assert_array_equal(getattr(again, name), getattr(choice, name))
    assert (again.recommended, again.start) == (2, None)

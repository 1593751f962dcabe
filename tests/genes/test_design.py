"""Covariates are standardised, and coefficients given back in their units."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbmix.errors import InputError
from nbmix.genes.design import LARGEST_LOG_RATIO, Design, membership
from nbmix.genes.labelled import LabelledCounts
from tests.helpers.labelled import simulated


@pytest.fixture
def data():
    return LabelledCounts.checked(*simulated())


@pytest.fixture
def given(data):
    return np.random.default_rng(0).normal(3, [0.1, 20], size=(data.n_cells, 2))


def test_covariates_have_mean_0_and_variance_1(given, data):
    design = Design.checked(given, data)
    np.testing.assert_allclose(design.z.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(design.z.std(0, unbiased=False), 1)
    np.testing.assert_allclose(design.z * design.spread + design.mean, given)


def test_coefficients_and_means_in_the_units_given_say_the_same_of_every_cell(given, data, generator):
    design = Design.checked(given, data)
    log_mean = torch.randn(data.n_labels, data.n_genes, generator=generator, dtype=torch.float64)
    coefficients = torch.randn(data.n_genes, 2, generator=generator, dtype=torch.float64)
    before = log_mean[data.codes] + design.z @ coefficients.T
    log_mean, coefficients = design.original(log_mean, coefficients)
    assert coefficients.shape == (2, data.n_genes)
    torch.testing.assert_close(log_mean[data.codes] + torch.from_numpy(given) @ coefficients, before)


def test_no_cell_is_put_farther_than_the_largest_ratio(given, data):
    design = Design.checked(given, data)
    assert design.limits.shape == (2,)
    torch.testing.assert_close(
        (design.limits * design.z).abs().amax(0), torch.full((2,), LARGEST_LOG_RATIO, dtype=torch.float64)
    )


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_a_covariate_that_follows_is_found_in_any_unit(given, data, unit):
    Design.checked(given * unit, data)
    follows = np.c_[given, given @ [0.3, 2.0] + data.codes] * unit
    with pytest.raises(InputError, match="a covariate follows from the others and the labels"):
        Design.checked(follows, data)


def test_every_cell_is_a_member_of_its_label(data):
    found = membership(data)
    assert found.shape == (data.n_labels, data.n_cells)
    assert found.argmax(0).tolist() == data.codes.tolist()
    assert (found.sum(0) == 1).all()

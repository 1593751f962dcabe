"""Counts with labels: what is taken of them, and sums of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats
import torch

from nbmix.genes.labelled import GeneComparison, LabelledCounts, gene_constants, gene_totals
from tests.helpers.labelled import simulated

X = np.array([[1, 0, 2], [0, 3, 0], [4, 0, 0], [0, 0, 0]])


def test_labels_are_sorted_or_in_the_order_of_their_categories():
    labels = ["b", "a", "b", "a"]
    data = LabelledCounts.checked(X, labels, None)
    assert (data.values.tolist(), data.codes.tolist()) == (["a", "b"], [1, 0, 1, 0])
    ordered = LabelledCounts.checked(X, pd.Categorical(labels, categories=["c", "b", "a"]), None)
    assert (ordered.values.tolist(), ordered.codes.tolist()) == (["c", "b", "a"], [1, 2, 1, 2])
    assert (ordered.n_cells, ordered.n_genes, ordered.n_labels) == (4, 3, 3)


def test_size_factors_are_row_sums_unless_they_are_given():
    data = LabelledCounts.checked(X, list("abab"), None)
    assert data.sizes.tolist() == [3, 3, 4, 0]
    assert data.total_size == 10
    assert LabelledCounts.checked(X, list("abab"), np.full(4, 2.0)).total_size == 8
    assert LabelledCounts.checked(0 * X, list("abab"), None).total_size == 1


def test_the_cells_of_one_label():
    counts, sizes = LabelledCounts.checked(X, list("abab"), None).of(0)
    np.testing.assert_array_equal(counts.toarray(), X[[0, 2]])
    assert sizes.tolist() == [3, 4]


def test_totals_and_constants_complete_the_poisson_of_scipy():
    x, _, s = simulated()
    x = np.asarray(x)
    log_mean = np.linspace(-3, 1, x.shape[1])
    counts = sp.csr_matrix(x.astype(np.float32))
    found = gene_totals(counts) * log_mean - s.sum() * np.exp(log_mean) + gene_constants(counts, s)
    expected = scipy.stats.poisson.logpmf(x, s[:, None] * np.exp(log_mean)).sum(0)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("point, gamma", [(-3.0, -1.0), (-2.0, -2.0)])
def test_the_gain_is_what_the_negative_binomial_has_more(point, gamma):
    found = GeneComparison(np.array(["a"]), torch.tensor([[point]]), torch.tensor([[gamma]])).gain
    assert found.tolist() == [[gamma - point]]

"""Kinds and batches in principal components."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from nbmix.starts.additive import k_means, origin_shifts


@pytest.fixture
def scores():
    """Three kinds in two batches that lie farther apart than kinds; the first kind is rare in the second."""
    rng = np.random.default_rng(0)
    kinds, origins = rng.integers(3, size=600), rng.integers(2, size=600)
    origins[(kinds == 0) & (rng.random(600) < 0.8)] = 0
    means = np.array([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    shift = np.array([[0.0, 0.0], [20.0, 20.0]])
    return means[kinds] + shift[origins] + rng.normal(size=(600, 2)), kinds, origins


def test_k_means_finds_kinds_in_shifted_batches(scores):
    x, kinds, origins = scores
    assert adjusted_rand_score(kinds, k_means(x, 3, 0, origins)) > 0.95
    assert adjusted_rand_score(kinds, k_means(x, 3, 0)) < 0.6


def test_apart_batches_may_be_clusters(scores):
    x, _, origins = scores
    assert adjusted_rand_score(origins, k_means(x, 2, 0, origins, apart=True)) > 0.95


def test_shifts_are_least_squares_given_the_clusters(scores):
    x, kinds, origins = scores
    shifts = origin_shifts(x, kinds, origins, np.zeros((2, 2)))
    np.testing.assert_allclose(shifts[1] - shifts[0], 20.0, atol=0.5)
    np.testing.assert_allclose(shifts[origins].mean(0), 0.0, atol=1e-9)


def test_clusters_of_one_batch_say_nothing_of_its_shift(scores):
    x, _, origins = scores
    np.testing.assert_allclose(origin_shifts(x, origins, origins, np.zeros((2, 2))), 0.0, atol=1e-9)

"""k-means and the Gaussian mixture where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from nbmix.evaluation.baselines.kmeans import gaussian_mixture, kmeans


@pytest.fixture
def narrow_and_wide():
    """100 points of standard deviation 0.1 beside 150 of 3, five away."""
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], [100, 150])
    points = np.where(codes, 3.0, 0.1)[:, None] * rng.standard_normal((250, 2))
    return points + np.stack([5.0 * (codes == 0), np.zeros(250)], axis=1), codes


def test_kmeans_finds_round_groups():
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], 30)
    points = 10 * np.eye(3)[codes] + rng.standard_normal((90, 3))
    assert adjusted_rand_score(codes, kmeans(points, 3)) == 1


def test_covariances_see_what_squared_distances_do_not(narrow_and_wide):
    points, codes = narrow_and_wide
    posterior = gaussian_mixture(points, 2)
    np.testing.assert_allclose(posterior.sum(1), 1, rtol=1e-12)
    assert adjusted_rand_score(codes, posterior.argmax(1)) > 0.97
    assert adjusted_rand_score(codes, kmeans(points, 2)) < 0.8


def test_dimensions_after_the_twentieth_are_not_seen(narrow_and_wide):
    points, _ = narrow_and_wide
    twenty = np.hstack([points, np.random.default_rng(1).standard_normal((250, 18))])
    more = np.hstack([twenty, 1e6 * np.random.default_rng(2).standard_normal((250, 5))])
    np.testing.assert_array_equal(gaussian_mixture(twenty, 2), gaussian_mixture(more, 2))


def test_fewer_distinct_points_than_clusters():
    assert len(set(kmeans(np.ones((5, 2)), 3))) == 1

"""Topic weights of counts that are an exact product."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from nbmix.errors import InputError
from nbmix.evaluation.baselines.topics import topic_weights
from tests.helpers.running import small_data


def test_weights_are_the_shares_of_the_topics():
    # topics on genes of their own, so that the factorisation is unique but for scale and order
    totals = np.array([[40, 0], [0, 40], [10, 30], [20, 20], [30, 10], [80, 0], [0, 10]])  # (cells, topics)
    topics = np.array([[1, 2, 2, 0, 0], [0, 0, 0, 4, 1]])  # sums of 5
    counts = sp.csr_matrix((totals @ topics).astype(np.float32))
    data = replace(
        small_data(n_cells=7, n_genes=5),
        counts=counts,
        size_factors=np.asarray(counts.sum(1)).ravel().astype(float),
    )
    weights = topic_weights(data, 2, iterations=2000)
    shares = totals / totals.sum(axis=1, keepdims=True)
    if weights[0, 0] < 0.5:
        weights = weights[:, ::-1]
    np.testing.assert_allclose(weights, shares, atol=1e-3)


def test_the_seed_is_that_of_the_start():
    data = small_data()
    np.testing.assert_array_equal(topic_weights(data, 2, seed=3), topic_weights(data, 2, seed=3))
    assert (
        topic_weights(data, 2, seed=3, iterations=1) != topic_weights(data, 2, seed=4, iterations=1)
    ).any()


def test_no_iterations():
    with pytest.raises(InputError, match="iterations=0: must be 1 or more"):
        topic_weights(small_data(), 2, iterations=0)

"""Topic model: a cell is a mixture of topics, where ours draws it from one component."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nbmix.data.counts import CountData
from nbmix.evaluation.baselines.base import Baseline, Outcome
from nbmix.starts.clusters import TopicsStart


def topic_weights(
    data: CountData, n_topics: int, seed: int = 0, iterations: int = 100
) -> NDArray[np.float64]:
    """(cells, topics) weights of a Poisson NMF X ~ L F, scaled as in the source notebook.

        w_ik = l_ik sum_j f_kj / sum_l l_il sum_j f_lj

    so that rows sum to 1. The cluster of a cell is its largest topic. It depends on where NMF starts, at
    random here; scikit-learn's own default (``init="nndsvda"``) is behind after 100 iterations, and scores
    far less (``benchmarks/RESULTS.md``).

    Args:
        data: cells with counts in memory.
        n_topics: K.
        seed: of the random start.
        iterations: of the multiplicative updates (Lee & Seung 2001).

    Raises:
        InputError: there are no iterations.
    """
    weights, _ = TopicsStart(iterations=iterations).fit(data, n_topics, np.random.default_rng(seed))
    return weights


TOPICS = Baseline(
    "topics",
    "Poisson NMF, 100 iterations; the largest topic of a cell",
    lambda data, k, seed: Outcome(topic_weights(data, k, seed)),
)

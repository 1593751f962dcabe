"""Kinds and batches in principal components: x_i = m_k(i) + d_g(i), before any counts are looked at."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

ROUNDS = 5  # of k-means and what origins shift

SWEEPS = 10  # between means of clusters and of origins, in each


def origin_shifts(scores: NDArray, assigned: NDArray, origins: NDArray, begin: NDArray) -> NDArray:
    """(origins, axes) least-squares d of x = m_k + d_g, from where it begins; its mean over cells is 0.

    Clusters and origins that do not meet say nothing of d, which there stays as it was.

    Args:
        scores: (cells, axes).
        assigned, origins: (cells,) numbers of clusters and of origins.
        begin: (origins, axes).
    """
    shifts = begin.copy()
    for _ in range(SWEEPS):
        means = _means(scores - shifts[origins], assigned, int(assigned.max()) + 1)
        shifts = _means(scores - means[assigned], origins, len(begin))
        shifts -= shifts[origins].mean(0)
    return shifts


def k_means(
    scores: NDArray,
    n_clusters: int,
    seed: int,
    origins: NDArray | None = None,
    *,
    n_init: int = 1,
    apart: bool = False,
) -> NDArray[np.int64]:
    """(cells,) clusters by k-means from random centres.

    Args:
        scores: (cells, axes).
        n_clusters: at most; fewer distinct cells leave some empty.
        seed: of the centres.
        n_init: runs, of which the tightest is taken.
        origins: (cells,) batches that shift all clusters alike; k-means and least squares take turns.
        apart: begin at no shift, so that clusters may tell origins apart; else at the origins' means, which
            are off where kinds are in other shares.
    """
    means = KMeans(n_clusters, n_init=n_init, random_state=seed)
    with warnings.catch_warnings():
        # fewer distinct cells than components: the spare components begin empty
        warnings.simplefilter("ignore", ConvergenceWarning)
        if origins is None:
            return means.fit_predict(scores)
        shifts = _means(scores - scores.mean(0), origins, int(origins.max()) + 1)
        shifts *= not apart
        for _ in range(ROUNDS):
            assigned = means.fit_predict(scores - shifts[origins])
            shifts = origin_shifts(scores, assigned, origins, shifts)
        return assigned


def _means(scores: NDArray, numbers: NDArray, n: int) -> NDArray:
    """(n, axes) mean of the cells of each number; 0 where there are none."""
    total = np.zeros((n, scores.shape[1]))
    np.add.at(total, numbers, scores)
    return total / np.maximum(np.bincount(numbers, minlength=n), 1)[:, None]

"""Clusters of points: k-means and a Gaussian mixture on principal components."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from nbmix.evaluation.baselines.base import Baseline, Outcome
from nbmix.evaluation.baselines.leiden import scanpy_graph

N_GAUSSIAN_PCS = 20  # a full covariance of more has more numbers than a small population has cells

N_INIT = 10


def kmeans(pcs: ArrayLike, n_clusters: int, seed: int = 0) -> NDArray[np.int64]:
    """(cells,) cluster of each cell: the smallest sum of squares of ten k-means++ starts.

    Args:
        pcs: (cells, PCs) scores.
        n_clusters: K, at most the number of cells.
        seed: of the starts.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters
        found = KMeans(n_clusters, n_init=N_INIT, random_state=seed).fit_predict(np.asarray(pcs))
    return found.astype(np.int64)


def gaussian_mixture(pcs: ArrayLike, n_components: int, seed: int = 0) -> NDArray[np.float64]:
    """(cells, K) posterior of a mixture of normals with full covariances on the first 20 PCs.

    Maximum likelihood by EM from the best of ten k-means starts (scikit-learn).

    Args:
        pcs: (cells, PCs) scores, decreasing in variance.
        n_components: K, at most the number of cells.
        seed: of the starts.
    """
    scores = np.asarray(pcs, dtype=np.float64)[:, :N_GAUSSIAN_PCS]
    mixture = GaussianMixture(n_components, n_init=N_INIT, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(scores).predict_proba(scores)


KMEANS = Baseline(
    "kmeans",
    "on the 50 PCs of scanpy's path",
    lambda data, k, seed: Outcome(kmeans(scanpy_graph(data, seed).pcs, k, seed)),
    packages=("scanpy",),
)
GMM = Baseline(
    "gmm",
    "a Gaussian mixture on the first 20 of them",
    lambda data, k, seed: Outcome(gaussian_mixture(scanpy_graph(data, seed).pcs, k, seed)),
    packages=("scanpy",),
)

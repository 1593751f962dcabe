"""Starts from a partition of the cells: known labels, k-means on principal components, topics."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning

from nbmix.core.declared import Setting, checked
from nbmix.core.parameters import START_LOG_INV_DISP, Components, lowest_log_mean
from nbmix.core.settings import MixtureSettings
from nbmix.data.counts import CountData
from nbmix.data.pca import log_pca
from nbmix.errors import InputError
from nbmix.starts.additive import k_means
from nbmix.starts.base import StartState, one_hot


@dataclass(frozen=True)
class LabelsStart:
    """One component for each label: the oracle's start. The fit then sees the labels."""

    name: ClassVar[str] = "labels"

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        if data.labels is None:
            raise InputError("start=labels: the data has no labels; set data.label_key to a column of obs")
        values, codes = np.unique(data.labels, return_inverse=True)
        if len(values) != settings.n_components:
            raise InputError(
                f"start=labels: there are {len(values)} labels; set model.n_components={len(values)}"
            )
        return StartState(one_hot(codes, settings.n_components))


@checked("start")
@dataclass(frozen=True)
class KMeansStart:
    """k-means on principal components of log counts ln(1 + x / s), see ``nbmix.starts.additive``."""

    name: ClassVar[str] = "kmeans"
    finds_components: ClassVar[bool] = True

    n_pcs: Annotated[
        int, Setting("The number of principal components that k-means sees. More add noise.", least=1)
    ] = 20
    n_init: Annotated[int, Setting("The number of runs of k-means. The tightest is taken.", least=1)] = 10

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        seed = int(generator.integers(2**31))
        scores = log_pca(data.counts, data.size_factors, self.n_pcs, seed)
        found = k_means(scores, settings.n_components, seed, data.origins, n_init=self.n_init)
        return StartState(one_hot(found, settings.n_components))


@checked("start")
@dataclass(frozen=True)
class TopicsStart:
    """Poisson NMF X ~ L F, scaled to a topic model: l_ik sum_j f_kj to sum to 1, f_kj to sum to 1.

    Multiplicative updates of the Kullback-Leibler divergence, which is the Poisson log likelihood
    (Lee & Seung 2001). What differs between batches would be topics, so there must be none.
    """

    name: ClassVar[str] = "topics"
    finds_components: ClassVar[bool] = True

    use: Annotated[
        str,
        Setting(
            "With responsibilities the fit begins at each cell's weights of topics, with "
            "means at the topics.",
            words=("responsibilities", "means"),
        ),
    ] = "responsibilities"
    iterations: Annotated[int, Setting("The number of iterations of the factorisation.", least=1)] = 100

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        if data.origins is not None:
            raise InputError(
                "start=topics: knows nothing of batches (data.batch_key), and would make topics of them; "
                "choose start=random, kmeans or subsample"
            )
        weights, topics = self.fit(data, settings.n_components, generator)
        if self.use == "responsibilities":
            return StartState(torch.from_numpy(weights))
        floor = lowest_log_mean(float(data.size_factors.sum()))
        # a topic is a mean per count; size factors may be in another unit
        unit = float(data.counts.sum(dtype=np.float64)) / float(data.size_factors.sum())
        log_mean = torch.log(unit * torch.from_numpy(topics)).clamp(min=floor)
        return StartState(components=Components(log_mean, torch.full_like(log_mean, START_LOG_INV_DISP)))

    def fit(
        self, data: CountData, n_components: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Topic weights (cells, K) and topics (K, genes), rows of both summing to 1; float64."""
        factorisation = NMF(
            n_components,
            init="random",
            solver="mu",
            beta_loss="kullback-leibler",
            max_iter=self.iterations,
            random_state=int(generator.integers(2**31)),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the number of iterations is the setting
            loadings = factorisation.fit_transform(data.counts).astype(np.float64)
        factors = factorisation.components_.astype(np.float64)
        scale = factors.sum(axis=1)
        topics = factors / np.maximum(scale, np.finfo(float).tiny)[:, None]
        weights = loadings * scale
        total = weights.sum(axis=1, keepdims=True)
        uniform = np.full_like(weights, 1 / n_components)  # an empty cell has no topic
        return np.divide(weights, total, out=uniform, where=total > 0), topics

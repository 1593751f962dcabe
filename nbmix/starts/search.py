"""The search that random starts make: EM of the factor mixture with components taken away one by one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.factor import FactorMixture
from nbmix.core.levels import CountLevels
from nbmix.core.m_step import NewtonMStep
from nbmix.core.nodes import SizeFactorNodes
from nbmix.data.counts import CountData
from nbmix.data.pca import log_pca
from nbmix.starts.base import one_hot, prepare, random_responsibilities

N_PCS = 20  # that k-means sees

CANDIDATES = 3  # to be taken away that are tried, at most

NEARLY = 5.0  # times the least loss, that a candidate's may be

SEARCH_TOLERANCE = 1e-2  # nats of a gene, in the M steps

SEARCH_NODE_TOLERANCE = 1e-3  # relative, of the interpolation in ln s of the zeros


class SearchRun(NamedTuple):
    """A search's state: its model, (cells, K, L) joint log likelihood, and their summed log likelihood."""

    model: FactorMixture
    joint: Tensor
    score: float

    @property
    def component_joint(self) -> Tensor:
        """(cells, K) ln pi_k + ln p(x_i | k)."""
        return torch.logsumexp(self.joint, 2)


@dataclass(frozen=True)
class Search:
    """The cells and genes that all runs see.

    Attributes:
        data: of the chosen genes.
        pcs: (cells, N_PCS) principal components.
        given: component weights are given per cell.
    """

    data: CountData
    basis: Basis
    batches: Sequence[CellBatch]
    pcs: np.ndarray
    given: bool
    n_axes: int
    folds: int

    @classmethod
    def of(
        cls, data: CountData, given: bool, n_axes: int, folds: int, generator: np.random.Generator
    ) -> Search:
        folds = min(folds, max(2, data.n_cells))
        nodes = SizeFactorNodes.spanning(data.size_factors, SEARCH_NODE_TOLERANCE)
        basis = Basis(nodes, CountLevels.of(data.counts))
        _, batches = prepare(data, folds, generator, basis)
        pcs = log_pca(data.counts, data.size_factors, N_PCS, int(generator.integers(2**31)))
        return cls(data, basis, batches, pcs, given, n_axes, folds)

    def by_k_means(self, n_components: int, generator: np.random.Generator) -> Tensor:
        means = KMeans(n_components, n_init=1, random_state=int(generator.integers(2**31)))
        with warnings.catch_warnings():
            # fewer distinct cells than components: the spare components begin empty
            warnings.simplefilter("ignore", ConvergenceWarning)
            return one_hot(means.fit_predict(self.pcs), n_components)

    def at_random(self, n_components: int, generator: np.random.Generator) -> Tensor:
        q = random_responsibilities(self.data.n_cells, n_components, generator)
        if self.given and self.data.prior is not None and self.data.prior.shape == tuple(q.shape):
            q = q * torch.from_numpy(self.data.prior)
            q = q / q.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
        return q

    def run(self, q: Tensor, iterations: int) -> SearchRun:
        """EM from responsibilities (cells, K)."""
        return self._run(self._model(q.shape[1]), q, iterations)

    def without(self, run: SearchRun, k: int) -> SearchRun:
        """An iteration of EM from the responsibilities of all components but one.

        Axes begin anew, since they depend on the partition; components begin where they were.
        """
        kept = np.delete(np.arange(run.joint.shape[1]), k)
        model = self._model(kept.size)
        model.take_over(run.model, kept)
        return self._run(model, torch.softmax(run.component_joint[:, kept], 1), 1)

    def _model(self, n_components: int) -> FactorMixture:
        return FactorMixture(
            self.basis,
            n_components,
            self.data.size_factors,
            folds=self.folds,
            n_axes=self.n_axes,
            given_weights=self.given,
            m_step=NewtonMStep(tolerance=SEARCH_TOLERANCE),
        )

    def _run(self, model: FactorMixture, q: Tensor, iterations: int) -> SearchRun:
        begin = model.spread(q, self._scores(q.argmax(1).numpy()))
        return self._state(model, begin, iterations)

    def without_least_missed(self, run: SearchRun, n_components: int, iterations: int) -> SearchRun:
        """Take the component away that is missed least, until so many are left.

        Those without which the log likelihood falls least as the others stand are tried; what counts is the
        log likelihood after an iteration, when means and axes have followed.
        """
        while run.joint.shape[1] > n_components:
            losses = losses_without(run.component_joint)
            candidates = [k for k in np.argsort(losses)[:CANDIDATES] if losses[k] <= NEARLY * losses.min()]
            tried = [self.without(run, int(k)) for k in candidates]
            run = self.go_on(max(tried, key=lambda run: run.score), iterations - 1)
        return run

    def go_on(self, run: SearchRun, iterations: int) -> SearchRun:
        """EM from where the run stands."""
        if iterations == 0:
            return run
        posterior = torch.softmax(run.joint.flatten(1), 1).view_as(run.joint)
        return self._state(run.model, posterior, iterations)

    def _state(self, model: FactorMixture, q: Tensor, iterations: int) -> SearchRun:
        joint = model.run(self.batches, q, max_iterations=iterations)
        return SearchRun(model, joint, total_log_likelihood(joint.flatten(1)))

    def _scores(self, assigned: np.ndarray) -> Tensor:
        """(cells, axes) first principal components within the groups, of variance 1: where axes begin."""
        within = self.pcs.astype(np.float64)
        for group in np.unique(assigned):
            within[assigned == group] -= within[assigned == group].mean(0)
        directions = np.linalg.svd(within, full_matrices=False)[0][:, : self.n_axes]
        scores = np.zeros((len(within), self.n_axes))
        scores[:, : directions.shape[1]] = directions / np.maximum(directions.std(0), 1e-12)
        return torch.from_numpy(scores)


def most_variable_genes(counts: sp.csr_matrix, size_factors: np.ndarray, n_genes: int) -> np.ndarray:
    """Sorted positions of the genes that vary most beyond a Poisson distribution of their mean rate.

    Genes are ranked by sum_i [(x_i - s_i m)^2 - x_i] in standard deviations of it under the Poisson,
    sqrt(sum_i (s_i m)^2 2 + s_i m), with m = sum x / sum s.

    Args:
        counts: (cells, genes).
        size_factors: (cells,).
        n_genes: wanted at most.
    """
    total = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
    rate = total / max(float(size_factors.sum()), np.finfo(float).tiny)
    squares = np.asarray(counts.multiply(counts).sum(axis=0, dtype=np.float64)).ravel()
    of_sizes = float((size_factors**2).sum())
    excess = squares - 2 * rate * (counts.T @ size_factors) + rate**2 * of_sizes - total
    deviation = np.sqrt(2 * rate**2 * of_sizes + total)
    score = np.divide(excess, deviation, out=np.full_like(excess, -np.inf), where=total > 0)
    return np.sort(np.argsort(-score, kind="stable")[:n_genes])


def total_log_likelihood(joint: Tensor) -> float:
    """Summed log likelihood, nats."""
    return float(torch.logsumexp(joint, 1).sum())


def losses_without(joint: Tensor) -> np.ndarray:
    """(K,) nats, 0 or more, by which the log likelihood falls without each component as the others stand."""
    whole = torch.logsumexp(joint, 1)
    n_components = joint.shape[1]
    losses = []
    for k in range(n_components):
        others = [other for other in range(n_components) if other != k]
        losses.append(float((whole - torch.logsumexp(joint[:, others], 1)).sum()))
    return np.maximum(losses, 0.0)  # of one without cells rounding can make it negative

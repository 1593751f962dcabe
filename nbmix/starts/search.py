"""The search for a start: EM of the factor mixture, with components taken away one by one.

It differs from the fit in three ways. Its model lets cells vary along an axis that components share
(``nbmix.core.factor``), for without it the programmes within a kind of cell compete with the kinds. It begins
with more components than wanted and takes them away one by one, always the one that is missed least once the
others have followed, so that no kind is lost to a poor optimum. And it sees the most variable genes alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.factor import FactorMixture
from nbmix.core.folds import by_origin
from nbmix.core.joins import mean_inflation
from nbmix.core.kernels.threads import side_by_side
from nbmix.core.levels import CountLevels
from nbmix.core.m_step import NewtonMStep
from nbmix.core.nodes import SizeFactorNodes
from nbmix.data.counts import CountData
from nbmix.data.pca import log_pca
from nbmix.progress import Count
from nbmix.starts.additive import k_means, origin_shifts
from nbmix.starts.base import one_hot, prepare, random_responsibilities

log = logging.getLogger(__name__)

SEARCHING = "searching for a start"  # a phase

N_PCS = 20  # that k-means sees

CELLS_A_COMPONENT = 10  # at least, of those that a search begins with

FIRST_ITERATIONS = 5  # with all components that a run begins with

GOING_ON = 0.5  # share of the runs, after these; what follows costs three times as much

GOING_ON_TO_JOIN = 0.25  # where components are joined: what runs differ in is where they cut kinds

ITERATIONS_A_REMOVAL = 1  # of a race, which goes on at its end

ITERATIONS_A_STEP = 3  # of a path, whose every step is to be judged

LAST_ITERATIONS = 10

CANDIDATES = 3  # to be taken away that are tried, at most

NEARLY = 5.0  # times the least loss, that a candidate's may be

NOISE = 3.0  # standard errors: a smaller gain in log likelihood is none

SEARCH_TOLERANCE = 1e-2  # nats of a gene, in the M steps

SEARCH_NODE_TOLERANCE = 1e-3  # relative, of the interpolation in ln s of the zeros


def uncounted() -> None:
    """What is called after a step that nobody counts."""


class SearchRun(NamedTuple):
    """Where a run stands: its model, (cells, K, L) joint log likelihood, and their sum over the cells.

    Attributes:
        model: its parameters.
        joint: (cells, K, L) ln pi_k + ln h_l + ln p(x_i | k, z_l), by the copy that has not seen the cell.
        score: sum of ln p(x_i), nats.
    """

    model: FactorMixture
    joint: Tensor
    score: float

    @property
    def component_joint(self) -> Tensor:
        """(cells, K) ln pi_k + ln p(x_i | k)."""
        return torch.logsumexp(self.joint, 2)


def gains(run: SearchRun, over: SearchRun) -> bool:
    """Whether the cells' log likelihood is higher in a run than in another one, beyond noise."""
    gain = (torch.logsumexp(run.component_joint, 1) - torch.logsumexp(over.component_joint, 1)).numpy()
    return bool(gain.mean() > NOISE * gain.std() / math.sqrt(gain.size))


class Race(NamedTuple):
    """What became of runs of which the better ones went on.

    Attributes:
        begun: all runs, after FIRST_ITERATIONS.
        gone_on: those of them that went on, the best first.
        best: the winner, with as many components as wanted.
    """

    begun: list[SearchRun]
    gone_on: list[SearchRun]
    best: SearchRun


@dataclass(frozen=True)
class Search:
    """The cells and genes that all runs see.

    Attributes:
        cells: with all genes.
        data: the same cells, with the genes that the search sees.
        basis, batches: of these cells, in ``folds`` folds.
        pcs: (cells, N_PCS) principal components.
        weights_are_given: component weights are given per cell, ``data.prior``.
        n_axes: of variation that components share.
        folds: 2 or more.
    """

    cells: CountData
    data: CountData
    basis: Basis
    batches: Sequence[CellBatch]
    pcs: np.ndarray
    weights_are_given: bool
    n_axes: int
    folds: int

    @classmethod
    def of(
        cls,
        cells: CountData,
        generator: np.random.Generator,
        *,
        max_genes: int,
        n_axes: int,
        folds: int,
        weights_are_given: bool = False,
    ) -> Search:
        """Over the most variable genes; ``generator`` draws folds and principal components."""
        genes = most_variable_genes(cells.counts, cells.size_factors, max_genes, cells.origins)
        data = cells.select_genes(genes)
        folds = min(folds, max(2, data.n_cells))
        nodes = SizeFactorNodes.spanning(data.size_factors, SEARCH_NODE_TOLERANCE)
        basis = Basis(nodes, CountLevels.of(data.counts))
        _, batches = prepare(data, folds, generator, basis)
        pcs = log_pca(data.counts, data.size_factors, N_PCS, int(generator.integers(2**31)))
        return cls(cells, data, basis, batches, pcs, weights_are_given, n_axes, folds)

    def by_k_means(self, n_components: int, generator: np.random.Generator, *, apart: bool = False) -> Tensor:
        """(cells, K) responsibilities of 0 and 1: one run of k-means, see ``nbmix.starts.additive``."""
        seed = int(generator.integers(2**31))
        return one_hot(k_means(self.pcs, n_components, seed, self.data.origins, apart=apart), n_components)

    def at_random(self, n_components: int, generator: np.random.Generator) -> Tensor:
        """(cells, K) responsibilities, uniform on the simplex; with given weights in proportion to these."""
        q = random_responsibilities(self.data.n_cells, n_components, generator)
        if self.weights_are_given and self.data.prior is not None and self.data.prior.shape == tuple(q.shape):
            q = q * torch.from_numpy(self.data.prior)
            q = q / q.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
        return q

    def race(self, begins: Sequence[Tensor], n_components: int, going_on: float = GOING_ON) -> Race:
        """Runs from each of ``begins`` (cells, K or more); after FIRST_ITERATIONS a share of them goes on.

        Successive halving (Jamieson & Talwalkar 2016), by the cross-fitted log likelihood. Components beyond
        ``n_components`` are taken away; the best run is finished with LAST_ITERATIONS.
        """
        n_going_on = math.ceil(len(begins) * going_on)
        n_removals = sum(q.shape[1] - n_components for q in begins) / max(1, len(begins)) * n_going_on
        count = Count(SEARCHING, len(begins) + n_removals + 1)
        # side by side: much of a run is too small to be shared out over threads
        begun = side_by_side(lambda number: self.run(begins[number], FIRST_ITERATIONS, count), len(begins))
        gone_on = sorted(begun, key=lambda run: -run.score)[:n_going_on]
        runs = side_by_side(
            lambda number: self.without_least_missed(
                gone_on[number], n_components, ITERATIONS_A_REMOVAL, count
            ),
            len(gone_on),
        )
        best = self.go_on(max(runs, key=lambda run: run.score), LAST_ITERATIONS)
        n_cells = self.data.n_cells
        log.info(
            "random starts, held-out nats per cell: %s; gone on with %s; the best ends at %.3f",
            [round(run.score / n_cells, 3) for run in begun],
            [round(run.score / n_cells, 3) for run in gone_on],
            best.score / n_cells,
        )
        return Race(begun, gone_on, best)

    def path(self, most: int, generator: np.random.Generator) -> dict[int, Tensor]:
        """(cells, K) ln pi_k + ln p(x_i | k), cross-fitted, for every K from ``most`` down to 1.

        Components are taken away one by one, in a run from k-means and in one from random responsibilities;
        of each K the better one is given.
        """
        found: dict[int, Tensor] = {}
        count = Count(SEARCHING, 2 * most)
        for begin in (self.by_k_means, self.at_random):
            run = self.run(begin(most, generator), FIRST_ITERATIONS, count)
            for n_components in range(most, 0, -1):
                run = self.without_least_missed(run, n_components, ITERATIONS_A_STEP, count)
                if n_components not in found or run.score > total_log_likelihood(found[n_components]):
                    found[n_components] = run.component_joint
        return found

    def run(self, q: Tensor, iterations: int, count: Callable[[], None] = uncounted) -> SearchRun:
        """EM from responsibilities (cells, K); ``count`` is called at its end."""
        run = self._begin(self._model(q.shape[1]), q, iterations)
        count()
        return run

    def without_least_missed(
        self,
        run: SearchRun,
        n_components: int,
        iterations: int,
        count: Callable[[], None] = uncounted,
    ) -> SearchRun:
        """Take the component away that is missed least, until so many are left.

        Those without which the log likelihood falls least as the others stand are tried; what counts is the
        log likelihood after an iteration, when means and axes have followed. There are ``iterations`` of EM
        after each, and a call of ``count``.
        """
        while run.joint.shape[1] > n_components:
            losses = losses_without(run.component_joint)
            candidates = [k for k in np.argsort(losses)[:CANDIDATES] if losses[k] <= NEARLY * losses.min()]
            tried = [self.without(run, int(k)) for k in candidates]
            run = self.go_on(max(tried, key=lambda run: run.score), iterations - 1)
            count()
        return run

    def without(self, run: SearchRun, k: int) -> SearchRun:
        """An iteration of EM from the responsibilities of all components but one.

        Axes begin anew, since they depend on the partition; components begin where they were.
        """
        kept = np.delete(np.arange(run.joint.shape[1]), k)
        model = self._model(kept.size)
        model.take_over(run.model, kept)
        return self._begin(model, torch.softmax(run.component_joint[:, kept], 1), 1)

    def go_on(self, run: SearchRun, iterations: int) -> SearchRun:
        """EM from where the run stands."""
        if iterations == 0:
            return run
        posterior = torch.softmax(run.joint.flatten(1), 1).view_as(run.joint)
        return self._iterate(run.model, posterior, iterations)

    def inflation(self, run: SearchRun) -> float:
        """How far genes depend on each other within the components of a run, see ``mean_inflation``."""
        joint = run.component_joint.numpy()
        shares = torch.softmax(run.component_joint, 1).mean(0).clamp(min=torch.finfo(torch.float64).tiny)
        return mean_inflation(joint, torch.log(shares).numpy(), self.data.size_factors)

    def _model(self, n_components: int) -> FactorMixture:
        return FactorMixture(
            self.basis,
            n_components,
            self.data.size_factors,
            folds=self.folds,
            n_axes=self.n_axes,
            given_weights=self.weights_are_given,
            origin_cells=self.data.origin_cells,
            m_step=NewtonMStep(tolerance=SEARCH_TOLERANCE),
        )

    def _begin(self, model: FactorMixture, q: Tensor, iterations: int) -> SearchRun:
        """EM from responsibilities (cells, K); axes begin at what varies most within components."""
        return self._iterate(model, model.spread(q, self._scores(q.argmax(1).numpy())), iterations)

    def _iterate(self, model: FactorMixture, q: Tensor, iterations: int) -> SearchRun:
        """EM from responsibilities (cells, K, L)."""
        joint = model.run(self.batches, q, max_iterations=iterations)
        return SearchRun(model, joint, total_log_likelihood(joint.flatten(1)))

    def _scores(self, assigned: np.ndarray) -> Tensor:
        """(cells, axes) first principal components within the groups, of variance 1: where axes begin."""
        within = self.pcs.astype(np.float64)
        origins = self.data.origins
        if origins is not None:
            none = np.zeros((len(self.data.origin_names), within.shape[1]))
            within = within - origin_shifts(within, assigned, origins, none)[origins]
        for group in np.unique(assigned):
            within[assigned == group] -= within[assigned == group].mean(0)
        directions = np.linalg.svd(within, full_matrices=False)[0][:, : self.n_axes]
        scores = np.zeros((len(within), self.n_axes))
        scores[:, : directions.shape[1]] = directions / np.maximum(directions.std(0), 1e-12)
        return torch.from_numpy(scores)


def most_variable_genes(
    counts: sp.csr_matrix, size_factors: np.ndarray, n_genes: int, origins: np.ndarray | None = None
) -> np.ndarray:
    """Sorted positions of the genes that vary most beyond a Poisson distribution of their mean rate.

    Genes are ranked by sum_i [(x_i - s_i m)^2 - x_i] in standard deviations of it under the Poisson,
    sqrt(sum_i (s_i m)^2 2 + s_i m), with m = sum x / sum s, of the cells of one origin: sums over origins are
    ranked, so that a gene does not pass for variable by what differs between these.

    Args:
        counts: (cells, genes).
        size_factors: (cells,).
        n_genes: wanted at most.
        origins: (cells,) batches of the experiment; None: one.
    """
    if origins is None:
        excess, deviation = _excess(counts, size_factors)
    else:
        parts = by_origin(np.arange(counts.shape[0]), origins)
        found = [_excess(counts[rows], size_factors[rows]) for rows in parts]
        excess = np.sum([e for e, _ in found], axis=0)
        deviation = np.sqrt(np.sum([d**2 for _, d in found], axis=0))
    score = np.divide(excess, deviation, out=np.full_like(excess, -np.inf), where=deviation > 0)
    return np.sort(np.argsort(-score, kind="stable")[:n_genes])


def _excess(counts: sp.csr_matrix, size_factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(genes,) variation beyond the Poisson distribution's, and its standard deviation under that."""
    total = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
    rate = total / max(float(size_factors.sum()), np.finfo(float).tiny)
    squares = np.asarray(counts.multiply(counts).sum(axis=0, dtype=np.float64)).ravel()
    of_sizes = float((size_factors**2).sum())
    excess = squares - 2 * rate * (counts.T @ size_factors) + rate**2 * of_sizes - total
    return excess, np.sqrt(2 * rate**2 * of_sizes + total)


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

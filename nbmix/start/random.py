"""Random starts: a search on a part of the cells, ranked by held-out likelihood and blind to labels.

The search differs from the fit in three ways. Its model lets cells vary along an axis that components share
(``nbmix.factor``), for without it the programmes within a kind of cell compete with the kinds. It begins with
more components than wanted and takes them away one by one, always the one that is missed least once the
others have followed, so that no kind is lost to a poor optimum. And it sees the most variable genes alone.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from nbmix.components import NewtonMStep
from nbmix.data.counts import CountData
from nbmix.errors import InputError
from nbmix.factor import FactorMixture
from nbmix.kernels import side_by_side
from nbmix.mixture import MixtureSettings, StoppingRule, run_em
from nbmix.pca import log_pca
from nbmix.products import Basis, CellBatch, CountLevels, SizeFactorNodes
from nbmix.start.base import (
    StartState,
    choose_cells,
    new_mixture,
    one_hot,
    prepare,
    random_responsibilities,
)

log = logging.getLogger(__name__)

N_PCS = 20  # that k-means sees
LEAST_SURPLUS = 4  # components; a rare kind gets none of a few more while a large one is cut in parts
CELLS_A_COMPONENT = 10  # at least, of those a search begins with
FIRST_ITERATIONS = 5  # with the surplus components
GOING_ON = 0.5  # share of the runs, after these; what follows costs three times as much
CANDIDATES = 3  # to be taken away that are tried, at most
NEARLY = 5.0  # times the least loss, that a candidate's may be
ITERATIONS_A_REMOVAL = 1  # in a search, which goes on at its end
ITERATIONS_A_STEP = 3  # in a path, whose every step is to be judged
LAST_ITERATIONS = 10
SEARCH_TOLERANCE = 1e-2  # nats of a gene, in the M steps
SEARCH_NODE_TOLERANCE = 1e-3  # relative, of the interpolation in ln s of the zeros
REFINE_ITERATIONS = 4  # of the mixture itself; the rest is for all cells


@dataclass(frozen=True)
class RandomStart:
    """Several short runs from random beginnings; the best one by held-out likelihood is finished.

    Runs begin at one run of k-means on principal components from random centres, or at responsibilities drawn
    uniformly from the simplex. After a few iterations the better half goes on (successive halving; Jamieson &
    Talwalkar 2016). A cell is scored by the copy of the components that has not seen it.

    Attributes:
        n_starts: runs.
        random_every: of so many runs the last one begins at random responsibilities, the others at k-means; 1
            for all, 0 for none. Where component weights are given, all do.
        surplus: so many components more to begin with, as a share of K, and at least LEAST_SURPLUS; 0 for
            none.
        n_axes: of variation shared by all components; 0 for none.
        max_cells: the search sees a random subset of this many cells.
        max_genes: and so many genes, those that vary most beyond a Poisson distribution.
        refine_cells: where the data hold twice as many, the found components go on with so many cells.
        folds: of the search, 2 or more, also where the fit itself is not cross-fitted.
    """

    n_starts: int = 4
    random_every: int = 4
    surplus: float = 0.5
    n_axes: int = 1
    max_cells: int = 2000
    max_genes: int = 2000
    refine_cells: int = 10_000
    folds: int = 3

    def __post_init__(self) -> None:
        for name, least in (
            ("n_starts", 1),
            ("random_every", 0),
            ("n_axes", 0),
            ("max_cells", 1),
            ("max_genes", 1),
            ("refine_cells", 1),
            ("folds", 2),
        ):
            if getattr(self, name) < least:
                raise InputError(f"start.{name}={getattr(self, name)}: must be {least} or more")
        if self.n_axes > 3:
            raise InputError(
                f"start.n_axes={self.n_axes}: must be 3 or less, as each makes the search 3 times slower"
            )
        if not 0 <= self.surplus <= 10:
            raise InputError(f"start.surplus={self.surplus}: must be between 0 and 10")

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        n_components = settings.n_components
        if n_components == 1:
            return StartState(torch.ones(data.n_cells, 1, dtype=torch.float64))
        seen = choose_cells(data, self.max_cells, generator)
        return self._take_to_all(seen, self._search(seen, settings, generator), data, settings, generator)

    def path(
        self, data: CountData, settings: MixtureSettings, most: int, generator: np.random.Generator
    ) -> tuple[CountData, dict[int, Tensor]]:
        """The search for every number of components from ``most`` down to 1, taken away one by one.

        Returns:
            The cells that it saw, and (cells, K) ln pi_k + ln p(x_i | k) for each K, cross-fitted and by the
            better of two runs.
        """
        seen = choose_cells(data, self.max_cells, generator)
        search = self._over_genes(seen, False, generator)
        found: dict[int, Tensor] = {}
        for begin in (search.by_k_means, search.at_random):
            run = search.run(begin(most, generator), FIRST_ITERATIONS)
            for n_components in range(most, 0, -1):
                run = search.without_least_missed(run, n_components, ITERATIONS_A_STEP)
                if n_components not in found or run.score > _score(found[n_components]):
                    found[n_components] = run.component_joint
        return seen, found

    def start_from(
        self,
        seen: CountData,
        joint: Tensor,
        data: CountData,
        settings: MixtureSettings,
        generator: np.random.Generator,
    ) -> StartState:
        """The start that a ``path`` found: ``joint`` of the cells that it saw."""
        return self._take_to_all(seen, torch.softmax(joint, 1), data, settings, generator)

    def _take_to_all(
        self,
        seen: CountData,
        q: Tensor,
        data: CountData,
        settings: MixtureSettings,
        generator: np.random.Generator,
    ) -> StartState:
        """Responsibilities of the cells that the search saw, or where these are not all, components."""
        if seen.n_cells == data.n_cells:
            return StartState(q)
        settings = replace(
            settings, folds=min(self.folds, max(2, seen.n_cells)), pseudo_cells="auto", m_step=NewtonMStep()
        )
        found = _iterate(seen, settings, StartState(q), generator)
        if self.max_cells < self.refine_cells <= data.n_cells / 2:
            found = _iterate(choose_cells(data, self.refine_cells, generator), settings, found, generator)
        return found

    def _search(self, seen: CountData, settings: MixtureSettings, generator: np.random.Generator) -> Tensor:
        """(cells, K) responsibilities."""
        n_components, n_cells = settings.n_components, seen.n_cells
        given = settings.weights == "given"
        search = self._over_genes(seen, given, generator)
        n_first = n_components
        if self.surplus > 0 and not given:  # a given prior has its number of components
            n_first += max(LEAST_SURPLUS, math.ceil(self.surplus * n_components))
            n_first = max(n_components, min(n_first, n_cells // CELLS_A_COMPONENT))
        begins = []
        for number in range(self.n_starts):
            at_random = self.random_every and (number + 1) % self.random_every == 0
            begin = search.at_random if given or at_random else search.by_k_means
            begins.append(begin(n_first, generator))

        # side by side: much of a run is too small to be shared out over threads
        first = side_by_side(lambda number: search.run(begins[number], FIRST_ITERATIONS), self.n_starts)
        kept = sorted(first, key=lambda run: -run.score)[: math.ceil(self.n_starts * GOING_ON)]
        runs = side_by_side(
            lambda number: search.without_least_missed(kept[number], n_components, ITERATIONS_A_REMOVAL),
            len(kept),
        )
        best = search.go_on(max(runs, key=lambda run: run.score), LAST_ITERATIONS)
        log.info(
            "random starts, held-out nats per cell: %s; gone on with %s; the best ends at %.3f",
            [round(run.score / n_cells, 3) for run in first],
            [round(run.score / n_cells, 3) for run in kept],
            best.score / n_cells,
        )
        return torch.softmax(best.component_joint, 1)

    def _over_genes(self, seen: CountData, given: bool, generator: np.random.Generator) -> _Search:
        genes = most_variable_genes(seen.counts, seen.size_factors, self.max_genes)
        return _Search.of(seen.select_genes(genes), given, self.n_axes, self.folds, generator)


@dataclass(frozen=True)
class DirichletStart:
    """Responsibilities drawn uniformly from the simplex, Dirichlet(1, ..., 1), and no search."""

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        return StartState(random_responsibilities(data.n_cells, settings.n_components, generator))


class _Run(NamedTuple):
    """A search's state: its model, (cells, K, L) joint log likelihood, and their summed log likelihood."""

    model: FactorMixture
    joint: Tensor
    score: float

    @property
    def component_joint(self) -> Tensor:
        """(cells, K) ln pi_k + ln p(x_i | k)."""
        return torch.logsumexp(self.joint, 2)


@dataclass(frozen=True)
class _Search:
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
    ) -> _Search:
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

    def run(self, q: Tensor, iterations: int) -> _Run:
        """EM from responsibilities (cells, K)."""
        return self._run(self._model(q.shape[1]), q, iterations)

    def without(self, run: _Run, k: int) -> _Run:
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

    def _run(self, model: FactorMixture, q: Tensor, iterations: int) -> _Run:
        begin = model.spread(q, self._scores(q.argmax(1).numpy()))
        return self._state(model, begin, iterations)

    def without_least_missed(self, run: _Run, n_components: int, iterations: int) -> _Run:
        """Take the component away that is missed least, until so many are left.

        Those without which the log likelihood falls least as the others stand are tried; what counts is the
        log likelihood after an iteration, when means and axes have followed.
        """
        while run.joint.shape[1] > n_components:
            losses = _losses(run.component_joint)
            candidates = [k for k in np.argsort(losses)[:CANDIDATES] if losses[k] <= NEARLY * losses.min()]
            tried = [self.without(run, int(k)) for k in candidates]
            run = self.go_on(max(tried, key=lambda run: run.score), iterations - 1)
        return run

    def go_on(self, run: _Run, iterations: int) -> _Run:
        """EM from where the run stands."""
        if iterations == 0:
            return run
        posterior = torch.softmax(run.joint.flatten(1), 1).view_as(run.joint)
        return self._state(run.model, posterior, iterations)

    def _state(self, model: FactorMixture, q: Tensor, iterations: int) -> _Run:
        joint, _ = model.run(self.batches, q, max_iterations=iterations, stopping=StoppingRule())
        return _Run(model, joint, _score(joint.flatten(1)))

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


def _score(joint: Tensor) -> float:
    """Summed log likelihood, nats."""
    return float(torch.logsumexp(joint, 1).sum())


def _losses(joint: Tensor) -> np.ndarray:
    """(K,) nats, 0 or more, by which the log likelihood falls without each component as the others stand."""
    whole = torch.logsumexp(joint, 1)
    n_components = joint.shape[1]
    losses = []
    for k in range(n_components):
        others = [other for other in range(n_components) if other != k]
        losses.append(float((whole - torch.logsumexp(joint[:, others], 1)).sum()))
    return np.maximum(losses, 0.0)  # of one without cells rounding can make it negative


def _iterate(
    seen: CountData, settings: MixtureSettings, begin: StartState, generator: np.random.Generator
) -> StartState:
    """A few iterations of the mixture itself on some cells, with all genes."""
    basis, batches = prepare(seen, settings.folds, generator, dtype=settings.torch_dtype)
    mixture = new_mixture(seen, settings, basis, begin)
    run_em(
        mixture,
        batches,
        responsibilities=begin.responsibilities,
        max_iterations=REFINE_ITERATIONS,
        stopping=StoppingRule(),
    )
    return StartState.of(mixture)

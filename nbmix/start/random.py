"""Random responsibilities: the best of several short cross-fitted runs by held-out likelihood."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from nbmix.data.counts import CountData
from nbmix.errors import InputError
from nbmix.mixture import MixtureSettings, StoppingRule, annealing, responsibilities_of, run_em
from nbmix.start.base import StartState, choose_cells, new_mixture, prepare, random_responsibilities

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RandomStart:
    """Each run begins at responsibilities drawn uniformly from the simplex.

    A run's cells are scored by the copy of the components that has not seen them, so runs are ranked
    honestly and without labels.

    Attributes:
        n_starts: short runs; 1 returns random responsibilities as they are.
        iterations: of each short run at most.
        max_cells: runs see a random subset of this many cells; all runs the same one.
        folds: of the short runs, 2 or more, also where the fit itself is not cross-fitted.
        anneal_from: temperature beta of a run's first E step, growing to 1; 1 is no annealing.
        anneal_growth: its growth factor per iteration.
    """

    n_starts: int = 5
    iterations: int = 30
    max_cells: int = 2000
    folds: int = 5
    anneal_from: float = 1.0
    anneal_growth: float = 1.25

    def __post_init__(self) -> None:
        for name, least in (("n_starts", 1), ("iterations", 1), ("max_cells", 1), ("folds", 2)):
            if getattr(self, name) < least:
                raise InputError(f"start.{name}={getattr(self, name)}: must be {least} or more")
        if not 0 < self.anneal_from <= 1:
            raise InputError(f"start.anneal_from={self.anneal_from}: must be above 0 and at most 1")
        if not self.anneal_growth > 1:
            raise InputError(f"start.anneal_growth={self.anneal_growth}: must be above 1")

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        n_components = settings.n_components
        if self.n_starts == 1 or n_components == 1:
            return StartState(random_responsibilities(data.n_cells, n_components, generator))
        seen = choose_cells(data, self.max_cells, generator)
        # as the defaults fit, also where the fit itself is plain: a vote for oneself has no honest rank
        settings = MixtureSettings(
            n_components,
            folds=min(self.folds, max(2, seen.n_cells)),
            weights=settings.weights,
            dtype=settings.dtype,
        )
        basis, batches = prepare(seen, settings.folds, generator)
        best, best_score, scores = StartState(), -np.inf, []
        for _ in range(self.n_starts):
            mixture = new_mixture(seen, settings, basis)
            run_em(
                mixture,
                batches,
                responsibilities=random_responsibilities(seen.n_cells, n_components, generator),
                max_iterations=self.iterations,
                stopping=StoppingRule(tolerance=1e-5, patience=2),
                temperatures=[] if self.anneal_from == 1 else annealing(self.anneal_from, self.anneal_growth),
            )
            q, score = responsibilities_of(mixture, batches, seen.n_cells)
            scores.append(score)
            if score > best_score:
                best_score = score
                best = StartState(
                    q if seen is data else None, mixture.components(), mixture.log_weights.data[-1]
                )
        log.info("random starts, held-out log likelihood per cell: %s", np.round(scores, 3).tolist())
        return best

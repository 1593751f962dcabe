"""EM: what an iteration is, the loop over batches in memory, and when it stops."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from nbmix.core.batch import CellBatch
from nbmix.core.mixture import Mixture, Posterior


class EMModel(Protocol):
    """What EM iterates: an E step and statistics of each batch, and an M step on their sum."""

    @property
    def scores_are_comparable(self) -> bool:
        """Whether the log likelihood of the next E step can be compared with those of later ones."""
        ...

    def meet(self, batches: Iterable[CellBatch], responsibilities: Tensor) -> None:
        """Look at the cells before EM begins at responsibilities (all rows, K or K and levels)."""
        ...

    def reset_statistics(self) -> None:
        """Forget the statistics of the last iteration."""
        ...

    def posterior(self, batch: CellBatch) -> Posterior:
        """E step."""
        ...

    def collect(self, batch: CellBatch, responsibilities: Tensor) -> None:
        """Add a batch's statistics."""
        ...

    def m_step(self, *, warm: bool) -> float:
        """Fit the parameters to the statistics.

        Args:
            warm: responsibilities are those of the model's own E step; where they were given, parameters
                need not be a place to begin at.

        Returns:
            What a prior adds to the log likelihood of the parameters as they stood before, in nats.
        """
        ...


class Iteration:
    """One iteration of EM: the E step and the statistics of one batch after another, and how they score.

    The objective belongs to the parameters before the M step, which returns a part of it.

    Args:
        model: its statistics are forgotten.
        given: (all rows, K) responsibilities that stand in for the E step.

    Attributes:
        is_warm: whether responsibilities are those of the model's own E step.
        is_comparable: whether the objective can be compared with those of later iterations.
        log_likelihood: sum over the cells so far, nats.
        n_cells: so far.
        log_prior_density: as the M step returns it, nats.
    """

    def __init__(self, model: EMModel, given: Tensor | None = None) -> None:
        model.reset_statistics()
        self.model, self.given = model, given
        self.is_warm = given is None
        self.is_comparable = self.is_warm and model.scores_are_comparable
        self.log_likelihood, self.n_cells, self.log_prior_density = 0.0, 0.0, 0.0

    def add(self, batch: CellBatch) -> Tensor:
        """E step of a batch and its statistics; the responsibilities (cells, K)."""
        if self.given is None:
            q, log_likelihood = self.model.posterior(batch)
            self.log_likelihood += float(log_likelihood.sum())
        else:
            q = self.given[batch.rows.to(self.given.device)].to(batch.rows.device)
        self.n_cells += batch.n_cells
        self.model.collect(batch, q)
        return q

    @property
    def objective(self) -> float:
        """Nats per cell."""
        return (self.log_likelihood + self.log_prior_density) / self.n_cells


@dataclass
class StoppingRule:
    """Stop once ``patience`` iterations in a row raise the best objective by less than ``tolerance``."""

    tolerance: float = 1e-5
    patience: int = 2
    best: float = -math.inf
    waited: int = 0

    def update(self, objective: float) -> bool:
        """Take the next objective; True once the fit has converged."""
        if not math.isfinite(self.best) or objective > self.best + self.tolerance * abs(self.best):
            self.best, self.waited = max(objective, self.best), 0
        else:
            self.best, self.waited = max(objective, self.best), self.waited + 1
        return self.waited >= self.patience


@dataclass
class EMRun:
    """How far EM has come.

    Attributes:
        stopping: when it has converged.
        objective: nats per cell of every iteration whose objective is comparable.
        converged: whether it has.
    """

    stopping: StoppingRule
    objective: list[float] = field(default_factory=list)
    converged: bool = False

    def take(self, iteration: Iteration) -> bool:
        """Take the next iteration; True once EM has converged."""
        if iteration.is_comparable:
            self.objective.append(iteration.objective)
            self.converged = self.stopping.update(iteration.objective) or self.converged
        return self.converged


def iterate(
    model: EMModel,
    batches: Iterable[CellBatch],
    *,
    responsibilities: Tensor | None = None,
    max_iterations: int = 50,
    stopping: StoppingRule | None = None,
    last_m_step: bool = True,
) -> EMRun:
    """Iterate EM over batches in memory.

    Args:
        model: its parameters are where EM begins, unless
        responsibilities: (all rows, K) are given, which stand in for the first E step.
        max_iterations: M steps at most.
        stopping: when to stop early.
        last_m_step: once EM has converged, also take the M step that is due; else the parameters stay those
            that were scored, and the objective is without a prior.
    """
    run = EMRun(stopping or StoppingRule())
    if responsibilities is not None and max_iterations:
        model.meet(batches, responsibilities)
    for number in range(max_iterations):
        iteration = Iteration(model, responsibilities if number == 0 else None)
        for batch in batches:
            iteration.add(batch)
        if not last_m_step and run.take(iteration):
            break
        iteration.log_prior_density = model.m_step(warm=iteration.is_warm)
        if last_m_step and run.take(iteration):
            break
    return run


def run_em(
    mixture: Mixture,
    batches: Iterable[CellBatch],
    *,
    responsibilities: Tensor | None = None,
    max_iterations: int = 50,
    stopping: StoppingRule | None = None,
) -> EMRun:
    """``iterate`` a mixture, and fit its copy of all cells at the end: what starts and subsample fits use.

    Args:
        mixture: attached to the basis of the batches.
        responsibilities, max_iterations, stopping: see ``iterate``; without folds a single iteration that
            gains too little is enough to stop.
    """
    run = iterate(
        mixture,
        batches,
        responsibilities=responsibilities,
        max_iterations=max_iterations,
        stopping=stopping or StoppingRule(patience=1 if mixture.settings.folds == 1 else 2),
    )
    if mixture.settings.folds > 1:
        mixture.fit_whole()
    return run

"""The loop of EM over batches in memory, and when it stops."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nbmix.core.batch import CellBatch
from nbmix.core.mixture import Mixture


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


class EMRun(NamedTuple):
    """What a run of EM leaves: nats per cell at every iteration, where folds > 1 once it is cross-fitted."""

    objective: list[float]
    converged: bool


def run_em(
    mixture: Mixture,
    batches: Sequence[CellBatch],
    *,
    responsibilities: Tensor | None = None,
    max_iterations: int = 50,
    stopping: StoppingRule | None = None,
    temperatures: Iterable[float] = (),
) -> EMRun:
    """Iterate EM over batches in memory, without Lightning: what starts and subsample fits use.

    Args:
        mixture: attached to the basis of the batches; its components are where EM begins, unless
        responsibilities: (all rows, K) are given, which stand in for the first E step.
        max_iterations: M steps at most.
        stopping: when to stop early; never while annealing.
        temperatures: beta of the first E steps, then 1.
    """
    stopping = stopping or StoppingRule(patience=1 if mixture.settings.folds == 1 else 2)
    schedule: Iterator[float] = iter(temperatures)
    trace: list[float] = []
    converged = False
    for iteration in range(max_iterations):
        mixture.begin()
        warm = iteration > 0 or responsibilities is None
        comparable = warm and mixture.honest
        temperature = next(schedule, 1.0) if warm else 1.0
        total, n_cells = 0.0, 0
        for batch in batches:
            if warm:
                q, log_likelihood = mixture.posterior(batch, temperature=temperature)
                total += float(log_likelihood.sum())
            else:
                assert responsibilities is not None
                q = responsibilities[batch.rows]
            n_cells += batch.n_cells
            mixture.collect(batch, q)
        penalty = mixture.m_step(warm=warm, whole=False)
        if comparable:
            trace.append((total + penalty) / n_cells)
            if temperature == 1 and stopping.update(trace[-1]):
                converged = True
                break
    if mixture.settings.folds > 1:
        mixture.fit_whole()
    return EMRun(trace, converged)


def responsibilities_of(mixture: Mixture, batches: Sequence[CellBatch], n_cells: int) -> tuple[Tensor, float]:
    """(n_cells, K) responsibilities from copies that have not seen the cell, and nats per cell."""
    q = torch.zeros(n_cells, mixture.settings.n_components, dtype=torch.float64)
    total = 0.0
    for batch in batches:
        posterior = mixture.posterior(batch)
        q[batch.rows] = posterior.responsibilities.cpu()
        total += float(posterior.log_likelihood.sum())
    return q, total / max(1, sum(batch.n_cells for batch in batches))


def annealing(first: float = 0.02, growth: float = 1.25) -> list[float]:
    """Temperatures first, first * growth, ... below 1."""
    steps = math.ceil(-math.log(first) / math.log(growth))
    return [first * growth**step for step in range(steps)]

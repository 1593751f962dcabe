"""Random responsibilities: the best of several short cross-fitted runs by held-out likelihood."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nbmix.components import START_LOG_INV_DISP, Components, NewtonMStep, lowest_log_mean
from nbmix.data.counts import CountData
from nbmix.errors import InputError
from nbmix.mixture import Mixture, MixtureSettings, StoppingRule, annealing, responsibilities_of, run_em
from nbmix.products import CellBatch
from nbmix.start.base import StartState, choose_cells, new_mixture, prepare, random_responsibilities

log = logging.getLogger(__name__)

TRIAL_TOLERANCE = 1e-3  # nats of a gene, in the M steps of short runs
REFINE_ITERATIONS = 4  # the rest is for all cells


@dataclass(frozen=True)
class RandomStart:
    """Each run begins at responsibilities drawn uniformly from the simplex.

    A run's cells are scored by the copy of the components that has not seen them, so runs are ranked
    honestly and without labels. All runs go a few iterations; the best of them go on.

    Attributes:
        n_starts: short runs; 1 returns random responsibilities as they are.
        iterations: of each short run at most.
        trial: iterations after which runs are first ranked.
        finalists: runs that go on after the trial.
        max_cells: runs see a random subset of this many cells; all runs the same one.
        refine_cells: where the data hold twice as many, the best run goes on with so many of them.
        gene_share: runs see the genes with counts in number at least this share of their cells; rarer ones
            have little to say, and make for most of the work.
        folds: of the short runs, 2 or more, also where the fit itself is not cross-fitted.
        anneal_from: temperature beta of a run's first E step, growing to 1; 1 is no annealing.
        anneal_growth: its growth factor per iteration.
    """

    n_starts: int = 5
    iterations: int = 30
    trial: int = 12
    finalists: int = 3
    max_cells: int = 2000
    refine_cells: int = 10_000
    gene_share: float = 0.01
    folds: int = 5
    anneal_from: float = 1.0
    anneal_growth: float = 1.25

    def __post_init__(self) -> None:
        for name, least in (
            ("n_starts", 1),
            ("iterations", 1),
            ("trial", 1),
            ("finalists", 1),
            ("max_cells", 1),
            ("refine_cells", 1),
            ("folds", 2),
        ):
            if getattr(self, name) < least:
                raise InputError(f"start.{name}={getattr(self, name)}: must be {least} or more")
        if not self.gene_share >= 0:
            raise InputError(f"start.gene_share={self.gene_share}: must be 0 or more")
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
        totals = np.asarray(seen.counts.sum(axis=0, dtype=np.float64)).ravel()
        genes = np.flatnonzero(totals >= max(1.0, self.gene_share * seen.n_cells))
        if not genes.size:  # too sparse to choose
            genes = np.arange(data.n_genes)
        few = seen.select_genes(genes)
        # as the defaults fit, also where the fit itself is plain: a vote for oneself has no honest rank
        settings = MixtureSettings(
            n_components,
            folds=min(self.folds, max(2, seen.n_cells)),
            weights=settings.weights,
            dtype=settings.dtype,
            m_step=NewtonMStep(tolerance=TRIAL_TOLERANCE),
        )
        basis, batches = prepare(few, settings.folds, generator)
        temperatures = [] if self.anneal_from == 1 else annealing(self.anneal_from, self.anneal_growth)
        trial = min(self.iterations, self.trial + len(temperatures))
        runs = []
        for _ in range(self.n_starts):
            mixture = new_mixture(few, settings, basis)
            q = random_responsibilities(seen.n_cells, n_components, generator)
            run_em(mixture, batches, responsibilities=q, max_iterations=trial, temperatures=temperatures)
            runs.append(_Run(mixture, *responsibilities_of(mixture, batches, seen.n_cells)))
        ranked = sorted(runs, key=lambda run: -run.score)
        scores = [round(run.score, 3) for run in runs]
        best = ranked[0]
        if trial < self.iterations:
            best = max(
                (self._finish(run, batches, seen.n_cells) for run in ranked[: self.finalists]),
                key=lambda run: run.score,
            )
        log.info(
            "random starts, held-out log likelihood per cell after %d iterations: %s; the best ends at %.3f",
            trial,
            scores,
            best.score,
        )
        found = StartState(
            best.responsibilities if seen.n_cells == data.n_cells else None,
            _among_all_genes(best.mixture.components(), genes, totals, float(seen.size_factors.sum())),
            best.mixture.log_weights.data[-1],
        )
        if self.max_cells < self.refine_cells <= data.n_cells / 2:
            return self._refine(found, data, replace(settings, m_step=NewtonMStep()), generator)
        return found

    def _refine(
        self, found: StartState, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        """Go on with more cells and every gene, so that the whole data are passed over a few times alone."""
        seen = choose_cells(data, self.refine_cells, generator)
        basis, batches = prepare(seen, settings.folds, generator)
        mixture = new_mixture(seen, settings, basis)
        assert found.components is not None
        mixture.set_components(found.components, found.log_weights)
        stopping = StoppingRule(tolerance=1e-5, patience=2)
        run_em(mixture, batches, max_iterations=REFINE_ITERATIONS, stopping=stopping)
        return StartState(components=mixture.components(), log_weights=mixture.log_weights.data[-1])

    def _finish(self, run: _Run, batches: Sequence[CellBatch], n_cells: int) -> _Run:
        left = self.iterations - self.trial
        run_em(run.mixture, batches, max_iterations=left, stopping=StoppingRule(tolerance=1e-5, patience=2))
        return _Run(run.mixture, *responsibilities_of(run.mixture, batches, n_cells))


class _Run(NamedTuple):
    mixture: Mixture
    responsibilities: Tensor
    score: float


def _among_all_genes(
    components: Components, genes: np.ndarray, totals: np.ndarray, total_size: float
) -> Components:
    """Components (K, all genes): the genes that were left out begin at their pooled mean."""
    floor = lowest_log_mean(total_size)
    with np.errstate(divide="ignore"):
        pooled = np.log(totals / total_size)
    log_mean = torch.from_numpy(pooled).clamp(min=floor).repeat(components.log_mean.shape[0], 1)
    log_inv_disp = torch.full_like(log_mean, START_LOG_INV_DISP)
    log_mean[:, genes], log_inv_disp[:, genes] = components
    return Components(log_mean, log_inv_disp)

"""EM as a LightningModule: one epoch is one iteration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor

from nbmix.core.batch import CellBatch
from nbmix.core.declared import Setting, checked, settings_among
from nbmix.core.em_loop import EMRun, Iteration, StoppingRule
from nbmix.core.folds import CELLS_A_BLOCK
from nbmix.core.m_step import MStep, NewtonMStep
from nbmix.core.settings import (
    ComponentsPerGroup,
    Dtype,
    Folds,
    MixtureSettings,
    NComponents,
    PseudoCells,
    Weights,
    n_to_fit,
)
from nbmix.data.module import CountsDataModule
from nbmix.errors import InputError
from nbmix.models.base import FitDefaults, MixtureModule, Prediction
from nbmix.starts.base import StartState


@checked("model")
class MixtureEM(MixtureModule):
    """Exact EM: every epoch adds up the statistics of all batches and ranks, then takes one M step.

    The objective of an iteration belongs to the components at its beginning: the log likelihood per cell,
    with the log prior of pseudo-cells where folds = 1 (it never falls then), or the cross-fitted held-out
    log likelihood where folds > 1. It begins at the second iteration where responsibilities are given,
    and at the third where components are that may have seen the cells.

    Args:
        gene_names: (genes,).
        m_step: see ``MixtureSettings``.
    """

    kind: ClassVar[str] = "em"
    shuffle: ClassVar[bool] = False
    objective_name: ClassVar[str] = "objective"
    defaults: ClassVar[FitDefaults] = FitDefaults("random", max_epochs=100, batch_size=CELLS_A_BLOCK)
    in_python: ClassVar[bool] = True
    posterior_is_exact: ClassVar[bool] = True
    free_to_change: ClassVar[frozenset[str]] = frozenset({"tolerance", "patience"})

    def __init__(
        self,
        gene_names: np.ndarray,
        *,
        n_components: NComponents = MixtureSettings.n_components,
        components_per_group: ComponentsPerGroup = "auto",
        folds: Folds = MixtureSettings.folds,
        pseudo_cells: PseudoCells = MixtureSettings.pseudo_cells,
        weights: Weights = MixtureSettings.weights,
        dtype: Dtype = MixtureSettings.dtype,
        m_step: MStep | None = None,
        tolerance: Annotated[
            float, Setting("The smallest rise of the objective that counts, as a share of it.", above=0)
        ] = StoppingRule.tolerance,
        patience: Annotated[
            int,
            Setting("The fit has converged after so many iterations in a row without such a rise.", least=1),
        ] = StoppingRule.patience,
    ) -> None:
        plain = settings_among(locals(), MixtureEM)
        settings = MixtureSettings(
            n_to_fit(n_components, components_per_group),  # of "auto" a fit has made a number
            folds,
            pseudo_cells,
            weights,
            m_step or NewtonMStep(),
            dtype,
            n_components,
        )
        super().__init__(gene_names, settings, plain)
        self.automatic_optimization = False
        self.run = EMRun(StoppingRule(tolerance, patience), self.objective)
        self.converged = False
        self._start: Tensor | None = None  # (cells, K) given responsibilities, until an M step has used them
        self._assigned: Tensor | None = None  # (cells,) component in the last iteration
        self._e_steps_until_comparable = 0  # of the mixture, as a checkpoint brought it

    @classmethod
    def can_join(cls, settings: Mapping[str, Any]) -> bool:
        folds, weights = settings.get("folds", MixtureSettings.folds), settings.get("weights", "learned")
        return folds > 1 and weights != "given"

    @classmethod
    def knows_origins(cls) -> bool:
        return True

    def begin(self, start: StartState, data: CountsDataModule) -> None:
        start.hand_to(self.mixture)
        if start.responsibilities is not None:
            rows = torch.from_numpy(data.training_rows)
            self._start = torch.zeros(data.data.n_cells, start.responsibilities.shape[1], dtype=torch.float64)
            self._start[rows] = start.responsibilities.double()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return MStepOptimizer(list(self.mixture.parameters()))

    def on_train_start(self) -> None:
        super().on_train_start()
        self.mixture.e_steps_until_comparable = max(
            self.mixture.e_steps_until_comparable, self._e_steps_until_comparable
        )
        self.trainer.should_stop = bool(self.converged)  # a resumed fit that had converged
        if self._start is None and self.mixture.origins is not None:
            self.mixture.origins.are_first = False
        if self._start is not None:
            self._start = self.from_first_rank(self._start)
            many = self.trainer.world_size > 1
            self.mixture.meet(self.data.train_dataloader(), self._start, reduce=many)

    def on_train_epoch_start(self) -> None:
        self._iteration = Iteration(self.mixture, self._start)
        self._changed = 0

    def training_step(self, batch: CellBatch, batch_idx: int) -> dict[str, Tensor]:
        iteration = self._iteration
        q = iteration.add(batch)
        self._count_changes(batch, q)
        if self.trainer.is_last_batch:  # before validation, and where Lightning counts steps
            optimizer, many = self.optimizers(), self.trainer.world_size > 1
            assert isinstance(optimizer, LightningOptimizer)
            m_step = partial(self.mixture.m_step, warm=iteration.is_warm, reduce=many, whole=True)
            iteration.log_prior_density = optimizer.step(m_step)
            self._start = None
        return {"responsibilities": q}

    def _count_changes(self, batch: CellBatch, q: Tensor) -> None:
        rows, now = batch.rows.cpu(), q.argmax(1).cpu()
        if self._assigned is None:
            self._assigned = torch.full((self.data.data.n_cells,), -1)
        self._changed += int((self._assigned[rows] != now).sum())
        self._assigned[rows] = now

    def on_train_batch_end(self, outputs: Any, batch: CellBatch, batch_idx: int) -> None:
        if not self.trainer.is_last_batch:
            return
        iteration = self._iteration
        # GPUs add up in any order
        density = self.from_first_rank(torch.tensor(iteration.log_prior_density, dtype=torch.float64))
        iteration.log_prior_density = float(density)
        iteration.log_likelihood, iteration.n_cells, changed = self.sum_over_ranks(
            iteration.log_likelihood, iteration.n_cells, self._changed
        )
        self.n_iterations = self.current_epoch + 1
        logged = {"changed": changed / iteration.n_cells, "iteration": float(self.n_iterations)}
        if iteration.is_comparable:
            logged["objective"] = iteration.objective
            if self.mixture.settings.folds > 1:
                logged["crossfit_log_likelihood"] = iteration.objective
        if self.run.take(iteration):
            self.converged = self.trainer.should_stop = True
        self.log_epoch(logged)

    @torch.no_grad()
    def predict_step(self, batch: CellBatch, batch_idx: int) -> Prediction:
        of_components = self.mixture.component_log_likelihood(batch)
        q, own = self.mixture.posterior_of(batch, of_components)
        missing, of_components = torch.full_like(own, torch.nan), of_components.float()
        if batch.fold < 0:
            return Prediction(batch.rows, q, own, missing, missing, of_components)
        by_all = self.mixture.posterior(batch, fold=-1).log_likelihood
        return Prediction(batch.rows, q, by_all, own, missing, of_components)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[self.kind] |= {
            "best": self.run.stopping.best,
            "waited": self.run.stopping.waited,
            "converged": self.converged,
            "assigned": self._assigned,
            "start": self._start,
            # E steps whose objectives depend on the start; older checkpoints have this name, too
            "dependent": self.mixture.e_steps_until_comparable,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        em = checkpoint[self.kind]
        n_cells = self.data.data.n_cells
        for kept in (em["assigned"], em["start"]):
            if kept is not None and len(kept) != n_cells:
                raise InputError(
                    f"ckpt_path: was saved in a fit of {len(kept)} cells, the data has {n_cells}; "
                    "to go on, give the same data"
                )
        self.run.objective = self.objective
        self.converged = self.run.converged = em["converged"]
        self.run.stopping.best, self.run.stopping.waited = em["best"], em["waited"]
        self._assigned, self._start = em["assigned"], em["start"]
        self._e_steps_until_comparable = em["dependent"]


class MStepOptimizer(torch.optim.Optimizer):
    """Runs the M step as a closure: Lightning then counts steps and saves checkpoints as for any other."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        # torch declares overloads for the two cases
        return None if closure is None else closure()

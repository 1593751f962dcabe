"""Amortized variational inference as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nbmix.core.batch import CellBatch
from nbmix.core.declared import Setting, checked, settings_among
from nbmix.core.em_loop import StoppingRule
from nbmix.core.settings import (
    ComponentsPerGroup,
    Dtype,
    MixtureSettings,
    NComponents,
    StartPseudoCells,
    Weights,
    n_to_fit,
)
from nbmix.data.module import CountsDataModule
from nbmix.data.sampler import EPOCH_CELLS, LEAST_BATCH
from nbmix.models.base import FitDefaults, Prediction
from nbmix.models.encoder_start import begin_near_posterior
from nbmix.models.minibatch import ElboTerms, MinibatchModule, prior_where_empty
from nbmix.models.networks import SparseEncoder
from nbmix.models.offsets import step_offsets
from nbmix.models.start_components import improved_on_all_cells
from nbmix.starts.base import StartState

RATE = 1e-3  # of Adam for the encoder, in batches of 64 cells


class Phases(NamedTuple):
    """What a fit has been told by the ELBO of held-out cells.

    Attributes:
        n_encoder_epochs: in which the encoder learns alone.
        are_over: whether the fit has ended.
    """

    n_encoder_epochs: int
    are_over: bool = False


def phases(held_out_elbo: Sequence[float], encoder_epochs: int, tolerance: float, patience: int) -> Phases:
    """Where the encoder's time alone ends, and whether the fit does: each by ``StoppingRule``.

    Args:
        held_out_elbo: after each epoch so far, nats per cell.
        encoder_epochs: of the encoder alone, at most.
        tolerance, patience: of the rule.

    >>> phases([-9.0, -8.0, -7.999], encoder_epochs=5, tolerance=0.01, patience=1)
    Phases(n_encoder_epochs=3, are_over=False)
    """
    rule = StoppingRule(tolerance, patience)
    for epoch, elbo in enumerate(held_out_elbo, 1):
        has_ended = rule.update(elbo)
        if epoch > encoder_epochs:
            if has_ended:
                return Phases(encoder_epochs, are_over=True)
        elif has_ended or epoch == encoder_epochs:
            encoder_epochs, rule = epoch, StoppingRule(tolerance, patience, best=elbo)
    return Phases(encoder_epochs)


@checked("model")
class AmortizedMixture(MinibatchModule):
    """An encoder network gives the responsibilities; both sides climb the ELBO by minibatches.

        ELBO_i = sum_k q_ik [ l_ik + ln pi_k - ln q_ik ],    q_i = encoder(x_i)

    What the start has found on some of many cells is improved by EM on all of them, and the encoder begins
    near the posterior (``nbmix.models.encoder_start``). It then learns the exact posterior (cross entropy),
    so that the components are not pulled together while it still guesses, and at last both move.

    Held-out cells say how long: the encoder is alone, and the fit goes on, until their ELBO no longer rises.
    A rise is looked for over as many epochs as it takes to meet 32,768 cells.

    Where cells come from several origins the l_ik are those of components moved by the offsets of the start
    (``nbmix.core.offsets``), and the encoder is told the origin. Offsets take a step at the end of each
    epoch; while the encoder still guesses, by the exact posterior. Cells of an origin that the encoder does
    not know get the exact posterior.

    Args:
        gene_names: (genes,).
    """

    kind: ClassVar[str] = "amortized"
    in_python: ClassVar[bool] = True
    defaults: ClassVar[FitDefaults] = FitDefaults("subsample", max_epochs=20, batch_size="auto")
    free_to_change: ClassVar[frozenset[str]] = frozenset(
        {"lr", "components_lr", "em_iterations", "encoder_start", "encoder_epochs", "heldout_tolerance"}
    )
    gradient_norms: ClassVar[Sequence[str]] = ("encoder", "mixture.log_mean", "mixture.log_inv_disp")

    def __init__(
        self,
        gene_names: np.ndarray,
        *,
        n_components: NComponents = MixtureSettings.n_components,
        components_per_group: ComponentsPerGroup = "auto",
        weights: Weights = MixtureSettings.weights,
        dtype: Dtype = MixtureSettings.dtype,
        n_hidden: Annotated[
            int, Setting("The number of units in the hidden layer of the encoder.", least=1)
        ] = 128,
        lr: Annotated[
            float | str,
            Setting(
                "The learning rate of the encoder. auto is 0.001 for batches of 64 cells, and grows with the "
                "square root of larger ones.",
                above=0,
                words=("auto",),
            ),
        ] = "auto",
        components_lr: Annotated[
            float, Setting("The learning rate of components and weights.", above=0)
        ] = 1e-3,
        em_iterations: Annotated[
            int,
            Setting(
                "The number of iterations of EM on all cells that improve the start, where there are over "
                "10,000 cells.",
                least=0,
            ),
        ] = 1,
        encoder_start: Annotated[
            str,
            Setting(
                "Where the encoder begins: near the posterior under the components, or random.",
                words=("components", "random"),
            ),
        ] = "components",
        encoder_epochs: Annotated[
            int,
            Setting(
                "For so many epochs, or fewer if held-out cells gain no more, the encoder alone learns the "
                "exact posterior of the start.",
                least=0,
            ),
        ] = 5,
        heldout_tolerance: Annotated[
            float | None,
            Setting(
                "The smallest rise of the ELBO of held-out cells that counts, as a share of it. With null "
                "there are always encoder_epochs and trainer.max_epochs.",
                least=0,
            ),
        ] = 5e-5,
        train_components: Annotated[
            bool, Setting("With false the components stay as the start made them.")
        ] = True,
        pseudo_cells: StartPseudoCells = MixtureSettings.pseudo_cells,
    ) -> None:
        plain = settings_among(locals(), AmortizedMixture)
        n_fitted = n_to_fit(n_components, components_per_group)
        settings = MixtureSettings(n_fitted, 1, pseudo_cells, weights, dtype=dtype, n_groups=n_components)
        super().__init__(gene_names, settings, plain)
        self.encoder_lr, self.components_lr = RATE if isinstance(lr, str) else lr, components_lr
        self.has_auto_lr = isinstance(lr, str)
        self.em_iterations, self.encoder_start = em_iterations, encoder_start
        self.encoder_epochs, self.train_components = encoder_epochs, train_components
        self.heldout_tolerance = heldout_tolerance
        self.held_out_elbo: list[float] = []  # after each epoch, nats per cell
        self.encoder = SparseEncoder(len(self.gene_names), n_fitted, n_hidden)
        self.mixture.requires_grad_(train_components)
        self.mixture.log_weights.requires_grad_(train_components and weights == "learned")

    @classmethod
    def can_join(cls, settings: Mapping[str, Any]) -> bool:
        return settings.get("weights", "learned") != "given"

    @classmethod
    def knows_origins(cls) -> bool:
        return True

    def know_origins(self, names: tuple[str, ...]) -> None:
        super().know_origins(names)
        if names:
            self.encoder.know_origins(len(names))

    def start_components(self, start: StartState, data: CountsDataModule) -> StartState:
        found = super().start_components(start, data)
        if not self.train_components:
            return found
        return improved_on_all_cells(found, data, self.mixture.settings, self.em_iterations)

    def begin(self, start: StartState, data: CountsDataModule) -> None:
        super().begin(start, data)
        mixture = self.mixture
        if self.encoder_start == "components":
            sizes = data.training_data.size_factors
            begin_near_posterior(
                self.encoder,
                mixture.components(),
                mixture.log_weights.data[0],
                data.basis.levels,
                float(np.median(sizes[sizes > 0])),
                1 / data.basis.rate,
            )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.has_auto_lr:
            self.encoder_lr = RATE * math.sqrt(self.data.schedule.cells_a_batch / LEAST_BATCH)

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": list(self.encoder.parameters()), "lr": self.encoder_lr}]
        if trained := [p for p in self.mixture.parameters() if p.requires_grad]:
            groups.append({"params": trained, "lr": self.components_lr})
        return groups

    def terms(self, batch: CellBatch) -> ElboTerms:
        return ElboTerms(self.log_q(batch), self.log_likelihood(batch), self.log_prior(batch))

    def log_q(self, batch: CellBatch) -> Tensor:
        """(cells, K) ln q(z_i = k), as the encoder says."""
        log_q = self.encoder(batch, self.mixture.basis.levels).double()
        return prior_where_empty(log_q, self.log_prior(batch), batch)

    @property
    def encoder_alone(self) -> bool:
        """Whether the encoder learns the posterior, and the components wait."""
        return self.current_epoch < self._phases.n_encoder_epochs

    @property
    def _phases(self) -> Phases:
        """How far the fit is, as held-out cells say."""
        if self.heldout_tolerance is None:
            return Phases(self.encoder_epochs)
        patience = max(1, EPOCH_CELLS * self.data.schedule.epochs_a_pass // self.data.training_rows.size)
        return phases(self.held_out_elbo, self.encoder_epochs, self.heldout_tolerance, patience)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.trainer.should_stop = self._phases.are_over  # a resumed fit that had ended

    @torch.no_grad()
    def held_out(self, batch: CellBatch) -> dict[str, Tensor]:
        log_joint = self.mixture.component_log_likelihood(batch, fold=-1) + self.log_prior(batch)
        log_q = self.log_q(batch)
        elbo = (log_q.exp() * (log_joint - log_q)).sum(1)
        return {"heldout_log_likelihood": torch.logsumexp(log_joint, 1), "heldout_elbo": elbo}

    def take_held_out(self, means: Mapping[str, float]) -> None:
        self.held_out_elbo.append(means["heldout_elbo"])
        if self._phases.are_over:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[self.kind]["held_out_elbo"] = self.held_out_elbo

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.held_out_elbo = checkpoint[self.kind].get("held_out_elbo", [])  # older ones have none

    def loss(self, terms: ElboTerms, batch: CellBatch) -> Tensor:
        if not self.encoder_alone:
            return super().loss(terms, batch)
        posterior = torch.softmax(terms.log_joint.detach(), 1)
        # the components' share is zero, not absent, as data-parallel training wants
        share = sum((0.0 * p.sum() for p in self.mixture.parameters()), torch.zeros(()))
        return share - (posterior * terms.log_q).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.encoder_alone:
            for parameter in self.mixture.parameters():
                parameter.grad = None  # else Adam would count its steps, and average in zeros
        super().on_before_optimizer_step(optimizer)

    def finish_epoch(self) -> None:
        if self.mixture.origins is not None and self.train_components:
            q = self.exact_posterior if self.encoder_alone else lambda batch: self.log_q(batch).exp()
            cells = (batch.to(self.device) for batch in self.data.training_pass())
            step_offsets(self.mixture, cells, q, reduce=self.trainer.world_size > 1)
        super().finish_epoch()

    @torch.no_grad()
    def predict_step(self, batch: CellBatch, batch_idx: int) -> Prediction:
        if self.encoder.knows(batch.origin):
            return self.terms(batch).prediction(batch.rows)
        log_likelihood, log_prior = self.log_likelihood(batch), self.log_prior(batch)
        posterior = torch.log_softmax(log_likelihood + log_prior, 1)
        return ElboTerms(posterior, log_likelihood, log_prior).prediction(batch.rows)

    def restrict_genes(self, positions: np.ndarray) -> None:
        super().restrict_genes(positions)
        self.encoder.restrict_genes(torch.from_numpy(positions))

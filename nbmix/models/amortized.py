"""Amortized variational inference as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nbmix.core.batch import CellBatch
from nbmix.core.declared import Setting, checked, settings_among
from nbmix.core.settings import (
    ComponentsPerGroup,
    Dtype,
    MixtureSettings,
    NComponents,
    StartPseudoCells,
    Weights,
    n_to_fit,
)
from nbmix.models.base import Prediction
from nbmix.models.minibatch import ElboTerms, MinibatchModule, prior_where_empty
from nbmix.models.networks import SparseEncoder
from nbmix.models.offsets import step_offsets


@checked("model")
class AmortizedMixture(MinibatchModule):
    """An encoder network gives the responsibilities; both sides climb the ELBO by minibatches.

        ELBO_i = sum_k q_ik [ l_ik + ln pi_k - ln q_ik ],    q_i = encoder(x_i)

    The encoder first learns the exact posterior under the start's components (cross entropy), so that the
    components are not pulled together while it still guesses.

    Where cells come from several origins the l_ik are those of components moved by the offsets of the start
    (``nbmix.core.offsets``), and the encoder is told the origin. Offsets take a step at the end of each
    epoch; while the encoder still guesses, by the exact posterior. Cells of an origin that the encoder does
    not know get the exact posterior.

    Args:
        gene_names: (genes,).
    """

    kind: ClassVar[str] = "amortized"
    in_python: ClassVar[bool] = True
    free_to_change: ClassVar[frozenset[str]] = frozenset({"lr", "components_lr", "encoder_epochs"})
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
        lr: Annotated[float, Setting("The learning rate of the encoder.", above=0)] = 1e-3,
        components_lr: Annotated[
            float, Setting("The learning rate of components and weights.", above=0)
        ] = 1e-3,
        encoder_epochs: Annotated[
            int,
            Setting("For so many epochs the encoder alone learns the exact posterior of the start.", least=0),
        ] = 5,
        train_components: Annotated[
            bool, Setting("With false the components stay as the start made them.")
        ] = True,
        pseudo_cells: StartPseudoCells = MixtureSettings.pseudo_cells,
    ) -> None:
        plain = settings_among(locals(), AmortizedMixture)
        n_fitted = n_to_fit(n_components, components_per_group)
        settings = MixtureSettings(n_fitted, 1, pseudo_cells, weights, dtype=dtype, n_groups=n_components)
        super().__init__(gene_names, settings, plain)
        self.lr, self.components_lr = lr, components_lr
        self.encoder_epochs, self.train_components = encoder_epochs, train_components
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

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": list(self.encoder.parameters()), "lr": self.lr}]
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
        return self.current_epoch < self.encoder_epochs

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

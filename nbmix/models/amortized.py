"""Amortized variational inference as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nbmix.core.batch import CellBatch
from nbmix.core.settings import MixtureSettings
from nbmix.errors import InputError
from nbmix.models.base import FitDefaults, Prediction
from nbmix.models.minibatch import ElboTerms, MinibatchModule, prior_where_empty
from nbmix.models.networks import SparseEncoder


class AmortizedMixture(MinibatchModule):
    """An encoder network gives the responsibilities; both sides climb the ELBO by minibatches.

        ELBO_i = sum_k q_ik [ l_ik + ln pi_k - ln q_ik ],    q_i = encoder(x_i)

    The encoder first learns the exact posterior under the start's components (cross entropy), so that the
    components are not pulled together while it still guesses.

    Args:
        gene_names: (genes,).
        n_components, weights, dtype: see ``MixtureSettings``.
        n_hidden: units of the encoder's hidden layer.
        lr: Adam's rate for the encoder.
        components_lr: Adam's rate for components and weights.
        encoder_epochs: epochs in which the encoder alone learns the exact posterior.
        train_components: else they stay as the start made them.
        pseudo_cells: of the start, see ``MixtureSettings``; the ELBO has none.
    """

    kind: ClassVar[str] = "amortized"
    defaults: ClassVar[FitDefaults | None] = FitDefaults("subsample", max_epochs=20, batch_size=64)
    free_to_change: ClassVar[frozenset[str]] = frozenset({"lr", "components_lr", "encoder_epochs"})
    gradient_norms: ClassVar[Sequence[str]] = ("encoder", "mixture.log_mean", "mixture.log_inv_disp")

    def __init__(
        self,
        gene_names: np.ndarray,
        *,
        n_components: int,
        weights: str = "learned",
        dtype: str = "float32",
        n_hidden: int = 128,
        lr: float = 1e-3,
        components_lr: float = 1e-3,
        encoder_epochs: int = 5,
        train_components: bool = True,
        pseudo_cells: float | str = "auto",
    ) -> None:
        for name, value, least in (
            ("n_hidden", n_hidden, 1),
            ("encoder_epochs", encoder_epochs, 0),
        ):
            if value < least:
                raise InputError(f"model.{name}={value}: must be {least} or more")
        for name, rate in (("lr", lr), ("components_lr", components_lr)):
            if not (math.isfinite(rate) and rate > 0):
                raise InputError(f"model.{name}={rate}: must be above 0")
        plain = {
            "n_components": n_components,
            "weights": weights,
            "dtype": dtype,
            "n_hidden": n_hidden,
            "lr": lr,
            "components_lr": components_lr,
            "encoder_epochs": encoder_epochs,
            "train_components": train_components,
            "pseudo_cells": pseudo_cells,
        }
        settings = MixtureSettings(n_components, 1, pseudo_cells, weights, dtype=dtype)
        super().__init__(gene_names, settings, plain)
        self.lr, self.components_lr = lr, components_lr
        self.encoder_epochs = encoder_epochs
        self.encoder = SparseEncoder(len(self.gene_names), n_components, n_hidden)
        self.mixture.requires_grad_(train_components)
        self.mixture.log_weights.requires_grad_(train_components and weights == "learned")

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": list(self.encoder.parameters()), "lr": self.lr}]
        if trained := [p for p in self.mixture.parameters() if p.requires_grad]:
            groups.append({"params": trained, "lr": self.components_lr})
        return groups

    def terms(self, batch: CellBatch) -> ElboTerms:
        log_likelihood, log_prior = self.log_likelihood(batch), self.log_prior(batch)
        log_q = self.encoder(batch, self.mixture.basis.levels).double()
        return ElboTerms(prior_where_empty(log_q, log_prior, batch), log_likelihood, log_prior)

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

    @torch.no_grad()
    def predict_step(self, batch: CellBatch, batch_idx: int) -> Prediction:
        return self.terms(batch).prediction(batch.rows)

    def restrict_genes(self, positions: np.ndarray) -> None:
        super().restrict_genes(positions)
        self.encoder.restrict_genes(torch.from_numpy(positions))

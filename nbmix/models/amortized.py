"""Amortized variational inference as a LightningModule."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nbmix.components import LOG_INV_DISP_RANGE, lowest_log_mean
from nbmix.data.module import CountsDataModule
from nbmix.errors import InputError
from nbmix.likelihood import differentiable_log_likelihood
from nbmix.mixture import MixtureSettings, run_em
from nbmix.models.base import MixtureModule, Prediction
from nbmix.models.encoder import SparseEncoder
from nbmix.products import CellBatch
from nbmix.start.base import StartState, new_mixture, prepare

LEAST_LOG_PRIOR = math.log(torch.finfo(torch.float64).tiny)


class AmortizedMixture(MixtureModule):
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
    shuffle: ClassVar[bool] = True
    objective_name: ClassVar[str] = "ELBO"

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

    def begin(self, start: StartState, data: CountsDataModule) -> None:
        components = start.components
        if components is None:
            assert start.responsibilities is not None
            training = data.training_data
            basis, batches = prepare(training, 1, np.random.default_rng(0))
            fitted = new_mixture(training, self.mixture.settings, basis)
            run_em(fitted, batches, responsibilities=start.responsibilities, max_iterations=1)
            components = fitted.components()
        self.mixture.set_components(components)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": list(self.encoder.parameters()), "lr": self.lr}]
        if trained := [p for p in self.mixture.parameters() if p.requires_grad]:
            groups.append({"params": trained, "lr": self.components_lr})
        return torch.optim.Adam(groups)

    def elbo_parts(self, batch: CellBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """ln q (cells, K), and per cell, in nats: expected_log_likelihood, log_prior, entropy."""
        mixture = self.mixture
        log_q = self.encoder(batch.counts).double()
        q = log_q.exp()
        log_likelihood = differentiable_log_likelihood(
            mixture.log_mean[0], mixture.log_inv_disp[0], batch, mixture.basis, mixture.settings.torch_dtype
        )
        if mixture.log_weights.requires_grad:
            log_prior = torch.log_softmax(mixture.log_weights[0], 0)
        else:  # the encoder cannot say 0, so a given prior of 0 counts as the smallest positive number
            log_prior = mixture.log_prior(batch).clamp(min=LEAST_LOG_PRIOR)
        return log_q, {
            "expected_log_likelihood": (q * log_likelihood).sum(1),
            "log_prior": (q * log_prior).sum(1),
            "entropy": -(q * log_q).sum(1),
            "log_joint": log_likelihood + log_prior,
        }

    def on_train_epoch_start(self) -> None:
        self._sums: dict[str, float] = {}
        self._cells = 0

    def training_step(self, batch: CellBatch, batch_idx: int) -> dict[str, Tensor]:
        log_q, parts = self.elbo_parts(batch)
        log_joint = parts.pop("log_joint")
        elbo = sum(parts.values(), torch.zeros(()))
        if self.current_epoch < self.encoder_epochs:
            # the components' share is zero, not absent, as data-parallel training wants
            posterior = torch.softmax(log_joint.detach(), 1)
            loss = -(posterior * log_q).sum() + 0.0 * log_joint.sum()
        else:
            loss = -elbo.sum()
        self._cells += batch.n_cells
        for name, value in {**parts, "elbo": elbo}.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach().sum())
        return {"loss": loss / max(1, batch.n_cells), "responsibilities": log_q.detach().exp()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        def norm(*parameters: Tensor) -> Tensor:
            grads = [p.grad.norm() for p in parameters if p.grad is not None]
            return torch.stack(grads).norm() if grads else torch.zeros(())

        norms = {
            "gradient_norm/encoder": norm(*self.encoder.parameters()),
            "gradient_norm/log_mean": norm(self.mixture.log_mean),
            "gradient_norm/log_inv_disp": norm(self.mixture.log_inv_disp),
        }
        self.log_dict(norms, on_step=True, on_epoch=False, batch_size=1)

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: CellBatch, batch_idx: int) -> None:
        mixture = self.mixture
        if not mixture.log_mean.requires_grad:
            return
        mixture.log_mean.clamp_(min=lowest_log_mean(mixture.total_size))
        mixture.log_inv_disp.clamp_(*LOG_INV_DISP_RANGE)
        mixture.log_weights.sub_(mixture.log_weights.logsumexp(1, keepdim=True))
        mixture.forget_tables()

    def on_train_epoch_end(self) -> None:
        names = list(self._sums)
        *sums, n_cells = self.sum_over_ranks(*self._sums.values(), self._cells)
        means = {name: value / n_cells for name, value in zip(names, sums, strict=True)}
        self.objective.append(means["elbo"])
        self.n_iterations = self.current_epoch + 1
        self.log_epoch({**means, "objective": means["elbo"], "iteration": float(self.current_epoch + 1)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["amortized"] = {"objective": self.objective}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.objective = checkpoint["amortized"]["objective"]

    @torch.no_grad()
    def predict_step(self, batch: CellBatch, batch_idx: int) -> Prediction:
        log_q, parts = self.elbo_parts(batch)
        log_likelihood = torch.logsumexp(parts.pop("log_joint"), 1)
        missing = torch.full_like(log_likelihood, torch.nan)
        elbo = sum(parts.values(), torch.zeros(()))
        return Prediction(batch.rows, log_q.exp(), log_likelihood, missing, elbo)

    def restrict_genes(self, positions: np.ndarray) -> None:
        super().restrict_genes(positions)
        self.encoder.first = torch.nn.Parameter(self.encoder.first.data[torch.from_numpy(positions)])

"""Amortized variational inference as a LightningModule."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nbmix.core.batch import CellBatch
from nbmix.core.declared import Setting, checked
from nbmix.core.minibatch import minibatch_log_likelihood
from nbmix.core.parameters import LOG_INV_DISP_RANGE, lowest_log_mean
from nbmix.core.settings import Dtype, MixtureSettings, NComponents, StartPseudoCells, Weights
from nbmix.data.module import CountsDataModule
from nbmix.models.base import MixtureModule, Prediction, start_components
from nbmix.models.networks import SparseEncoder
from nbmix.starts.base import StartState

LEAST_LOG_PRIOR = math.log(torch.finfo(torch.float64).tiny)


class ElboTerms(NamedTuple):
    """Of a batch, (cells, K) each, in nats: ln q, the component log likelihood, and ln pi."""

    log_q: Tensor
    log_likelihood: Tensor
    log_prior: Tensor

    @property
    def log_joint(self) -> Tensor:
        """(cells, K) l_ik + ln pi_k."""
        return self.log_likelihood + self.log_prior

    @property
    def parts(self) -> dict[str, Tensor]:
        """What the ELBO is the sum of, (cells,) each."""
        q = self.log_q.exp()
        return {
            "expected_log_likelihood": (q * self.log_likelihood).sum(1),
            "log_prior": (q * self.log_prior).sum(1),
            "entropy": -(q * self.log_q).sum(1),
        }

    @property
    def elbo(self) -> Tensor:
        """(cells,)."""
        return (self.log_q.exp() * (self.log_joint - self.log_q)).sum(1)


@checked("model")
class AmortizedMixture(MixtureModule):
    """An encoder network gives the responsibilities; both sides climb the ELBO by minibatches.

        ELBO_i = sum_k q_ik [ l_ik + ln pi_k - ln q_ik ],    q_i = encoder(x_i)

    The encoder first learns the exact posterior under the start's components (cross entropy), so that the
    components are not pulled together while it still guesses.

    Args:
        gene_names: (genes,).
    """

    kind: ClassVar[str] = "amortized"
    shuffle: ClassVar[bool] = True
    objective_name: ClassVar[str] = "ELBO"

    def __init__(
        self,
        gene_names: np.ndarray,
        *,
        n_components: NComponents = MixtureSettings.n_components,
        weights: Weights = MixtureSettings.weights,
        dtype: Dtype = MixtureSettings.dtype,
        n_hidden: Annotated[int, Setting("units in the hidden layer of the encoder", least=1)] = 128,
        lr: Annotated[float, Setting("learning rate of the encoder", above=0)] = 1e-3,
        components_lr: Annotated[float, Setting("learning rate of components and weights", above=0)] = 1e-3,
        encoder_epochs: Annotated[
            int, Setting("epochs in which the encoder alone learns the exact posterior of the start", least=0)
        ] = 5,
        train_components: Annotated[bool, Setting("false: components stay what the start made them")] = True,
        pseudo_cells: StartPseudoCells = MixtureSettings.pseudo_cells,
    ) -> None:
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
        components, log_weights = start_components(start, data, self.mixture.settings)
        self.mixture.set_components(components, log_weights)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": list(self.encoder.parameters()), "lr": self.lr}]
        if trained := [p for p in self.mixture.parameters() if p.requires_grad]:
            groups.append({"params": trained, "lr": self.components_lr})
        return torch.optim.Adam(groups, fused=True)  # one pass over each parameter

    def terms(self, batch: CellBatch) -> ElboTerms:
        """All that the ELBO of a batch is made of."""
        mixture = self.mixture
        log_likelihood = minibatch_log_likelihood(
            mixture.log_mean[0], mixture.log_inv_disp[0], batch, mixture.basis, mixture.settings.torch_dtype
        )
        if mixture.log_weights.requires_grad:
            log_prior = torch.log_softmax(mixture.log_weights[0], 0)
        else:  # the encoder cannot say 0, so a given prior of 0 counts as the smallest positive number
            log_prior = mixture.log_prior(batch).clamp(min=LEAST_LOG_PRIOR)
        log_q = self.encoder(batch, mixture.basis.levels).double()
        # a cell without counts tells nothing: it gets the prior, whatever the encoder makes of zeros
        empty = (batch.pairs.indptr.diff() == 0)[:, None]
        log_q = torch.where(empty, log_prior.detach().expand_as(log_q), log_q)
        return ElboTerms(log_q, log_likelihood, log_prior.expand_as(log_q))

    def on_train_epoch_start(self) -> None:
        self._sums: dict[str, float] = {}
        self._cells = 0

    def training_step(self, batch: CellBatch, batch_idx: int) -> dict[str, Tensor]:
        terms = self.terms(batch)
        if self._encoder_alone:
            posterior = torch.softmax(terms.log_joint.detach(), 1)
            # the components' share is zero, not absent, as data-parallel training wants
            share = sum((0.0 * p.sum() for p in self.mixture.parameters()), torch.zeros(()))
            loss = share - (posterior * terms.log_q).sum()
        else:
            loss = -terms.elbo.sum()
        self._cells += batch.n_cells
        for name, value in {**terms.parts, "elbo": terms.elbo}.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach().sum())
        if batch_idx + 1 == self.trainer.num_training_batches:
            self._finish_epoch()
        return {
            "loss": self.step_mean(loss, batch.n_cells),
            "responsibilities": terms.log_q.detach().exp(),
        }

    @property
    def _encoder_alone(self) -> bool:
        return self.current_epoch < self.encoder_epochs

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._encoder_alone:
            for parameter in self.mixture.parameters():
                parameter.grad = None  # else Adam would count its steps, and average in zeros

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

    def _finish_epoch(self) -> None:
        names = list(self._sums)
        *sums, n_cells = self.sum_over_ranks(*self._sums.values(), self._cells)
        means = {name: value / n_cells for name, value in zip(names, sums, strict=True)}
        self.objective.append(means["elbo"])
        self.n_iterations = self.current_epoch + 1
        self.log_epoch({**means, "objective": means["elbo"], "iteration": float(self.current_epoch + 1)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["amortized"] = {"objective": self.objective, "n_iterations": self.n_iterations}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.objective = checkpoint["amortized"]["objective"]
        self.n_iterations = checkpoint["amortized"]["n_iterations"]

    @torch.no_grad()
    def predict_step(self, batch: CellBatch, batch_idx: int) -> Prediction:
        terms = self.terms(batch)
        log_likelihood = torch.logsumexp(terms.log_joint, 1)
        missing = torch.full_like(log_likelihood, torch.nan)
        return Prediction(batch.rows, terms.log_q.exp(), log_likelihood, missing, terms.elbo)

    def restrict_genes(self, positions: np.ndarray) -> None:
        super().restrict_genes(positions)
        self.encoder.first = torch.nn.Parameter(self.encoder.first.data[torch.from_numpy(positions)])

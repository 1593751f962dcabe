"""What models share that learn by minibatches: Adam climbs the evidence lower bound (ELBO) of random batches.

    ELBO_i = sum_k q_ik [ l_ik + ln pi_k - ln q_ik ] <= ln p(x_i),    with equality at the exact posterior

A step takes a batch from ``CountsDataModule``, asks the model for ``terms``, makes them a ``loss``, has
Lightning follow its gradient, and brings parameters back into their range (``project``).

Where cells come from several origins (``nbmix.core.offsets``), those of a batch are of one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from nbmix.core.batch import CellBatch
from nbmix.core.joins import JoinEvidence
from nbmix.core.minibatch import minibatch_log_likelihood
from nbmix.core.parameters import LOG_INV_DISP_RANGE, lowest_log_mean
from nbmix.data.checkpoint import SECTION
from nbmix.data.module import CountsDataModule
from nbmix.models.base import FitDefaults, MixtureModule, Prediction
from nbmix.models.start_components import start_components
from nbmix.starts.base import StartState

LEAST_LOG_PRIOR = math.log(torch.finfo(torch.float64).tiny)


class Terms(Protocol):
    """What the ELBO of a batch is made of."""

    @property
    def log_q(self) -> Tensor:
        """(cells, K) ln q(z_i = k)."""

    @property
    def elbo(self) -> Tensor:
        """(cells,) nats."""

    def parts(self) -> dict[str, Tensor]:
        """The summands of the ELBO by the names that they are logged under, (cells,) each."""


class ElboTerms(NamedTuple):
    """Of a batch, (cells, K) each, in nats: ln q, the component log likelihood, and ln pi."""

    log_q: Tensor
    log_likelihood: Tensor
    log_prior: Tensor

    @property
    def log_joint(self) -> Tensor:
        """(cells, K) l_ik + ln pi_k."""
        return self.log_likelihood + self.log_prior

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

    def prediction(self, rows: Tensor) -> Prediction:
        """Of the cells at ``rows``, whose likelihood is summed over components exactly."""
        log_likelihood = torch.logsumexp(self.log_joint, 1)
        missing = torch.full_like(log_likelihood, torch.nan)
        of_components = self.log_likelihood.float()
        return Prediction(rows, self.log_q.exp(), log_likelihood, missing, self.elbo, of_components)


def prior_where_empty(log_q: Tensor, log_prior: Tensor, batch: CellBatch) -> Tensor:
    """``log_q`` (cells, K), in place of which a cell without counts gets the prior: it tells nothing."""
    empty = (batch.pairs.indptr.diff() == 0)[:, None]
    return torch.where(empty, log_prior.detach(), log_q)


class MinibatchModule(MixtureModule):
    """A model that Adam fits to the ELBO of minibatches.

    A subclass says ``terms``, ``parameter_groups`` and ``predict_step``, and ``loss`` where that is not the
    ELBO alone.
    """

    shuffle: ClassVar[bool] = True
    defaults: ClassVar[FitDefaults] = FitDefaults("subsample", max_epochs=20, batch_size=64)
    objective_name: ClassVar[str] = "ELBO"
    gradient_norms: ClassVar[Sequence[str]] = ()  # logged ones: what names of their parameters begin with

    @abstractmethod
    def terms(self, batch: CellBatch) -> Terms:
        """What the ELBO of a batch is made of, differentiable in the parameters."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters with their rates, as ``torch.optim.Adam`` takes them."""

    def loss(self, terms: Any, batch: CellBatch) -> Tensor:
        """() what a step lowers, in nats, summed over the cells of the batch."""
        return -terms.elbo.sum()

    def begin(self, start: StartState, data: CountsDataModule) -> None:
        found = self.start_components(start, data)
        assert found.components is not None
        found.hand_to(self.mixture)
        self.join_evidence = found.join_evidence
        self.joins = None if found.join_evidence is None else found.join_evidence.tree()

    def start_components(self, start: StartState, data: CountsDataModule) -> StartState:
        """The components to begin at."""
        return start_components(start, data, self.mixture.settings)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.join_evidence is not None:  # of the start; cells of this fit have been seen
            checkpoint[self.kind]["join_evidence"] = [torch.from_numpy(part) for part in self.join_evidence]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.take_joined(checkpoint[SECTION].get("groups"))
        if (parts := checkpoint[self.kind].get("join_evidence")) is not None:
            self.join_evidence = JoinEvidence(*(part.numpy() for part in parts))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameter_groups(), fused=True)  # one pass over each parameter

    def log_prior(self, batch: CellBatch) -> Tensor:
        """(cells, K) ln pi; a given 0 counts as the smallest positive number, since no network can say 0."""
        if self.mixture.log_weights.requires_grad:
            log_prior = torch.log_softmax(self.mixture.log_weights[0], 0)
        else:
            log_prior = self.mixture.log_prior(batch).clamp(min=LEAST_LOG_PRIOR)
        return log_prior.expand(batch.n_cells, -1)

    def log_likelihood(self, batch: CellBatch) -> Tensor:
        """(cells, K) float64 log likelihood of the mixture's components, differentiable in them."""
        mixture, log_mean = self.mixture, self.mixture.log_mean[0]
        offset = None if mixture.origins is None else mixture.origins.of(0, batch.origin)
        return minibatch_log_likelihood(
            log_mean if offset is None else log_mean + offset,
            mixture.log_inv_disp[0],
            batch,
            mixture.basis,
            mixture.settings.torch_dtype,
        )

    def exact_posterior(self, batch: CellBatch) -> Tensor:
        """(cells, K) responsibilities under the mixture; no tables are made, which serve large batches."""
        with torch.no_grad():
            log_likelihood = self.log_likelihood(batch)
            return torch.softmax(log_likelihood + self.log_prior(batch), 1)

    def on_train_epoch_start(self) -> None:
        self._sums: dict[str, float] = {}
        self._cells = 0

    def training_step(self, batch: CellBatch, batch_idx: int) -> dict[str, Tensor]:
        terms = self.terms(batch)
        loss = self.loss(terms, batch)
        self._cells += batch.n_cells
        for name, value in {**terms.parts(), "elbo": terms.elbo}.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach().sum())
        return {
            "loss": self._mean_over_ranks(loss, batch.n_cells),
            "responsibilities": terms.log_q.detach().exp(),
        }

    def _mean_over_ranks(self, loss: Tensor, n_cells: int) -> Tensor:
        """The loss () of a step, per cell of all ranks, from its sum over the ``n_cells`` of this rank.

        Data-parallel training takes the mean of the ranks' gradients, and shares may be uneven: this one is
        scaled so that the mean is the gradient of all cells' mean. Batches of origins are of uneven sizes:
        there it is per cell of the average batch, so that a cell counts as much in each.
        """
        if self.mixture.origins is not None:
            n_batches = self.data.schedule.epochs_a_pass * self.trainer.num_training_batches
            n_average = self.data.training_rows.size / n_batches
            return loss * (self.trainer.world_size / n_average)
        if self.trainer.world_size == 1:
            return loss / n_cells
        return loss * (self.trainer.world_size / self.sum_over_ranks(n_cells)[0])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norms = {}
        for part in self.gradient_norms:
            named = self.named_parameters()
            grads = [p.grad.norm() for name, p in named if name.startswith(part) and p.grad is not None]
            total = torch.stack(grads).norm() if grads else torch.zeros(())
            norms[f"gradient_norm/{part.removeprefix('mixture.')}"] = total
        self.log_dict(norms, on_step=True, on_epoch=False, batch_size=1)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Bring parameters that are learned back into their range; called after every step."""
        mixture = self.mixture
        if mixture.log_mean.requires_grad:
            mixture.log_mean.clamp_(min=lowest_log_mean(mixture.total_size))
            mixture.log_inv_disp.clamp_(*LOG_INV_DISP_RANGE)
            mixture.forget_tables()
        if mixture.log_weights.requires_grad:
            mixture.log_weights.sub_(mixture.log_weights.logsumexp(1, keepdim=True))

    def on_train_batch_end(self, outputs: Any, batch: CellBatch, batch_idx: int) -> None:
        # the epoch's numbers have to be there for validation and for callbacks, which come before
        # on_train_epoch_end
        if batch_idx + 1 == self.trainer.num_training_batches:
            self.finish_epoch()

    def finish_epoch(self) -> None:
        """Called once all batches of an epoch have been taken, before validation."""
        names = list(self._sums)
        *sums, n_cells = self.sum_over_ranks(*self._sums.values(), self._cells)
        means = {name: value / n_cells for name, value in zip(names, sums, strict=True)}
        self.objective.append(means["elbo"])
        self.n_iterations = self.current_epoch + 1
        self.log_epoch({**means, "objective": means["elbo"], "iteration": float(self.n_iterations)})

"""What both modes of inference share: a mixture, gene names, and how cells come out."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from nbmix.core.batch import CellBatch
from nbmix.core.em_loop import run_em
from nbmix.core.mixture import Mixture
from nbmix.core.parameters import Components
from nbmix.core.settings import MixtureSettings
from nbmix.data.checkpoint import SECTION
from nbmix.data.module import CountsDataModule
from nbmix.starts.base import StartState, new_mixture, prepare

# of EM that begins at given responsibilities; from random ones the way is long
START_CELLS, START_FOLDS, START_ITERATIONS = 10_000, 5, 200
START_CELLS_OF_A_COMPONENT = 50.0  # where a draw holds fewer, all of its cells are taken


class Prediction(NamedTuple):
    """What a model says of a batch of cells.

    Attributes:
        rows: (cells,) positions in the data, so that shards can be put back in order.
        responsibilities: (cells, K).
        log_likelihood: (cells,) ln p(x_i) under the components of all cells, nats.
        unseen_log_likelihood: (cells,) the same under components that have not seen the cell; else NaN.
        elbo: (cells,) nats; NaN where inference is exact.
    """

    rows: Tensor
    responsibilities: Tensor
    log_likelihood: Tensor
    unseen_log_likelihood: Tensor
    elbo: Tensor


def start_components(
    start: StartState, data: CountsDataModule, settings: MixtureSettings
) -> tuple[Components, Tensor | None]:
    """The components of a start, and ln of their weights (K,) if it has them.

    Where it has responsibilities of the training cells, cross-fitted EM begins at them, on some of the cells:
    a single M step would leave random ones alike, and gradients of minibatches do not part what is alike.
    Where it sees all cells, its folds are those of ``MixtureEM``: where EM ends may hang on them, and both
    modes are to find the same.
    """
    if start.components is not None:
        return start.components, start.log_weights
    assert start.responsibilities is not None
    training = data.training_data
    rows = np.random.default_rng(data.seed).permutation(training.n_cells)[:START_CELLS]
    rare = start.responsibilities[rows].sum(0) < START_CELLS_OF_A_COMPONENT
    of_rare = start.responsibilities[:, rare].sum(1) > 0.5
    rows = np.union1d(rows, np.flatnonzero(of_rare.numpy()))
    seen = training.select_cells(rows)
    settings = replace(settings, folds=min(START_FOLDS, seen.n_cells))
    basis, batches = prepare(seen, settings.folds, data.fold_generator(), dtype=settings.torch_dtype)
    fitted = new_mixture(seen, settings, basis)
    run_em(fitted, batches, responsibilities=start.responsibilities[rows], max_iterations=START_ITERATIONS)
    return fitted.components(), fitted.log_weights.data[-1]


class FitDefaults(NamedTuple):
    """What a fit takes where nothing is said, as in conf/model.

    Attributes:
        start: its name.
        max_epochs: at most.
        batch_size: cells.
    """

    start: str
    max_epochs: int
    batch_size: int


class MixtureModule(pl.LightningModule):
    """A LightningModule around a ``Mixture``.

    Args:
        gene_names: (genes,) names, kept in the checkpoint to match genes of other data.
        settings: of the mixture.
        plain: keyword arguments, plain values alone, that make the same module again.
    """

    kind: ClassVar[str]
    shuffle: ClassVar[bool]  # new random batches every epoch
    objective_name: ClassVar[str]
    defaults: ClassVar[FitDefaults | None] = None  # None: ``nbmix.NBMixture`` does not have the model

    objective: list[float]  # nats per cell and epoch
    converged: bool | None = None  # None where a fit has no such notion
    n_iterations: int = 0
    n_genes_missing: int | None = None  # of a restored model, in the data it is applied to
    choice: dict[str, Any] | None = None  # of the number of components, see ``nbmix.starts.choice``
    _first_epoch: int | None = None  # of this process's fit

    def __init__(self, gene_names: np.ndarray, settings: MixtureSettings, plain: dict[str, Any]) -> None:
        super().__init__()
        self.gene_names = np.asarray(gene_names)
        self.plain = plain
        self.mixture = Mixture(len(self.gene_names), settings)
        self.objective = []

    @abstractmethod
    def begin(self, start: StartState, data: CountsDataModule) -> None:
        """Take a start made from the training cells of ``data``."""

    def setup(self, stage: str) -> None:
        data = self.data
        self.mixture.attach(data.basis, float(data.data.size_factors[data.training_rows].sum()))

    @property
    def data(self) -> CountsDataModule:
        """The cells that the trainer works on."""
        # Lightning sets the attribute without declaring it
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[SECTION] = {
            "model": self.kind,
            "settings": self.plain,
            "gene_names": self.gene_names.tolist(),
            "median_size_factor": float(np.median(self.data.data.size_factors[self.data.training_rows])),
            "cells": self.data.fingerprint,
            "choice": self.choice,
        }

    def on_train_start(self) -> None:
        self._first_epoch = self.current_epoch

    @property
    def has_begun(self) -> bool:
        """Whether an epoch is over, in which all that a checkpoint may have brought has been used."""
        return self._first_epoch is not None and self.current_epoch > self._first_epoch

    def restrict_genes(self, positions: np.ndarray) -> None:
        """Keep the genes at ``positions`` alone, for data that lacks the others."""
        for name in ("log_mean", "log_inv_disp"):  # a prior is of no use any more
            kept = getattr(self.mixture, name).data[..., torch.from_numpy(positions)]
            setattr(self.mixture, name, torch.nn.Parameter(kept))
        self.gene_names = self.gene_names[positions]

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Each value summed over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def step_mean(self, loss: Tensor, n_cells: int) -> Tensor:
        """The loss () of a step, per cell of all ranks, from its sum over the ``n_cells`` of this rank.

        Data-parallel training takes the mean of the ranks' gradients, and shares may be uneven: this one is
        scaled so that the mean is the gradient of all cells' mean.
        """
        if self.trainer.world_size == 1:
            return loss / n_cells
        return loss * (self.trainer.world_size / self.sum_over_ranks(n_cells)[0])

    def from_first_rank(self, tensor: Tensor) -> Tensor:
        """The values that rank 0 has, on every rank; on the device of ``tensor``."""
        if self.trainer.world_size == 1:
            return tensor
        sent = tensor.to(self.device, copy=True)
        torch.distributed.broadcast(sent, src=0)
        return sent.to(tensor.device)

    def log_epoch(self, values: dict[str, float]) -> None:
        """Log numbers that are already those of the whole epoch and of all ranks."""
        # float64 in a tensor, since Lightning would keep a plain number as float32
        tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
        self.log_dict(tensors, on_step=False, on_epoch=True, batch_size=1)

    def on_validation_epoch_start(self) -> None:
        self._held_out = [0.0, 0.0]

    def validation_step(self, batch: CellBatch, batch_idx: int) -> None:
        log_likelihood = self.mixture.posterior(batch, fold=-1).log_likelihood
        self._held_out[0] += float(log_likelihood.sum())
        self._held_out[1] += batch.n_cells

    def on_validation_epoch_end(self) -> None:
        total, n_cells = self.sum_over_ranks(*self._held_out)
        if n_cells:
            self.log_epoch({"heldout_log_likelihood": total / n_cells})

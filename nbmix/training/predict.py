"""What a model says of cells: of those of its data module by a trainer, of new ones in this process alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.folds import CELLS_A_BLOCK, by_origin, fold_shares
from nbmix.core.joins import group_probabilities
from nbmix.core.memory import give_back
from nbmix.data.batches import CellBatches
from nbmix.data.checkpoint import Checkpoint, align_to_genes
from nbmix.data.counts import CountData
from nbmix.data.module import CountsDataModule
from nbmix.evaluation.doubt import Doubt, misfits, second_best
from nbmix.models.base import MixtureModule, Prediction
from nbmix.models.restore import restore
from nbmix.training.new_batches import meet_batches

log = logging.getLogger(__name__)

UNIT_RATIO = 30.0  # between medians of size factors: more is no difference in sequencing depth
BATCHES_AT_ONCE = 256  # after which the memory of those that were joined is given back


def predict(trainer: pl.Trainer, model: MixtureModule, data: CountsDataModule) -> Prediction:
    """Predictions of all cells of ``data``, in their order; the same on every rank."""
    batches: list[Any] = trainer.predict(model, datamodule=data) or []
    if trainer.world_size > 1:
        shards: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(shards, [Prediction(*(t.cpu() for t in p)) for p in batches])
        batches = [batch for shard in shards for batch in shard]
    return join_batches(batches, data.data.n_cells)


def predict_here(model: MixtureModule, data: CountData) -> Prediction:
    """Predictions of cells in memory, without a trainer."""
    batches = [model.predict_step(batch, number) for number, batch in enumerate(_new_batches(model, data))]
    return join_batches(batches, data.n_cells)


def doubt_here(model: MixtureModule, data: CountData, cells: Prediction) -> Doubt:
    """How far the groups of cells in memory can be doubted, without a trainer.

    Args:
        model, data: as for ``predict_here``.
        cells: what that says of them.
    """
    q = group_probabilities(cells.responsibilities.numpy(), model.groups)
    of_cells = cells.log_likelihood, cells.unseen_log_likelihood
    return Doubt(*second_best(q), misfits(model.mixture, _new_batches(model, data), *of_cells))


def _new_batches(model: MixtureModule, data: CountData) -> Iterator[CellBatch]:
    """Cells in memory, to whose basis the model is attached."""
    basis = Basis.of(data.counts, data.size_factors)  # exact between size factors
    model.mixture.attach(basis, float(data.size_factors.sum()))
    cells = CellBatches(data, basis)
    parts = by_origin(np.arange(data.n_cells), data.origins)
    sizes = data.size_factors
    return (cells.batch(rows) for part in parts for rows in fold_shares(part, sizes[part], CELLS_A_BLOCK))


def join_batches(batches: list[Prediction], n_cells: int) -> Prediction:
    """Put batches back in the order of the data.

    The list is emptied on the way, so that a million cells are not held twice.

    Raises:
        RuntimeError: the batches do not hold every cell once.
    """
    rows = torch.cat([batch.rows.cpu() for batch in batches])
    if not torch.equal(rows.sort().values, torch.arange(n_cells)):
        raise RuntimeError("predictions do not hold every cell once")
    joined = Prediction(*(torch.empty(n_cells, *t.shape[1:], dtype=t.dtype) for t in batches[0]))
    while batches:
        if len(batches) % BATCHES_AT_ONCE == 0:
            give_back()
        batch = Prediction(*(t.cpu() for t in batches.pop()))
        for whole, part in zip(joined, batch, strict=True):
            whole[batch.rows] = part
    return joined


def restore_for(checkpoint: Checkpoint, data: CountData, where: str) -> tuple[MixtureModule, CountData]:
    """The model of a checkpoint and the cells it is to be applied to, both with the genes that they share.

    Genes are matched by name, in the order of the fit. An encoder is drawn before it is filled: torch's own
    generator moves on.

    Args:
        checkpoint: of a fit.
        data: new cells, silent genes included.
        where: what messages begin with, as "ckpt_path=a.ckpt".

    Raises:
        InputError: no gene is shared, or the checkpoint is damaged.
    """
    model = restore(checkpoint)
    there, here = align_to_genes(checkpoint.gene_names, data.gene_names, where)
    model.n_genes_missing = len(checkpoint.gene_names) - len(there)
    model.restrict_genes(there)
    compare_size_factors(checkpoint.median_size_factor, data.size_factors, where)
    if model.joins is None and model.mixture.settings.is_joined:
        log.warning(
            "%s: is of a fit that did not end, whose components are not joined to groups yet: each counts as "
            "one; go on with the fit first",
            where,
        )
    return model, meet_batches(model, data.select_genes(here), where)


def compare_size_factors(fitted: float, size_factors: np.ndarray, where: str) -> None:
    """Warn where new cells' size factors seem to be in another unit than those of the fit."""
    here = float(np.median(size_factors))
    if here > 0 and fitted > 0 and not 1 / UNIT_RATIO < here / fitted < UNIT_RATIO:
        log.warning(
            "%s: size factors have a median of %.3g, those of the fit had %.3g: set size_factor_key to the "
            "same kind of column as in the fit",
            where,
            here,
            fitted,
        )

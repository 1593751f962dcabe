"""Batches that a fit has not seen: their genes' offsets, estimated with the components as they are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nbmix.core.batch import Basis, CellBatch, Precision
from nbmix.core.folds import CELLS_A_BLOCK, fold_shares
from nbmix.core.mixture import Mixture
from nbmix.core.offsets import GammaRates, Loadings, OriginMargins, offset_step
from nbmix.core.statistics import SufficientStatistics
from nbmix.data.batches import CellBatches
from nbmix.data.counts import CountData, some_rows
from nbmix.errors import InputError
from nbmix.models.base import MixtureModule

MOST_CELLS = 20_000  # of a new batch that its offsets are estimated on

ITERATIONS = 12  # of EM on the offsets; a step is at most LONGEST_OFFSET_STEP

log = logging.getLogger(__name__)


def meet_batches(model: MixtureModule, data: CountData, where: str) -> CountData:
    """The cells, by the batches that the model knows; it learns the offsets of those that are new to it.

    Cells of unknown batches are seen as those of the average cell of the fit are.

    Args:
        model: restored, with the genes of ``data``.
        data: new cells, of known or unknown batches.
        where: what messages begin with.

    Raises:
        InputError: the cells have batches, and the fit had none; or they have new ones, and the model cannot
            learn these from cells alone.
    """
    origins = model.mixture.origins
    if data.origins is None:
        if origins is not None:
            log.warning(
                "%s: knows the batches %s, and of these cells none is known (batch_key): they are taken "
                "for cells of the average batch",
                where,
                ", ".join(model.origin_names[:5]),
            )
        return data
    if origins is None:
        raise InputError(f"{where}: was fitted without batches; set data.batch_key=null")
    new = [name for name in data.origin_names if name not in model.origin_names]
    if new and not model.meets_new_origins:
        raise InputError(
            f"{where}: knows the batches {', '.join(model.origin_names[:5])}, not {', '.join(new[:5])}, and "
            f"model={model.kind} learns no new ones from cells; set data.batch_key=null to take all cells "
            "for those of the average batch, or use model=em"
        )
    names = (*model.origin_names, *new)
    codes = np.array([names.index(name) for name in data.origin_names])[data.origins]
    data = replace(data, origins=codes, origin_names=names)
    if new:
        origins.extend(len(new))
        for name in new:
            rows = some_rows(np.flatnonzero(codes == names.index(name)), MOST_CELLS)
            fit_offset(model.mixture, data.select_cells(rows).load(), names.index(name))
        model.origin_names = names
        log.info("%s: estimated the offsets of new batches: %s", where, ", ".join(new[:10]))
    return data


@torch.no_grad()
def fit_offset(mixture: Mixture, cells: CountData, origin: int) -> None:
    """Estimate the offsets of one batch from its cells, in memory: EM with the components held.

    It begins once at none, and once at what explains the counts if kinds have the shares that they have in
    the fit; the likelier end is taken.
    """
    assert mixture.origins is not None
    basis = Basis.of(cells.counts, cells.size_factors, Precision.of(torch.float32))
    mixture.attach(basis, float(cells.size_factors.sum()))
    blocks = fold_shares(np.arange(cells.n_cells), cells.size_factors, CELLS_A_BLOCK)
    batches = [CellBatches(cells, basis).batch(rows, keep=True) for rows in blocks]
    ends = [_iterate(mixture, batches, origin, begin) for begin in _begins(mixture, batches, origin)]
    mixture.origins.offsets[-1, origin] = max(ends, key=lambda end: end[0])[1]
    mixture.forget_tables()


def _begins(mixture: Mixture, batches: Sequence[CellBatch], origin: int) -> list[Tensor]:
    assert mixture.origins is not None
    n_cells = sum(batch.n_cells for batch in batches)
    weights = mixture.log_weights.data[-1].exp()
    shares = (weights / weights.sum()).cpu().expand(n_cells, -1)
    n_origins = mixture.origins.n_origins
    margins = OriginMargins.of(batches, mixture.basis, shares, 1, n_origins)
    counts, size = margins.of_origin[0, origin], margins.size[0, origin]
    expected = size @ mixture.components().log_mean.cpu().exp()
    variance = mixture.origins.variance[-1].cpu()
    ratio = torch.log((counts + 1) / (expected + 1))  # one count more tames genes with few
    marginal = ratio * variance / (variance + 1 / (expected + 1))
    return [torch.zeros_like(marginal), mixture.origins.within_bounds(marginal)]


def _iterate(
    mixture: Mixture, batches: Sequence[CellBatch], origin: int, offset: Tensor
) -> tuple[float, Tensor]:
    """Log likelihood with the prior, and offsets (genes,), where EM ends."""
    origins, basis = mixture.origins, mixture.basis
    assert origins is not None
    variance, found = origins.variance[-1].cpu(), (-np.inf, offset)
    gammas = GammaRates.of(mixture.components())
    none = Loadings.none(offset.numel(), basis.nodes.log_nodes.numel())
    for _ in range(ITERATIONS):
        origins.offsets[-1, origin] = offset.to(origins.offsets)
        mixture.forget_tables()
        seen = SufficientStatistics.zeros(basis, mixture.settings.n_components, "cpu")
        score = -float((offset**2 / variance).sum()) / 2
        for batch in batches:
            q, log_likelihood = mixture.posterior(batch, fold=-1)
            score += float(log_likelihood.sum())
            seen.add_batch_(batch, basis, q)
        found = max(found, (score, offset), key=lambda end: end[0])
        offset = offset_step(seen, basis.nodes, gammas, offset, variance, none).offset
    return found

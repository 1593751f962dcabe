"""A fit that goes on with cells that come later, part by part; see ``nbmix.core.stepwise``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from nbmix.core.batch import CellBatch, Precision
from nbmix.core.folds import CELLS_A_BLOCK, fold_shares
from nbmix.core.mixture import Mixture, Posterior
from nbmix.core.parameters import START_LOG_INV_DISP, Components
from nbmix.core.prior import of_more_genes
from nbmix.core.statistics import SufficientStatistics
from nbmix.core.stepwise import RunningStatistics
from nbmix.data.batches import CellBatches
from nbmix.data.checkpoint import UNREADABLE, Checkpoint
from nbmix.data.counts import CountData
from nbmix.errors import InputError
from nbmix.models.restore import model_class, restore
from nbmix.training.predict import compare_size_factors


class Step(NamedTuple):
    """A fit after a part.

    Attributes:
        fitted: the model, of the genes that have had a count.
        running: its statistics.
        cells: of the part, under the components as they stood before.
    """

    fitted: Checkpoint
    running: RunningStatistics
    cells: Posterior


def begin(
    fitted: Checkpoint, data: CountData, responsibilities: Tensor, genes: np.ndarray, n_genes: int
) -> RunningStatistics:
    """The statistics of the cells of a fit that is to go on.

    Args:
        fitted: to them.
        data: they, with the genes that have a count.
        responsibilities: (cells, C).
        genes: (genes,) where these stand among all ``n_genes``.
    """
    settings = restore(fitted).mixture.settings
    own = data.counts
    counts = sp.csr_matrix((own.data, genes[own.indices], own.indptr), shape=(data.n_cells, n_genes))
    none = RunningStatistics.none(n_genes, settings.n_components, Precision.of(settings.torch_dtype))
    running = none.reaching(counts, data.size_factors)
    part = running.zeros()
    for batch in _batches(running, data):
        part.add_batch_(batch, running.basis, responsibilities[batch.rows], settings.torch_dtype)
    return running.plus(part, data.n_cells)


@torch.no_grad()
def step(fitted: Checkpoint, running: RunningStatistics, data: CountData) -> Step:
    """E step of a part, its statistics added to those so far, M step.

    Args:
        fitted: the model so far.
        running: its statistics.
        data: the part, with all genes.

    Raises:
        InputError: there is no count in it.
    """
    if not data.counts.nnz:
        raise InputError("every cell is empty; nbmix needs raw counts")
    compare_size_factors(fitted.median_size_factor, data.size_factors, "partial_fit")
    reached = running.reaching(data.counts, data.size_factors)
    part = data.select_genes(reached.genes)
    module = model_class(fitted.model)(part.gene_names, **fitted.settings)
    mixture = module.mixture.attach(reached.basis, reached.sizes.total)
    _hand_over(restore(fitted).mixture, mixture, np.searchsorted(reached.genes, running.genes), part)
    cells, statistics = _e_step(mixture, reached, part)
    running = reached.plus(statistics, part.n_cells)
    mixture.fit_to(running.statistics)
    return Step(fitted._replace(gene_names=part.gene_names, state=module.state_dict()), running, cells)


def with_genes(part: CountData, names: np.ndarray, are_known: bool) -> CountData:
    """A part with the genes of a fit (genes,), in their order.

    Args:
        are_known: the names; else genes of the part, of which there are as many, are in the order of the fit.

    Raises:
        InputError: it has others.
    """
    names = names.astype(str)
    if not are_known or np.array_equal(part.gene_names, names):
        return replace(part, gene_names=names)
    theirs, ours = set(part.gene_names.tolist()), set(names.tolist())
    if lacking := sorted(ours - theirs):
        raise InputError(
            f"partial_fit: {len(lacking)} genes of the first part are missing, such as {lacking[0]!r}; "
            "every part needs the same genes"
        )
    if more := sorted(theirs - ours):
        raise InputError(
            f"partial_fit: {len(more)} genes are none of the first part, such as {more[0]!r}; "
            "every part needs the same genes"
        )
    place = {gene: position for position, gene in enumerate(part.gene_names.tolist())}
    return part.select_genes(np.array([place[gene] for gene in names.tolist()]))


def running_of(plain: Mapping[str, Any], where: str) -> RunningStatistics:
    """The statistics that a file has kept.

    Raises:
        InputError: they are damaged.
    """
    try:
        return RunningStatistics.of(plain)
    except UNREADABLE:
        raise InputError(f"{where}: the sums of its parts are damaged; fit anew") from None


def _hand_over(old: Mixture, new: Mixture, positions: np.ndarray, part: CountData) -> None:
    """Have ``new`` begin as ``old``, whose genes stand at ``positions`` among its.

    Other genes begin at their mean in the part, the same in all components: they say nothing yet of which
    one a cell belongs to.
    """
    stand, prior = torch.from_numpy(positions), old.gene_prior()
    total = torch.from_numpy(part.counts.sum(0, dtype=np.float64)).flatten()
    log_mean = torch.log(
        total / part.size_factors.sum()
    )  # (genes,); -inf where only earlier cells have counts
    log_mean[stand] = 0.0
    log_inv_disp = torch.full_like(log_mean, START_LOG_INV_DISP)
    if prior is not None:
        prior = of_more_genes(prior, log_mean, stand)
        log_inv_disp = prior.log_inv_disp
    known = old.components()
    components = Components(*(t.repeat(len(known.log_mean), 1) for t in (log_mean, log_inv_disp)))
    for mine, theirs in zip(components, known, strict=True):
        mine[:, stand] = theirs
    new.set_components(components, old.log_weights.data[-1], prior)


def _e_step(
    mixture: Mixture, running: RunningStatistics, part: CountData
) -> tuple[Posterior, SufficientStatistics]:
    """What the components of all cells say of a part, and its statistics."""
    shape, dtype = (part.n_cells, mixture.settings.n_components), mixture.settings.torch_dtype
    cells = Posterior(*(torch.empty(size, dtype=torch.float64) for size in (shape, shape[:1])))
    statistics = running.zeros()
    for batch in _batches(running, part):
        of_batch = mixture.posterior(batch, fold=-1)
        statistics.add_batch_(batch, running.basis, of_batch.responsibilities, dtype)
        for whole, some in zip(cells, of_batch, strict=True):
            whole[batch.rows] = some.double()
    return cells, statistics


def _batches(running: RunningStatistics, part: CountData) -> list[CellBatch]:
    cells, rows = CellBatches(part, running.basis), np.arange(part.n_cells)
    return [cells.batch(some) for some in fold_shares(rows, part.size_factors, CELLS_A_BLOCK)]

"""Offsets of genes by origin in a fit that follows gradients: what EM does with them, once an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nbmix.core.batch import CellBatch
from nbmix.core.mixture import Mixture
from nbmix.core.origins import CopyParameters


@torch.no_grad()
def step_offsets(
    mixture: Mixture,
    batches: Iterable[CellBatch],
    responsibilities: Callable[[CellBatch], Tensor],
    *,
    reduce: bool = False,
) -> None:
    """A step of Newton on the offsets d_gj of a mixture without folds, its components as they are.

    It raises sum_i sum_k q_ik l_ik - sum_gj d_gj^2 / (2 tau_j^2), which is concave in the d_gj; then the
    tau_j^2 follow, and the mean of the d_gj over cells moves to ln mu_kj. See ``nbmix.core.offsets``.

    Args:
        batches: all cells of the fit, each of one origin.
        responsibilities: q of a batch, (cells, K).
        reduce: the batches are a rank's; every rank ends with the same offsets.
    """
    origins = mixture.origins
    assert origins is not None and mixture.settings.folds == 1
    origins.are_first = False  # there are components that they can be judged by
    mixture.reset_statistics()
    for batch in batches:
        mixture.collect(batch, responsibilities(batch))
    is_fitter = not reduce or torch.distributed.get_rank() == 0
    copies = [0] if is_fitter else []
    origins.finish(
        lambda copy: CopyParameters(mixture.components(copy)), copies, fitters=[0] if reduce else None
    )
    if is_fitter:
        mixture.log_mean.data[0] += origins.centre(0)
        origins.seen(0)  # an M step would want it
    if reduce:
        for tensor in (mixture.log_mean.data, *origins.buffers()):
            torch.distributed.broadcast(tensor, src=0)
    mixture.forget_tables()

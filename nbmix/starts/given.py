"""Starts that the user brings along: responsibilities or means in a file, or an earlier checkpoint."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from tokenize import TokenError
from typing import Annotated

import numpy as np
import torch

from nbmix.core.declared import Setting, checked
from nbmix.core.offsets import FIRST_OFFSET_VARIANCE
from nbmix.core.parameters import START_LOG_INV_DISP, Components, lowest_log_mean
from nbmix.core.settings import MixtureSettings
from nbmix.data.checkpoint import Checkpoint, align_to_genes, load_checkpoint
from nbmix.data.counts import CountData
from nbmix.errors import InputError
from nbmix.starts.base import StartState


@checked("start")
@dataclass(frozen=True)
class ResponsibilitiesStart:
    """Responsibilities of all cells of the data, from a .npy file.

    The (cells, K) array holds all cells that were read, held-out ones included, in their order. It is not
    negative, every row has a positive sum, and rows are normalised.
    """

    path: Annotated[str | os.PathLike[str], Setting("The .npy file, of shape (cells, components).")]

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        q = _load_array(self.path, "start.path")
        n_cells = data.n_whole or data.n_cells
        if q.shape != (n_cells, settings.n_components):
            raise InputError(
                f"start.path={self.path}: has shape {q.shape}; the cells and components need "
                f"({n_cells}, {settings.n_components})"
            )
        if not np.isfinite(q).all() or (q < 0).any() or (q.sum(1) <= 0).any():
            raise InputError(f"start.path={self.path}: rows must be weights: finite, not negative, not all 0")
        if data.positions is not None:
            q = q[data.positions]
        return StartState(torch.from_numpy(q / q.sum(1, keepdims=True)))


@checked("start")
@dataclass(frozen=True)
class MeansStart:
    """Means of the components, from a .npy file.

    The (K, genes) array holds mu per unit of size factor, genes in the order of the data after its filter.
    """

    path: Annotated[str | os.PathLike[str], Setting("The .npy file, of shape (components, genes).")]
    log_inv_disp: Annotated[
        float, Setting("The natural logarithm of the inverse dispersion of every gene and component.")
    ] = START_LOG_INV_DISP

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        mean = _load_array(self.path, "start.path")
        if mean.shape != (settings.n_components, data.n_genes):
            raise InputError(
                f"start.path={self.path}: has shape {mean.shape}; the components and genes need "
                f"({settings.n_components}, {data.n_genes})"
            )
        if not np.isfinite(mean).all() or (mean < 0).any():
            raise InputError(f"start.path={self.path}: means must be finite and not negative")
        floor = lowest_log_mean(float(data.size_factors.sum()))
        with np.errstate(divide="ignore"):
            log_mean = torch.from_numpy(np.log(mean)).clamp(min=floor)
        return StartState(components=Components(log_mean, torch.full_like(log_mean, self.log_inv_disp)))


@checked("start")
@dataclass(frozen=True)
class CheckpointStart:
    """The components of an earlier run, of either mode; genes are matched by name.

    Genes that the checkpoint does not know begin at the data's pooled mean. Batches that it knows by name
    begin at their offsets there, others at none.
    """

    path: Annotated[str | os.PathLike[str], Setting("The checkpoint of the earlier run.")]

    @property
    def n_components(self) -> int:
        """Those that the checkpoint holds: there may be several for each group."""
        return len(load_checkpoint(self.path, "start.path").log_weights)

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        checkpoint = load_checkpoint(self.path, "start.path")
        components = checkpoint.components
        n_components = components.log_mean.shape[0]
        if n_components != settings.n_components:
            raise InputError(
                f"start.path={self.path}: holds {n_components} components; set "
                f"model.n_components={n_components}, or to fewer groups that they are joined to"
            )
        there, here = align_to_genes(checkpoint.gene_names, data.gene_names, f"start.path={self.path}")
        totals = np.asarray(data.counts.sum(axis=0, dtype=np.float64)).ravel()
        total_size = float(data.size_factors.sum())
        with np.errstate(divide="ignore"):  # a gene may be silent in the cells to fit
            pooled = torch.from_numpy(np.log(totals / total_size)).clamp(min=lowest_log_mean(total_size))
        log_mean = pooled.repeat(n_components, 1)
        log_inv_disp = torch.full_like(log_mean, START_LOG_INV_DISP)
        log_mean[:, here] = components.log_mean[:, there]
        log_inv_disp[:, here] = components.log_inv_disp[:, there]
        offsets = _offsets(checkpoint, data, there, here)
        return StartState(components=Components(log_mean, log_inv_disp), offsets=offsets)


def _offsets(
    checkpoint: Checkpoint, data: CountData, there: np.ndarray, here: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Offsets of the batches of ``data`` (origins, genes) and their variance (genes,), from a checkpoint.

    Args:
        there, here: positions of shared genes in the checkpoint and in the data.
    """
    if data.origins is None or not checkpoint.origin_names:
        return None
    known, learned = (checkpoint.state[f"mixture.origins.{name}"][-1] for name in ("offsets", "variance"))
    offsets = torch.zeros(len(data.origin_names), data.n_genes, dtype=torch.float64)
    variance = torch.full_like(offsets[0], FIRST_OFFSET_VARIANCE)
    variance[here] = learned[there]
    for place, name in enumerate(data.origin_names):
        if name in checkpoint.origin_names:
            offsets[place, here] = known[checkpoint.origin_names.index(name), there]
    return offsets, variance


def _load_array(path: str | os.PathLike[str], setting: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, TokenError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{setting}={path}: cannot be read as a .npy array of numbers ({reason})") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iuf":
        raise InputError(f"{setting}={path}: must hold one two-dimensional array of numbers")
    return array.astype(np.float64)

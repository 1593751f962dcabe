"""Covariates of cells, checked and standardised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nbmix.errors import InputError
from nbmix.genes.labelled import (
    LabelledCounts,
)

COLLINEAR = 1e-8  # of a covariate's variation, within labels and beside the others

LARGEST_LOG_RATIO = 30.0  # that one covariate may put between a cell and the mean of its values


@dataclass(frozen=True)
class Design:
    """Covariates z (cells, covariates) with mean 0 and variance 1, and those they had before."""

    z: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def checked(cls, design: Any, data: LabelledCounts) -> Design:
        try:
            z = np.asarray(design, dtype=np.float64)
        except (TypeError, ValueError):
            raise InputError(
                "design holds something else than numbers; encode categories as 0 and 1"
            ) from None
        if z.ndim != 2 or z.shape[0] != data.n_cells or z.shape[1] == 0:
            raise InputError(f"design has shape {z.shape}; it must be ({data.n_cells} cells, covariates)")
        if not np.isfinite(z).all():
            raise InputError("design holds NaN or infinite values; leave out those cells or covariates")
        mean, spread = z.mean(axis=0), z.std(axis=0)
        if (spread > 0).all():
            z = (z - mean) / spread
            means = [z[data.codes == k].mean(axis=0) for k in np.unique(data.codes)]
            within = z - np.stack(means)[np.unique(data.codes, return_inverse=True)[1]]
            if np.linalg.matrix_rank(within, tol=COLLINEAR * math.sqrt(len(z))) == z.shape[1]:
                return cls(*(torch.from_numpy(t) for t in (z, mean, spread)))
        raise InputError(
            "design: a covariate follows from the others and the labels, which are the intercepts; drop it"
        )

    @property
    def limits(self) -> Tensor:
        """(covariates,) largest coefficient."""
        return LARGEST_LOG_RATIO / self.z.abs().amax(0)

    def original(self, log_mean: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """log_mean (labels, genes) and coefficients (genes, covariates) in the units of the design given."""
        coefficients = (coefficients / self.spread).T
        return log_mean - self.mean @ coefficients, coefficients


def membership(data: LabelledCounts) -> Tensor:
    """(labels, cells) 1 for the cells of a label."""
    return torch.from_numpy((data.codes == np.arange(data.n_labels)[:, None]).astype(np.float64))

"""How components are fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from nbmix.core.m_step import MStep, NewtonMStep
from nbmix.errors import InputError

WEIGHT_SCHEMES = ("uniform", "learned", "given")

AUTO_PSEUDO_CELLS = 20.0  # where "auto" has no folds, and so no honest view of itself, to learn from


@dataclass(frozen=True)
class MixtureSettings:
    """How components are fitted.

    Attributes:
        n_components: K.
        folds: cells are split into this many folds for cross-fitting; 1 is plain EM.
        pseudo_cells: every component also sees this many cells' worth of the pooled statistics; 0 is none.
            "auto" is a prior around the pooled gene in their stead, whose strength is learned for every gene
            (``nbmix.core.prior``); without folds it is AUTO_PSEUDO_CELLS.
        weights: "uniform", "learned", or "given" per cell with the data.
        m_step: how the expected log likelihood is raised.
        dtype: of the bulk products, "float32" or "float64", which also says how closely batches interpolate
            in the size factor (``products.Precision``); tables and sums are float64 either way.
    """

    n_components: int
    folds: int = 5
    pseudo_cells: float | str = "auto"
    weights: str = "learned"
    m_step: MStep = field(default_factory=NewtonMStep)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("n_components", "folds"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise InputError(f"model.{name}={value}: must be a whole number")
        if self.n_components < 1:
            raise InputError(f"model.n_components={self.n_components}: there must be at least 1 component")
        if self.folds < 1:
            raise InputError(f"model.folds={self.folds}: use 1 for plain EM, or 2 and more to cross-fit")
        number = 0.0 if self.pseudo_cells == "auto" else self.pseudo_cells
        if not isinstance(number, int | float) or not (math.isfinite(number) and number >= 0):
            raise InputError(f"model.pseudo_cells={self.pseudo_cells}: must be auto or a number from 0 on")
        if self.weights not in WEIGHT_SCHEMES:
            raise InputError(f"model.weights={self.weights}: choose one of {', '.join(WEIGHT_SCHEMES)}")
        if self.dtype not in ("float32", "float64"):
            raise InputError(f"model.dtype={self.dtype}: choose float32 or float64")

    @property
    def learns_prior(self) -> bool:
        """Whether the strength of the prior around the pooled gene is learned."""
        return self.pseudo_cells == "auto" and self.folds > 1

    @property
    def n_pseudo_cells(self) -> float:
        """Pseudo-cells of every component."""
        if isinstance(self.pseudo_cells, str):
            return 0.0 if self.learns_prior else AUTO_PSEUDO_CELLS
        return self.pseudo_cells

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.float64

    @property
    def n_copies(self) -> int:
        """Copies of the components: one a fold and one of all cells, or that one alone."""
        return 1 if self.folds == 1 else self.folds + 1

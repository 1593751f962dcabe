"""How components are fitted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch

from nbmix.core.declared import Setting, checked
from nbmix.core.m_step import MStep, NewtonMStep

NComponents = Annotated[
    int,
    Setting("a number; auto, or a range as in 2-10: choose the elbow of the held-out likelihood", least=1),
]

Folds = Annotated[
    int,
    Setting(
        "folds for cross-fitting: a cell is assigned by components fitted without it; 1: plain EM", least=1
    ),
]

PseudoCells = Annotated[
    float | str,
    Setting(
        "auto: learn a prior around the pooled gene; N: add N cells of pooled counts; 0: no prior",
        least=0,
        words=("auto",),
    ),
]

StartPseudoCells = Annotated[
    float | str,
    Setting(
        "prior of the start (the ELBO has none); auto: learn one around the pooled gene; "
        "N: add N cells of pooled counts; 0: none",
        least=0,
        words=("auto",),
    ),
]

Weights = Annotated[
    str,
    Setting(
        "weights of the components: uniform, learned, or given for each cell (data.prior_key)",
        words=("uniform", "learned", "given"),
    ),
]

Dtype = Annotated[
    str,
    Setting(
        "precision of the sparse products; tables and sums are always float64", words=("float32", "float64")
    ),
]

AUTO_PSEUDO_CELLS = 20.0  # where "auto" has no folds, and so no held-out view, to learn from


@checked("model")
@dataclass(frozen=True)
class MixtureSettings:
    """How components are fitted.

    Without folds, pseudo_cells="auto" is AUTO_PSEUDO_CELLS; with folds see ``nbmix.core.prior``. ``dtype``
    also says how closely batches interpolate in the size factor (``nbmix.core.batch.Precision``).

    Attributes:
        m_step: how the expected log likelihood is raised.
    """

    n_components: NComponents = 4
    folds: Folds = 5
    pseudo_cells: PseudoCells = "auto"
    weights: Weights = "learned"
    m_step: MStep = field(default_factory=NewtonMStep)
    dtype: Dtype = "float32"

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

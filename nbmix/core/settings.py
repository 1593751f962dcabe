"""How components are fitted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch

from nbmix.core.declared import Setting, checked
from nbmix.core.m_step import MStep, NewtonMStep

NComponents = Annotated[
    int,
    Setting(
        "The number of groups of cells. With auto (up to 12), or a range as in 2-10, it is chosen.", least=1
    ),
]

ComponentsPerGroup = Annotated[
    float | str,
    Setting(
        "So many components are fitted for each group on average, and then joined. "
        "With 1 each group is one component. auto is 2, or more if groups are few, or "
        "1 if held-out cells gain nothing by more.",
        least=1,
        words=("auto",),
    ),
]

Folds = Annotated[
    int,
    Setting(
        "The number of folds for cross-fitting: a cell is assigned by components that "
        "were fitted without it. 1 is plain EM.",
        least=1,
    ),
]

PseudoCells = Annotated[
    float | str,
    Setting(
        "With auto a prior around the average cell is learned for each gene. A number "
        "adds so many cells of pooled counts to each component. With 0 there is no "
        "prior.",
        least=0,
        words=("auto",),
    ),
]

StartPseudoCells = Annotated[
    float | str,
    Setting(
        "The prior of the start; the ELBO has none. With auto one is learned around "
        "the average cell. A number adds so many cells of pooled counts. With 0 there "
        "is no prior.",
        least=0,
        words=("auto",),
    ),
]

Weights = Annotated[
    str,
    Setting(
        "The weights of the components are uniform, learned, or given for each cell (data.prior_key).",
        words=("uniform", "learned", "given"),
    ),
]

Dtype = Annotated[
    str,
    Setting(
        "The floating-point precision of the sparse products. Tables and sums are always in float64.",
        words=("float32", "float64"),
    ),
]

LEAST_SURPLUS = 6  # components beyond the groups, where "auto" says how many are fitted

AUTO_PSEUDO_CELLS = 20.0  # where "auto" has no folds, and so no held-out view, to learn from


@checked("model")
@dataclass(frozen=True)
class MixtureSettings:
    """How components are fitted.

    Without folds, pseudo_cells="auto" is AUTO_PSEUDO_CELLS; with folds see ``nbmix.core.prior``. ``dtype``
    also says how closely batches interpolate in the size factor (``nbmix.core.batch.Precision``).

    Attributes:
        n_components: that are fitted.
        n_groups: what they are then joined to; None: each is a group.
        may_be_fewer: a start may find fewer components, and no fewer than groups, where cells gain nothing by
            more.
        m_step: how the expected log likelihood is raised.
    """

    n_components: NComponents = 4
    folds: Folds = 5
    pseudo_cells: PseudoCells = "auto"
    weights: Weights = "learned"
    m_step: MStep = field(default_factory=NewtonMStep)
    dtype: Dtype = "float32"
    n_groups: int | None = None
    may_be_fewer: bool = False

    @property
    def is_joined(self) -> bool:
        """Whether components are to be joined to groups."""
        return self.n_groups is not None and self.n_groups < self.n_components

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


def n_to_fit(n_groups: int, components_per_group: float | str) -> int:
    """Components of a model of ``n_groups`` groups; "auto" is one each, until a fit says how many."""
    if isinstance(components_per_group, str):
        return n_groups
    return max(n_groups, round(n_groups * components_per_group))


def n_to_join(n_groups: int) -> int:
    """Components that are fitted where "auto" is to say how many, and cells to say which belong together.

    Of a single group nothing is to be known, so it has one.
    """
    return 1 if n_groups == 1 else max(2 * n_groups, n_groups + LEAST_SURPLUS)

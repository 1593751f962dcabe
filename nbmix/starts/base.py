"""What a start is: a small object that looks at the cells and says where a fit begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nbmix.core.batch import Basis, CellBatch, Precision
from nbmix.core.folds import CELLS_A_BLOCK, fold_blocks
from nbmix.core.joins import JoinEvidence
from nbmix.core.mixture import Mixture
from nbmix.core.parameters import Components, GenePrior
from nbmix.core.settings import MixtureSettings
from nbmix.data.batches import CellBatches, PreparedBatches
from nbmix.data.counts import CountData
from nbmix.errors import InputError


class StartState(NamedTuple):
    """Where a fit begins: responsibilities of the cells (cells, K), or components, or both.

    ``log_weights`` (K,) may come with components, and what cells say of their joins that they have not seen;
    and where cells come from several batches ``offsets`` of these (origins, genes) and their variance
    (genes,). What has been learned of the ``prior`` may come with either; with responsibilities it can be of
    other genes.
    """

    responsibilities: Tensor | None = None
    components: Components | None = None
    log_weights: Tensor | None = None
    prior: GenePrior | None = None
    join_evidence: JoinEvidence | None = None
    offsets: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, mixture: Mixture, batches: Iterable[CellBatch] = ()) -> StartState:
        """To go on from the components of all cells that a mixture has.

        Args:
            mixture: the last copy of its components is that of all cells.
            batches: those it was fitted to, in folds, where components are to be joined to groups.
        """
        evidence = join_evidence(mixture, batches) if mixture.settings.n_groups else None
        origins = mixture.origins
        offsets = None if origins is None else (origins.offsets[-1], origins.variance[-1])
        log_weights, prior = mixture.log_weights.data[-1], mixture.gene_prior()
        return cls(None, mixture.components(), log_weights, prior, evidence, offsets)

    def hand_to(self, mixture: Mixture) -> None:
        """Have a mixture begin at the components, if there are any, and at what is known of the prior."""
        if self.components is None:
            if self.prior is not None:
                mixture.set_prior(self.prior)
            return
        mixture.set_components(self.components, self.log_weights, self.prior)
        if mixture.origins is not None:
            mixture.origins.are_first = False
            if self.offsets is not None:
                mixture.origins.set(*self.offsets)

    @property
    def n_components(self) -> int:
        """K."""
        if self.components is not None:
            return self.components.log_mean.shape[0]
        assert self.responsibilities is not None
        return self.responsibilities.shape[1]


class Start(Protocol):
    """Chosen by the config group ``start``.

    One that finds as many components as it is asked for says ``finds_components = True``: more than there are
    groups may be asked of it, to be joined. One that brings components of its own may say ``n_components``,
    how many; these are joined where they are more than groups. Of any other each component is a group.
    """

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        """Look at the training cells ``data``; randomness comes from ``generator`` alone.

        Raises:
            InputError: the data or the settings do not allow this start.
        """
        ...


def join_evidence(mixture: Mixture, batches: Iterable[CellBatch]) -> JoinEvidence | None:
    """What the cells of a cross-fitted mixture say of joins; None without folds, or without batches."""
    if mixture.settings.folds == 1:
        return None
    joint, weights, sizes = [], [], []
    for batch in batches:
        log_weights = mixture.log_weights.data[mixture.copy_for(batch.fold)].cpu()
        joint.append(mixture.component_log_likelihood(batch).cpu() + log_weights)
        weights.append(log_weights.expand_as(joint[-1]))
        sizes.append(batch.size_factors.cpu())
    if not joint:
        return None
    return JoinEvidence(*(torch.cat(parts).double().numpy() for parts in (joint, weights, sizes)))


def prepare(
    data: CountData,
    folds: int,
    generator: np.random.Generator,
    basis: Basis | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Basis, Sequence[CellBatch]]:
    """All cells of ``data`` in memory as batches for products in ``dtype``, each within one fold."""
    basis = basis or Basis.of(data.counts, data.size_factors, Precision.of(dtype))
    blocks = fold_blocks(data.size_factors, folds, CELLS_A_BLOCK, generator, origins=data.origins)
    return basis, PreparedBatches(CellBatches(data, basis), blocks).all()


def new_mixture(
    data: CountData, settings: MixtureSettings, basis: Basis, start: StartState | None = None
) -> Mixture:
    """A mixture attached to ``data``, at the components of ``start`` if there are any."""
    cells = data.origin_cells
    mixture = Mixture(data.n_genes, settings, len(data.origin_names) if cells is not None else 0)
    mixture.attach(basis, float(data.size_factors.sum()), None if cells is None else torch.from_numpy(cells))
    if start is not None:
        start.hand_to(mixture)
    return mixture


def one_hot(assignments: np.ndarray, n_components: int) -> Tensor:
    """(cells,) component numbers -> (cells, K) responsibilities of 0 and 1."""
    return torch.eye(n_components, dtype=torch.float64)[torch.from_numpy(np.asarray(assignments, np.int64))]


def random_responsibilities(n_cells: int, n_components: int, generator: np.random.Generator) -> Tensor:
    """(cells, K) rows drawn uniformly from the simplex."""
    return torch.from_numpy(generator.dirichlet(np.ones(n_components), n_cells))


def choose_cells(data: CountData, n_cells: int, generator: np.random.Generator) -> CountData:
    """A random subset of cells in their order, or all of them where there are no more."""
    if n_cells >= data.n_cells:
        return data.load()
    return data.select_cells(np.sort(generator.choice(data.n_cells, n_cells, replace=False))).load()


def finds_components(start: Start) -> bool:
    """Whether a start finds as many components as it is asked for, see ``Start``."""
    return bool(getattr(start, "finds_components", False))


def n_brought(start: Start) -> int:
    """How many components a start brings; 0 where it does not say."""
    return int(getattr(start, "n_components", 0))


def check_components(data: CountData, settings: MixtureSettings) -> None:
    """A component needs at least one cell."""
    if settings.n_components > data.n_cells:
        raise InputError(
            f"model.n_components={settings.n_components}: there are only {data.n_cells} cells to fit; "
            "choose fewer components"
        )

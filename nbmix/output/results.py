"""What a model says of the cells it met, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.folds import CELLS_A_BLOCK, fold_blocks
from nbmix.core.joins import Group, JoinTree, group_components, group_probabilities
from nbmix.core.parameters import Components
from nbmix.core.statistics import SufficientStatistics
from nbmix.data.backed import StreamedBatches
from nbmix.data.batches import CellBatches
from nbmix.data.counts import CountData, some_rows
from nbmix.data.module import CountsDataModule
from nbmix.evaluation.calibration import fitted_inverse_temperature, log_prior_of, tempered
from nbmix.evaluation.doubt import Doubt, misfits, second_best
from nbmix.evaluation.embedding import MOST_UMAP_CELLS, Embedding, embed
from nbmix.evaluation.markers import Markers, find_markers, marker_table
from nbmix.models.base import MixtureModule, Prediction
from nbmix.output.groups import separations_table
from nbmix.starts.choice import Choice

MOST_CELLS_SHOWN = 30_000  # in a picture of cells: more cover each other


@dataclass
class Results:
    """A model, the data it met, and what it says of every cell (in the order of the data).

    What takes time is made when it is asked for, and kept.

    Attributes:
        data, model, cells: see above.
        provenance: nested settings and versions, plain values.
        max_umap_cells: above so many cells ``embedding`` is a PCA.
        arguments: of ``nbmix.NBMixture``, plain values, that new cells are read by, such as ``layer``.
    """

    data: CountsDataModule
    model: MixtureModule
    cells: Prediction
    provenance: dict[str, Any] = field(default_factory=dict)
    max_umap_cells: int = MOST_UMAP_CELLS
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The components of each of the K groups."""
        return self.model.groups

    @property
    def of_components(self) -> np.ndarray:
        """(cells, C) float64, the posterior of components."""
        return self.cells.responsibilities.numpy()

    @cached_property
    def responsibilities(self) -> np.ndarray:
        """(cells, K) float64, the posterior of groups: sums over their components."""
        return group_probabilities(self.of_components, self.groups)

    @property
    def assignments(self) -> np.ndarray:
        """(cells,) the group with the largest responsibility."""
        return self.responsibilities.argmax(1)

    @property
    def log_weights(self) -> np.ndarray:
        """(C,) ln pi of the components."""
        return self.model.mixture.log_weights.data[-1].cpu().numpy()

    @property
    def profiles(self) -> Components:
        """(K, genes) of each group the negative binomial of its mean and variance; on the CPU."""
        log_mean, log_inv_disp = (t.cpu().numpy() for t in self.model.mixture.components())
        profiles = group_components(log_mean, log_inv_disp, self.log_weights, self.groups)
        return Components(*(torch.from_numpy(values) for values in profiles))

    @cached_property
    def inverse_temperature(self) -> float | None:
        """Beta = 1 / T of the tempered posteriors, from cells that a copy of the components has not seen.

        None where there are none (plain EM without held-out cells), or an encoder gives the posteriors.
        """
        model, module = self.model, self.data
        if not model.posterior_is_exact:
            return None
        n_cells = module.data.n_cells
        if model.n_genes_missing is not None:  # new cells
            rows, folds = np.arange(n_cells), np.full(n_cells, -1)
        else:
            folds = module.cell_folds
            seen = (folds < 0) & ~np.isin(np.arange(n_cells), module.validation_rows)
            rows = np.flatnonzero(~seen)
        return fitted_inverse_temperature(model.mixture, module.data, rows, folds[rows])

    @property
    def calibrated(self) -> NDArray[np.float64] | None:
        """(cells, K) tempered responsibilities, made anew; None where there is no ``inverse_temperature``."""
        if self.inverse_temperature is None:
            return None
        log_prior = log_prior_of(self.model.mixture, self.data.data)
        of_components = tempered(self.of_components, log_prior, self.inverse_temperature)
        return group_probabilities(of_components, self.groups)

    @cached_property
    def probabilities(self) -> NDArray[np.float64]:
        """(cells,) of each cell's assignment, tempered where there is an ``inverse_temperature``."""
        calibrated = self.calibrated
        q = self.responsibilities if calibrated is None else calibrated
        return q[np.arange(len(q)), self.assignments]

    @cached_property
    def doubt(self) -> Doubt:
        """What speaks against the assignments; one pass over the counts."""
        cells = self.cells
        misfit = np.full(self.data.data.n_cells, np.nan)
        if not cells.component_log_likelihood.isnan().any():
            of_cells = cells.log_likelihood, cells.unseen_log_likelihood
            misfit = misfits(self.model.mixture, _all_batches(self.data), *of_cells)
        return Doubt(*second_best(self.responsibilities), misfit)

    @property
    def statistics(self) -> SufficientStatistics:
        """Of all cells, weighted by their responsibilities, without the offsets of their batches."""
        return self._collected[0]

    @property
    def basis(self) -> Basis:
        """Of ``statistics``."""
        return self._collected[1]

    @cached_property
    def _collected(self) -> tuple[SufficientStatistics, Basis]:
        """One pass over the counts."""
        q, basis = torch.from_numpy(self.responsibilities), self.data.basis
        if (origins := self.model.mixture.origins) is not None:
            return origins.statistics(_all_batches(self.data), basis, q)
        statistics = SufficientStatistics.zeros(basis, q.shape[1], "cpu")
        for batch in _all_batches(self.data):
            statistics.add_batch_(batch, basis, q[batch.rows])
        return statistics, basis

    @cached_property
    def markers(self) -> Markers:
        """What tells the groups' genes apart."""
        return find_markers(self.statistics, self.basis, self.total_size, self.profiles)

    @property
    def total_size(self) -> float:
        """Sum of all size factors."""
        return float(self.data.data.size_factors.sum())

    @cached_property
    def shown_rows(self) -> NDArray[np.int64]:
        """(shown,) positions of the cells in pictures of cells: all, or a random choice, ascending."""
        return some_rows(np.arange(self.data.data.n_cells), MOST_CELLS_SHOWN)

    @cached_property
    def shown_cells(self) -> CountData:
        """The same cells in memory."""
        return loaded(self.data.data, self.shown_rows)

    @cached_property
    def embedding(self) -> Embedding:
        """The shown cells in the plane."""
        some, n_cells = self.shown_cells, self.data.data.n_cells
        most = self.max_umap_cells if n_cells <= self.max_umap_cells else 0
        return embed(some.counts, some.size_factors, max_umap_cells=most)

    def offset_sizes(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """(some, 1) size factors of cells; (some, genes) where genes have offsets by batch."""
        data, origins = self.data.data, self.model.mixture.origins
        sizes = data.size_factors[rows][:, None]
        if origins is None or data.origins is None:
            return sizes
        return sizes * np.exp(origins.offsets[-1].cpu().numpy()[data.origins[rows]])

    @property
    def joins(self) -> JoinTree | None:
        """How components may be joined to groups; None where nothing is known of it."""
        return self.model.joins

    @property
    def separations(self) -> pd.DataFrame | None:
        """What is between every pair of groups; None where nothing is known of it."""
        tree = self.joins
        return None if tree is None else separations_table(self.model.separations, tree.gap_level)

    @property
    def choice(self) -> Choice | None:
        """Of the number of components, where it was left open."""
        return None if self.model.choice is None else Choice.of(self.model.choice)


def _all_batches(module: CountsDataModule) -> Iterable[CellBatch]:
    """All cells once, on this rank."""
    data, n_ranks = module.data, module.trainer.world_size if module.trainer else 1
    if n_ranks == 1 and not module.shuffle:  # most of these are there already
        # one DataLoader, though Lightning would allow a list
        return module.predict_dataloader()  # type: ignore[return-value]
    if data.is_backed:
        return StreamedBatches(data, module.basis, np.full(data.n_cells, -1), CELLS_A_BLOCK, keep=False)
    cells = CellBatches(data, module.basis)
    generator = np.random.default_rng(0)
    blocks = fold_blocks(data.size_factors, 1, CELLS_A_BLOCK, generator, origins=data.origins)
    return (cells.batch(rows) for _, rows in blocks)


def named_markers(results: Results, most: int | None = None) -> pd.DataFrame:
    """``marker_table`` of all groups with cells, with symbols beside the names where there are any."""
    return markers_with_names(results.markers, results.data.data, results.assignments, most)


def markers_with_names(
    markers: Markers, data: CountData, assignments: np.ndarray, most: int | None = None
) -> pd.DataFrame:
    """``named_markers`` of cells (cells,) that are assigned to groups."""
    table = marker_table(markers, data.gene_names, most)
    table = table[table["component"].isin(np.unique(assignments))].reset_index(drop=True)
    return with_symbols(table, data)


def with_symbols(table: pd.DataFrame, data: CountData) -> pd.DataFrame:
    """A column "symbol" beside "gene", where there are symbols; in place."""
    if data.gene_symbols is not None:
        symbols = dict(zip(data.gene_names, data.gene_symbols, strict=True))
        table.insert(table.columns.get_loc("gene") + 1, "symbol", table["gene"].map(symbols))
    return table


def loaded(data: CountData, rows: NDArray[np.int64]) -> CountData:
    """Some cells in memory."""
    return data.load() if rows.size == data.n_cells else data.select_cells(rows).load()

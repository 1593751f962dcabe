"""Counts that have passed the door: checked once, relied on everywhere below."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import anndata as ad
import numpy as np
import scipy.sparse as sp

from nbmix.data.source import SourceFile


@dataclass(frozen=True)
class CountData:
    """Raw counts of one experiment with what belongs to its cells and genes.

    Attributes:
        counts: (cells, genes) CSR, float32 values that are integers, int32 indices sorted
            within each row, no explicit zeros; or ``BackedCounts``, to be sliced,
            not computed with.
        size_factors: (cells,) float64, molecules a cell's rates are multiplied by; 0 only for
            an empty cell.
        cell_names: (cells,) names, as in ``AnnData.obs_names``.
        gene_names: (genes,) names, as in ``AnnData.var_names``.
        labels: (cells,) known labels as strings, or None. Scoring alone reads them, and the
            start that the user asks for by name.
        prior: (cells, components) given prior weights, rows summing to 1, or None.
        positions: (cells,) int64, where these cells stood in the whole data; None for the whole.
        n_whole: cells of the whole data, where ``positions`` is given.
        gene_symbols: (genes,) what people call the genes, shown beside ``gene_names``; or None.
        origins: (cells,) int64, which batch of the experiment each cell comes from, by its place in
            ``origin_names``; -1 for none of them. Or None.
        origin_names: of batches, some of which may have no cells here.
        annotations: what else the input says of these cells and genes, in obs and var; it has no counts.
            Or None.
        source: the .h5ad file that they were read from, which becomes part of the results; or None.
    """

    counts: sp.csr_matrix
    size_factors: np.ndarray
    cell_names: np.ndarray
    gene_names: np.ndarray
    labels: np.ndarray | None = None
    prior: np.ndarray | None = None
    positions: np.ndarray | None = None
    n_whole: int | None = None
    gene_symbols: np.ndarray | None = None
    annotations: ad.AnnData | None = field(default=None, repr=False)
    source: SourceFile | None = field(default=None, repr=False)
    origins: np.ndarray | None = None
    origin_names: tuple[str, ...] = ()

    @property
    def n_cells(self) -> int:
        return self.counts.shape[0]

    @property
    def n_genes(self) -> int:
        return self.counts.shape[1]

    @property
    def gene_labels(self) -> np.ndarray:
        """(genes,) for people: symbols where there are any, else names."""
        return self.gene_names if self.gene_symbols is None else self.gene_symbols

    @property
    def empty_cells(self) -> np.ndarray:
        """(cells,) bool, True for a cell without a single count."""
        return self.counts.empty_rows() if self.is_backed else np.diff(self.counts.indptr) == 0

    @property
    def gene_totals(self) -> np.ndarray:
        """(genes,) float64, the counts of each gene in all cells."""
        if self.is_backed:
            return self.counts.gene_totals()
        return np.asarray(self.counts.sum(0, dtype=np.float64)).ravel()

    @property
    def origin_cells(self) -> np.ndarray | None:
        """(origins,) cells of each batch of the experiment; None where it is not known to have any."""
        return None if self.origins is None else np.bincount(self.origins, minlength=len(self.origin_names))

    @property
    def is_backed(self) -> bool:
        """Whether the counts are still in their file."""
        return not sp.issparse(self.counts)

    def load(self) -> CountData:
        """The same with counts in memory."""
        return replace(self, counts=self.counts.load()) if self.is_backed else self

    def select_cells(self, rows: np.ndarray) -> CountData:
        """The cells at integer positions ``rows``, in that order."""
        return replace(
            self,
            counts=self.counts[rows],
            size_factors=self.size_factors[rows],
            cell_names=self.cell_names[rows],
            labels=None if self.labels is None else self.labels[rows],
            prior=None if self.prior is None else self.prior[rows],
            origins=None if self.origins is None else self.origins[rows],
            positions=np.asarray(rows) if self.positions is None else self.positions[rows],
            n_whole=self.n_cells if self.n_whole is None else self.n_whole,
            annotations=None if self.annotations is None else self.annotations[rows],
            source=None if self.source is None else self.source.select_cells(rows),
        )

    def select_genes(self, columns: np.ndarray) -> CountData:
        """The genes at integer positions ``columns``; size factors stay what they were."""
        if self.is_backed:
            counts = self.counts.select_columns(columns)
        else:
            counts = self.counts[:, columns].tocsr()
            counts.sort_indices()
        return replace(
            self,
            counts=counts,
            gene_names=self.gene_names[columns],
            gene_symbols=None if self.gene_symbols is None else self.gene_symbols[columns],
            annotations=None if self.annotations is None else self.annotations[:, columns],
            source=None if self.source is None else self.source.select_genes(columns),
        )


def some_rows(rows: np.ndarray, most: int) -> np.ndarray:
    """All of them, or a random choice in their order."""
    if rows.size <= most:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, most, replace=False))

"""Counts from arrays that are in memory, with size factors beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike

from nbmix.data.counts import CountData
from nbmix.data.from_anndata import make_count_data
from nbmix.errors import InputError


def make_array_data(
    x: Any,
    *,
    cell_names: Sequence[str] | None = None,
    gene_names: Sequence[str] | None = None,
    size_factors: ArrayLike | None = None,
    batch: ArrayLike | None = None,
) -> CountData:
    """Check an array of counts, and keep silent genes.

    Args:
        x: (cells, genes), sparse of any format or dense.
        cell_names, gene_names: default "0", "1", ...
        size_factors: (cells,) or one number; default the counts of each cell.
        batch: (cells,) names of the batches that they come from; None where nothing is known of any.

    Raises:
        InputError: as ``make_count_data``.
    """
    if sp.issparse(x) and x.format not in ("csr", "csc"):  # which AnnData would refuse
        x = sp.csr_matrix(x.astype(np.float64))
    n_cells, n_genes = x.shape
    adata = ad.AnnData(
        x,
        obs=pd.DataFrame(index=pd.Index(range(n_cells) if cell_names is None else cell_names).astype(str)),
        var=pd.DataFrame(index=pd.Index(range(n_genes) if gene_names is None else gene_names).astype(str)),
    )
    key = None if size_factors is None else "size_factors"
    if size_factors is not None:
        adata.obs[key] = each_cell(size_factors, n_cells)
    if batch is not None:
        names = np.asarray(batch)
        if names.shape != (n_cells,):
            raise InputError(f"batch has shape {names.shape} for {n_cells} cells; give one name a cell")
        adata.obs["batch"] = names
    return make_count_data(
        adata,
        where="counts",
        label_key=None,
        size_factor_key=key,
        batch_key=None if batch is None else "batch",
        min_counts=0,
    )


def each_cell(size_factors: ArrayLike, n_cells: int) -> np.ndarray:
    """(cells,) float64 of one number or one a cell.

    Raises:
        InputError: of another number of cells.
    """
    sizes = np.asarray(size_factors, dtype=np.float64).reshape(-1)
    if sizes.size not in (1, n_cells):
        raise InputError(f"size_factors holds {sizes.size} values for {n_cells} cells")
    return np.broadcast_to(sizes, n_cells)

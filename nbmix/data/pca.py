"""Principal components of log counts: what the k-means start and the pictures are made of."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, csr_matrix
from sklearn.decomposition import PCA
from sklearn.utils.sparsefuncs import mean_variance_axis

N_VARIABLE_GENES = 2000

ROUNDING = 1e-5  # a standard deviation below this share of the mean is float32 rounding, not variation


def log_pca(
    counts: csr_matrix | csr_array,
    size_factors: ArrayLike,
    n_pcs: int = 50,
    seed: int = 0,
    *,
    n_genes: int = N_VARIABLE_GENES,
) -> NDArray[np.float32]:
    """Principal components of log-transformed counts.

    y = ln(1 + x s~ / s), with s the cell's size factor and s~ the median of the positive ones; a cell
    with s = 0 has y = 0. Kept are the n_genes genes with the largest variance of y. The matrix stays sparse
    unless one side is at most n_pcs: centring happens inside the Lanczos iteration (ARPACK).

    Args:
        counts: (cells, genes), CSR.
        size_factors: (cells,), not negative; counts per cell, or any multiple of it.
        n_pcs: principal components wanted.
        seed: start vector of the Lanczos iteration.
        n_genes: most variable genes, at most.

    Returns:
        (cells, n_pcs) float32 scores, decreasing in variance; columns of zeros where the data have fewer
        dimensions than n_pcs.

    Raises:
        ValueError: when the number of size factors is not the number of cells.
    """
    n_cells = counts.shape[0]
    size = np.asarray(size_factors, dtype=np.float64)
    if size.shape != (n_cells,):
        raise ValueError(f"size_factors have shape {size.shape}, counts have {n_cells} cells")
    scores = np.zeros((n_cells, n_pcs), dtype=np.float32)
    filled = size > 0
    if not filled.any():
        return scores

    scale = np.divide(np.median(size[filled]), size, out=np.zeros(n_cells), where=filled)  # (cells,)
    data = counts.data
    values = np.repeat(scale, np.diff(counts.indptr))  # changed in place: as large as the counts twice over
    values *= data
    np.log1p(values, out=values)
    values = values.astype(np.float32)
    log_counts = csr_array((values, counts.indices, counts.indptr), shape=counts.shape)
    mean, variance = mean_variance_axis(log_counts, axis=0)  # (genes,)
    variance = np.where(np.sqrt(variance) > ROUNDING * mean, variance, 0.0)
    genes = np.sort(np.argsort(-variance, kind="stable")[:n_genes])
    genes = genes[variance[genes] > 0]
    if len(genes) == 0:
        return scores
    log_counts = log_counts[:, genes]

    smaller_side = min(log_counts.shape)
    if n_pcs < smaller_side:
        found = PCA(n_pcs, svd_solver="arpack", random_state=seed).fit_transform(log_counts)
    else:  # ARPACK cannot find all; the dense matrix has a side of at most n_pcs here
        found = PCA(smaller_side, svd_solver="full").fit_transform(log_counts.toarray())
    scores[:, : found.shape[1]] = found
    return scores

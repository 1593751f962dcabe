"""Cells of two groups, without a model."""

import numpy as np
from scipy.sparse import csr_array


def two_groups(n_cells: int = 60, n_genes: int = 80) -> tuple[csr_array, np.ndarray, np.ndarray]:
    """Counts of cells that belong to two groups by turns, their totals, and the group of each."""
    rng = np.random.default_rng(0)
    profiles = rng.gamma(0.5, size=(2, n_genes))
    group = np.arange(n_cells) % 2
    size = rng.lognormal(np.log(300), 0.5, n_cells)
    counts = csr_array(rng.poisson(size[:, None] * (profiles / profiles.sum(axis=1, keepdims=True))[group]))
    return counts, np.asarray(counts.sum(axis=1), dtype=np.float64), group

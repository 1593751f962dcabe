"""Responsibilities of cells that belong nowhere in particular."""

import numpy as np

SIZES = [(1, 1), (1, 30), (40, 1), (40, 2), (200, 30)]  # cells and components, at the edges and between


def responsibilities(n_cells: int, n_components: int, seed: int = 0) -> np.ndarray:
    """(cells, components), rows sum to 1."""
    return np.random.default_rng(seed).dirichlet(np.full(n_components, 0.2), n_cells)

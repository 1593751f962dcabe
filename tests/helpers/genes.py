"""Genes of every kind that a fit has to cope with."""

from __future__ import annotations

import numpy as np

KINDS = (
    "overdispersed",
    "sparse",
    "nearly poisson",
    "under-dispersed",
    "silent",
    "one count",
    "one cell",
    "deep",
)


def genes_of_every_kind(n_cells=150, each=8):
    """Counts (cells, kinds * each) and size factors."""
    s = np.exp(np.random.default_rng(0).normal(8, 0.5, n_cells))
    columns = []
    for seed, kind in enumerate(KINDS):
        rng = np.random.default_rng(seed)
        for _ in range(each):
            mean = s * np.exp(rng.uniform(-10, -5))
            x = np.zeros(n_cells)
            if kind == "overdispersed":
                x = rng.poisson(mean * rng.gamma(np.exp(rng.uniform(-2, 2)), size=n_cells))
            elif kind == "sparse":
                x = rng.poisson(s / s.mean() * rng.uniform(0.1, 1) * rng.gamma(2.0, 0.5, n_cells))
            elif kind == "nearly poisson":
                x = rng.poisson(mean)
            elif kind == "under-dispersed":
                x = np.rint(s * np.exp(-6))
            elif kind == "one count":
                x[rng.integers(n_cells)] = 1
            elif kind == "one cell":
                x[rng.integers(n_cells)] = rng.integers(2, 200)
            elif kind == "deep":
                x = rng.poisson(s * rng.gamma(1.5, size=n_cells))
            columns.append(x)
    return np.stack(columns, axis=1), s

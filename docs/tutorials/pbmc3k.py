"""The cells of the tutorial on pbmc3k, or some that stand in for them."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import URLError

import anndata as ad
import numpy as np
from made import blood

BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data" / "pbmc3k_annot.h5ad"


def cells(n_cells: int = 1000, seed: int = 0) -> ad.AnnData:
    """``n_cells`` cells drawn at random: raw counts in X, names of the known clusters in obs["cell_type"]."""
    path = os.environ.get("NBMIX_PBMC3K") or (BESIDE if BESIDE.exists() else None)
    if path is not None:
        adata = ad.read_h5ad(path)
    else:
        try:
            adata = _downloaded()
        except (OSError, URLError):
            print("MADE ON THE SPOT: without a network no number below is of pbmc3k")
            adata = blood(n_cells, 800)
            adata.obs["cell_type"] = adata.obs["kind"]
    rows = np.random.default_rng(seed).choice(adata.n_obs, min(n_cells, adata.n_obs), replace=False)
    return adata[np.sort(rows)].copy()


def _downloaded() -> ad.AnnData:
    import scanpy as sc

    counts, named = sc.datasets.pbmc3k(), sc.datasets.pbmc3k_processed()
    counts = counts[named.obs_names].copy()
    counts.obs["cell_type"] = named.obs["louvain"].to_numpy()
    return counts

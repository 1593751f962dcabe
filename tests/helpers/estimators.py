"""Cells and settings for fits of ``nbmix.NBMixture``."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd

import nbmix
from nbmix import NBMixture

EM = {"n_components": 2, "start": "kmeans", "folds": 3}
AMORTIZED = {"n_components": 2, "model": "amortized", "max_iter": 2, "model_settings": {"n_hidden": 4}}

SIMULATION = nbmix.simulate(n=120, p=60, k=2, s=1e4, seed=1)
COUNTS = SIMULATION.counts


def annotated(counts=COUNTS) -> ad.AnnData:
    """Cells c0, c1, ... and genes g0, g1, ...; gene 3 is silent."""
    counts = counts.tolil(copy=True)
    counts[:, 3] = 0
    adata = ad.AnnData(
        counts.tocsr(),
        obs=pd.DataFrame(index=[f"c{i}" for i in range(counts.shape[0])]),
        var=pd.DataFrame(index=[f"g{j}" for j in range(counts.shape[1])]),
    )
    adata.obs["molecules"] = 1e4
    adata.obsm["prior"] = np.eye(2)[SIMULATION.labels] * 0.8 + 0.1
    return adata


def same_bits(one: NBMixture, other: NBMixture) -> bool:
    names = (
        "weights_",
        "log_mean_",
        "log_inv_disp_",
        "responsibilities_",
        "log_likelihoods_",
        "lower_bounds_",
    )
    return all(np.array_equal(getattr(one, n), getattr(other, n), equal_nan=True) for n in names)

"""scVI: k-means in the latent space of a variational autoencoder of counts.

scvi-tools is optional, by the extra ``nbmix[scvi]``: it brings a framework of its own.
"""

from __future__ import annotations

import warnings

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from nbmix.data.counts import CountData
from nbmix.evaluation.baselines.base import Baseline, Outcome, require
from nbmix.evaluation.baselines.kmeans import kmeans


def scvi_kmeans(
    data: CountData, n_clusters: int, seed: int = 0, max_epochs: int | None = None
) -> NDArray[np.int64]:
    """(cells,) k-means clusters of scVI's 10 latent dimensions (Lopez et al. 2018), its own defaults.

    Args:
        data: cells with counts in memory.
        n_clusters: K.
        seed: of scVI and of k-means.
        max_epochs: of training; None for scVI's rule, at most 400.

    Raises:
        InputError: scvi-tools is not installed.
    """
    scvi = require("scvi", extra="scvi")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scvi.settings.seed = seed
        adata = AnnData(data.counts.copy())
        scvi.model.SCVI.setup_anndata(adata)
        model = scvi.model.SCVI(adata)
        model.train(max_epochs=max_epochs, enable_progress_bar=False, logger=False)
        latent = model.get_latent_representation()
    return kmeans(latent, n_clusters, seed)


SCVI = Baseline(
    "scvi",
    "k-means on the latent space of scVI",
    lambda data, k, seed: Outcome(scvi_kmeans(data, k, seed)),
    packages=("scvi",),
    warms_up=False,  # its training takes as long on a few cells
)

"""What the notebooks share: the cells, the source's own settings, and its numbers beside ours."""
# ruff: noqa: E402  the filter below has to come before the imports that it is for

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's; no bar is shown here

import numpy as np
import pandas as pd
import pooch
import torch

from nbmix.components import GradientMStep
from nbmix.data.counts import CountData
from nbmix.data.simulate import simulated_count_data
from nbmix.data.zheng import MIXTURES, ZHENG_URL, read_zheng
from nbmix.start.random import RandomStart

FACS = "pbmc_facs.h5ad"
CD74 = "ENSG00000019582"
SIMULATED_CELLS, SIMULATED_GENES = 600, 1000

# of NBMixture: the EM that the source prints, from random responsibilities
AS_PRINTED: dict[str, Any] = {
    "start": RandomStart(n_starts=1),
    "folds": 1,
    "pseudo_cells": 0,
    "weights": "uniform",
    "max_iter": 10,
    "model_settings": {"m_step": GradientMStep(lr=1e-2, num_epochs=50)},
}


def sorted_cells(mixture: str, n_cells: int | None = None, seed: int = 0) -> CountData:
    """Sorted blood cells of Zheng et al. (2017), or simulated ones with their labels where there are none.

    They come from the first that is there: the file that the environment variable NBMIX_PBMC_FACS names,
    shared/data/pbmc_facs.h5ad beside the clone, archives that nbmix has downloaded for this user.

    Args:
        mixture: "mix2", "mix4" or "mix10".
        n_cells: drawn at random, at most; default all.
        seed: of the draw.
    """
    populations = MIXTURES[mixture]
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / FACS
    path = os.environ.get("NBMIX_PBMC_FACS") or (beside if beside.exists() else None)
    archives = Path(pooch.os_cache("nbmix")) / "zheng"
    fetched = (archives / Path(ZHENG_URL).name.replace("{population}", name) for name in populations)
    if path is not None or all(archive.exists() for archive in fetched):
        origin = "sorted cells of Zheng et al. (2017)"
        data = read_zheng(populations, path=path)
        if n_cells is not None and n_cells < data.n_cells:
            rows = np.sort(np.random.default_rng(seed).choice(data.n_cells, n_cells, replace=False))
            data = data.select_cells(rows)
            data = data.select_genes(np.flatnonzero(data.counts.sum(axis=0)))
    else:
        origin = "SIMULATED: no number below is of the sorted cells (NBMIX_PBMC_FACS names their file)"
        data = _simulated(populations, min(n_cells or SIMULATED_CELLS, SIMULATED_CELLS), seed)
    print(f"{data.n_cells:,} cells, {data.n_genes:,} genes; {origin}")
    return data


def leiden(data: CountData, *, normalise: bool = True) -> np.ndarray | None:
    """scanpy's PCA, neighbours and Leiden at resolution 1: (cells, clusters) 0 or 1; None without scanpy.

    Args:
        data: raw counts.
        normalise: to equal totals, and take logarithms; the source does not.
    """
    try:
        import anndata as ad
        import scanpy as sc
    except ImportError:
        print("no Leiden: scanpy is not installed (pip install 'nbmix[benchmarks]')")
        return None
    threads = torch.get_num_threads()
    adata = ad.AnnData(data.counts.copy())
    if normalise:
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
    sc.pp.pca(adata, zero_center=False, random_state=0)
    sc.pp.neighbors(adata, random_state=0)
    sc.tl.leiden(adata, random_state=0, flavor="igraph", n_iterations=2)
    torch.set_num_threads(threads)  # which neighbours leaves at the number of cores
    groups = adata.obs["leiden"].to_numpy().astype(int)
    return np.eye(groups.max() + 1)[groups]


def _simulated(populations: tuple[str, ...], n_cells: int, seed: int) -> CountData:
    data = simulated_count_data(n_cells, SIMULATED_GENES, len(populations), seed=seed)
    assert data.labels is not None
    component = np.char.replace(data.labels.astype(str), "component", "").astype(int)
    genes = data.gene_names.copy().astype(object)
    genes[int(data.counts.sum(axis=0).argmax())] = CD74
    return CountData(
        data.counts, data.size_factors, data.cell_names, genes, np.asarray(populations)[component]
    )


def beside(numbers: Mapping[str, tuple[float, float]]) -> pd.DataFrame:
    """A table of name -> (printed in the source, computed here); NaN where the source prints none."""
    return pd.DataFrame.from_dict(dict(numbers), orient="index", columns=["source", "here"], dtype=float)

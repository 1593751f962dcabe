"""An AnnData that a small fit has written into."""

from __future__ import annotations

from functools import cache

import anndata as ad
import numpy as np
import pandas as pd

import nbmix

N_CELLS, N_GENES, N_KINDS = 320, 120, 4


@cache
def _fitted() -> ad.AnnData:
    drawn = nbmix.simulate(n=N_CELLS, p=N_GENES, k=N_KINDS, s=3000, seed=2)
    adata = ad.AnnData(
        drawn.counts,
        obs=pd.DataFrame({"kind": drawn.labels}, index=[f"c{i}" for i in range(N_CELLS)]),
        var=pd.DataFrame(index=[f"g{j}" for j in range(N_GENES)]),
    )
    nbmix.cluster(adata, N_KINDS, start="kmeans", folds=3)
    return adata


def clustered() -> ad.AnnData:
    """Four kinds of cells, which are the groups "0" to "3" of a fit with joins."""
    return _fitted().copy()


def unlike_kinds(adata: ad.AnnData, key: str = "nbmix") -> int:
    """Cells whose group holds mostly another kind."""
    table = pd.crosstab(adata.obs[key], adata.obs["kind"]).to_numpy()
    return int(table.sum() - table.max(1).sum())


def read_back(adata: ad.AnnData, path) -> ad.AnnData:
    """The same from a file."""
    adata.write_h5ad(path / "written.h5ad")
    return ad.read_h5ad(path / "written.h5ad")


def observed_ln_fc(adata: ad.AnnData, first: list[str], second: list[str]) -> np.ndarray:
    """(genes,) of the mean counts per molecule of the cells of some groups."""
    groups, x = adata.obs["nbmix"].astype(str), np.asarray(adata.X.todense())
    rates = [x[groups.isin(some)].sum(0) / x[groups.isin(some)].sum() for some in (first, second)]
    with np.errstate(divide="ignore"):
        return np.log(rates[0]) - np.log(rates[1])

"""Leiden communities of a nearest-neighbour graph: the path that most analyses of single cells take.

scanpy, igraph and leidenalg are optional: the extra ``benchmarks``.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from nbmix.data.counts import CountData
from nbmix.errors import InputError
from nbmix.evaluation.baselines.base import Baseline, Outcome, require

PACKAGES = ("scanpy", "igraph", "leidenalg")

N_PCS, N_NEIGHBORS = 50, 15  # scanpy's own

# natural log; a graph of cells has one community at the least, hundreds at the most
LOG_RESOLUTIONS = (-7.0, 4.0)


class NeighborGraph(NamedTuple):
    """Principal components of log counts, float32 (cells, PCs), and the weighted graph (cells, cells)."""

    pcs: NDArray[np.float32]
    connectivities: sp.csr_matrix


class Communities(NamedTuple):
    """Community of each cell (cells,), 0 the largest, and the resolution that gave them."""

    codes: NDArray[np.int64]
    resolution: float

    @property
    def n(self) -> int:
        return int(self.codes.max()) + 1


def scanpy_graph(data: CountData, seed: int = 0) -> NeighborGraph:
    """Scanpy's usual way to a graph: normalise to the median total, ln(1 + x), 50 PCs, 15 neighbours.

    All genes are used. Edge weights are UMAP's (McInnes et al. 2018).

    Args:
        data: cells with counts in memory.
        seed: of PCA and of the neighbours.

    Raises:
        InputError: scanpy is not installed, or there are fewer than three cells or genes.
    """
    sc = require("scanpy")
    if min(data.n_cells, data.n_genes) < 3:
        raise InputError(f"{data.n_cells} cells x {data.n_genes} genes: Leiden needs three of each or more")
    adata = AnnData(data.counts.copy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scanpy's and numba's, about their own future
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
        sc.pp.pca(adata, n_comps=min(N_PCS, min(adata.shape) - 1), random_state=seed)
        sc.pp.neighbors(adata, n_neighbors=min(N_NEIGHBORS, data.n_cells - 1), random_state=seed)
    return NeighborGraph(adata.obsm["X_pca"], adata.obsp["connectivities"].tocsr())


def leiden(graph: NeighborGraph, resolution: float = 1.0, seed: int = 0) -> Communities:
    """Communities of largest modularity at a resolution (Traag et al. 2019), by igraph, two iterations.

    Args:
        graph: from ``scanpy_graph``.
        resolution: the larger, the more communities; above 0.
        seed: of igraph's moves.

    Raises:
        InputError: scanpy, igraph or leidenalg is not installed.
    """
    sc = require(*PACKAGES)
    adata = AnnData(shape=graph.connectivities.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.tl.leiden(
            adata,
            resolution,
            adjacency=graph.connectivities,
            flavor="igraph",
            n_iterations=2,
            directed=False,
            random_state=seed,
        )
    return Communities(adata.obs["leiden"].to_numpy().astype(np.int64), resolution)


def leiden_with(graph: NeighborGraph, n_communities: int, seed: int = 0, max_tries: int = 30) -> Communities:
    """Communities of the resolution at which there are ``n_communities``: it has to be known beforehand.

    Bisection in ln resolution. The number need not grow steadily with it, and a graph has at least as many
    communities as connected parts, so the nearest number that was met is returned where none is hit.

    Raises:
        InputError: as ``leiden``; or ``n_communities`` is not between 1 and the number of cells.
    """
    n_cells = graph.connectivities.shape[0]
    if not 1 <= n_communities <= n_cells:
        raise InputError(f"n_communities={n_communities}: must be from 1 to the {n_cells} cells")
    low, high = LOG_RESOLUTIONS
    nearest = leiden(graph, 1.0, seed)
    for _ in range(max_tries):
        if nearest.n == n_communities:
            break
        middle = (low + high) / 2
        found = leiden(graph, float(np.exp(middle)), seed)
        if abs(found.n - n_communities) < abs(nearest.n - n_communities):
            nearest = found
        low, high = (middle, high) if found.n < n_communities else (low, middle)
    return nearest


def _searched(data: CountData, n_clusters: int, seed: int) -> Outcome:
    found = leiden_with(scanpy_graph(data, seed), n_clusters, seed)
    return Outcome(found.codes, f"resolution {found.resolution:.3g}")


LEIDEN = Baseline(
    "leiden",
    "scanpy's path (normalise, log1p, 50 PCs, 15 neighbours), igraph Leiden, resolution 1",
    lambda data, _, seed: Outcome(leiden(scanpy_graph(data, seed), 1.0, seed).codes, "resolution 1"),
    packages=PACKAGES,
)
LEIDEN_K = Baseline(
    "leiden-k",
    "the same at the resolution that gives the wanted number, searched for",
    _searched,
    packages=PACKAGES,
)

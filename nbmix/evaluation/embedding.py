"""Two-dimensional pictures of the cells, from the counts alone: no model is involved."""

from importlib.util import find_spec
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, csr_matrix

from nbmix.core.declared import Setting
from nbmix.data.pca import log_pca

UMAP_NEIGHBORS = 15
UMAP_MIN_DISTANCE = 0.5  # as in scanpy: groups wide enough to see mixing within them

UMAP_EPOCHS = 200  # 500, as is usual for few cells, keep no more of the neighbours

MOST_UMAP_CELLS = 20_000  # which take a quarter of a minute

MaxUmapCells = Annotated[
    int,
    Setting("Pictures use UMAP up to so many cells, and PCA beyond. With 0 they always use PCA.", least=0),
]


class Embedding(NamedTuple):
    """Coordinates (cells, 2), float32, no unit, and the method that made them."""

    name: Literal["UMAP", "PCA"]
    coordinates: NDArray[np.float32]


def embed(
    counts: csr_matrix | csr_array,
    size_factors: ArrayLike,
    *,
    max_umap_cells: MaxUmapCells = MOST_UMAP_CELLS,
    n_pcs: int = 50,
    seed: int = 0,
) -> Embedding:
    """Place the cells in the plane: UMAP (McInnes et al. 2018) of `log_pca`, or its first two components.

    The principal components are the answer above `max_umap_cells` cells, to save the time that UMAP would
    take, up to 15 cells, its number of neighbours, and where scranpy is not installed, which compiles UMAP
    (umappp) for Linux and macOS. UMAP starts from the first two components, which keeps the coarse
    arrangement of the groups (Kobak and Linderman 2021), and takes `UMAP_EPOCHS`.

    Args:
        counts: (cells, genes), CSR.
        size_factors: (cells,), not negative; a cell with 0 is treated as empty.
        n_pcs: principal components that UMAP sees.
        seed: the same seed gives the same coordinates on the same machine.

    Raises:
        ValueError: when the number of size factors is not the number of cells.
    """
    scores = log_pca(counts, size_factors, max(n_pcs, 2), seed)  # (cells, n_pcs)
    plane = scores[:, :2]
    spread = float(plane[:, 0].std())
    if not UMAP_NEIGHBORS < len(scores) <= max_umap_cells or spread == 0 or find_spec("scranpy") is None:
        return Embedding("PCA", plane)

    return Embedding("UMAP", _umap(scores, plane / spread, seed))


def _umap(scores: NDArray[np.float32], init: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Coordinates (cells, 2) of UMAP that begins at ``init``."""
    from scranpy import run_umap

    placed = run_umap(
        np.asfortranarray(scores.T, dtype=np.float64),
        num_neighbors=UMAP_NEIGHBORS,
        min_dist=UMAP_MIN_DISTANCE,
        num_epochs=UMAP_EPOCHS,
        initialize_method="none",
        initial_coordinates=np.ascontiguousarray(init, dtype=np.float64),
        optimize_seed=seed,
        num_threads=torch.get_num_threads(),
    )
    return np.asarray(placed, dtype=np.float32)

"""Counts drawn from the model itself."""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from nbmix.core.declared import Setting
from nbmix.core.raw_counts import check_counts
from nbmix.data.counts import CountData
from nbmix.data.from_anndata import DEFAULT_LABEL_KEY, MinCounts, make_count_data
from nbmix.errors import InputError, naming_the_nearest

MAX_SIZE_FACTOR = 1e8  # beyond, counts leave the range where float32 is exact
ENTRIES_AT_ONCE = 2**21  # five dense float64 arrays of this size: 84 MB


class Simulation(NamedTuple):
    """Counts that ``simulate`` has drawn, and the truth behind them.

    Attributes:
        counts: (cells, genes) CSR matrix.
        labels: (cells,) int, the component of each cell.
        log_mean: (components, genes) ln mu, per unit of size factor.
        log_inv_disp: (components, genes) ln r.
        size_factor: molecules per cell, the same for every cell.

    >>> import nbmix
    >>> nbmix.simulate(n=5, p=3, k=2).labels.shape
    (5,)
    """

    counts: sp.csr_matrix
    labels: np.ndarray
    log_mean: np.ndarray
    log_inv_disp: np.ndarray
    size_factor: float


@naming_the_nearest
def simulate(
    n: int = 100,
    p: int = 500,
    k: int = 4,
    s: float = 1e4,
    seed: int = 0,
    extra_poisson: bool = False,
    *,
    entries_at_once: int = ENTRIES_AT_ONCE,
) -> Simulation:
    """Draw a mixture of negative binomials.

        lambda_ij ~ Gamma(shape r_kj, scale mu_kj / r_kj),    x_ij ~ Poisson(s lambda_ij)

    with k the component of cell i, so that E[x] = s mu and V[x] = s mu + (s mu)^2 / r;
    ln mu ~ U(-12, -6), ln r ~ U(0, 4) as in Sarkar et al. (2019), PLoS Genet 15:e1008045.

    The random draws come in the order of ``simulate`` in the source notebook. The notebook prints
    x ~ Poisson(NB(mean s mu, inverse dispersion r)), which is one Poisson layer too many.

    Up to 2**21 entries (n * p) are drawn at once, as in the source. More are drawn in blocks of whole
    cells: lambda of a block, and then its x. This bounds the dense memory by about 150 MB. The draws then
    differ from those of a single block, but their distribution does not.

    Args:
        n: the number of cells.
        p: the number of genes.
        k: the number of components.
        s: the size factor, molecules per cell; up to 1e8.
        seed: of ``np.random.default_rng``.
        extra_poisson: draw the printed form, only to reproduce the result printed with it.
        entries_at_once: the largest number of dense entries in a block, unless one cell has more.

    Returns:
        ``Simulation``: the counts, the component of each cell, and the parameters.

    Raises:
        InputError: an argument out of its range.

    >>> import nbmix
    >>> simulation = nbmix.simulate(n=5, p=3, k=2)
    >>> simulation.counts.shape, simulation.log_mean.shape
    ((5, 3), (2, 3))
    """
    for name, size in {"n": n, "p": p, "k": k}.items():
        if size < 1:
            raise InputError(f"simulate: {name}={size} must be 1 or more")
    if not (math.isfinite(s) and 0 < s <= MAX_SIZE_FACTOR):
        raise InputError(f"simulate: size factor s={s} must be positive and at most {MAX_SIZE_FACTOR:g}")
    rng = np.random.default_rng(seed)
    labels = np.argmax(rng.uniform(size=(n, k)), axis=1)  # (cells,)
    log_mean = rng.uniform(-12, -6, size=(p, k)).T  # (components, genes)
    log_inv_disp = rng.uniform(0, 4, size=(p, k)).T  # (components, genes)
    sizes = np.full(n, float(s))
    counts = draw_counts(labels, sizes, log_mean, log_inv_disp, rng, extra_poisson, entries_at_once)
    counts = check_counts(counts, "simulate: counts")
    return Simulation(counts, labels, log_mean, log_inv_disp, float(s))


def draw_counts(
    components: np.ndarray,
    size_factors: np.ndarray,
    log_mean: np.ndarray,
    log_inv_disp: np.ndarray,
    rng: np.random.Generator,
    extra_poisson: bool = False,
    entries_at_once: int = ENTRIES_AT_ONCE,
) -> sp.csr_matrix:
    """Counts (cells, genes) float32 of cells whose components are known; see ``simulate``.

    Args:
        components: (cells,) numbers of the components.
        size_factors: (cells,).
        log_mean, log_inv_disp: (K, genes); a gene that is NaN in them has no counts.
        rng: is drawn from block by block.
        extra_poisson, entries_at_once: see ``simulate``.
    """
    known = np.isfinite(log_mean)
    shape = np.exp(np.where(known, log_inv_disp, 0))
    scale = np.exp(np.where(known, log_mean - log_inv_disp, -np.inf))
    rows = max(1, entries_at_once // log_mean.shape[1])
    blocks = []
    for start in range(0, len(components), rows):
        z, s = components[start : start + rows], size_factors[start : start + rows, None]
        if extra_poisson:
            rate = rng.negative_binomial(n=shape[z], p=1 / (1 + s * scale[z]))
        else:
            rate = s * rng.gamma(shape[z], scale[z])  # (block, genes)
        blocks.append(sp.csr_matrix(rng.poisson(rate).astype(np.float32)))
    return sp.vstack(blocks, format="csr")


def simulated_count_data(
    n_cells: Annotated[int, Setting("The number of cells to draw.", least=1)] = 100,
    n_genes: Annotated[
        int, Setting("The number of genes to draw. Those without a count are left out.", least=1)
    ] = 500,
    n_components: Annotated[
        int,
        Setting(
            "The number of components that cells are drawn from, whatever model.n_components is.", least=1
        ),
    ] = 4,
    size_factor: Annotated[
        float, Setting("The number of molecules of each cell.", above=0, most=MAX_SIZE_FACTOR)
    ] = 1e4,
    seed: int = 0,
    extra_poisson: Annotated[
        bool, Setting("With true a second Poisson layer is added, which the source prints by mistake.")
    ] = False,
    min_counts: MinCounts = 1,
) -> CountData:
    """A simulation as if read from a file: row sums as size factors, silent genes dropped.

    Labels are "component0", "component1", ...; see ``simulate`` for the model and the arguments.

    >>> simulated_count_data(n_cells=20, n_genes=10, n_components=2, size_factor=1e5).n_cells
    20
    """
    simulation = simulate(n_cells, n_genes, n_components, size_factor, seed, extra_poisson)
    adata = ad.AnnData(
        simulation.counts,
        obs=pd.DataFrame(
            {DEFAULT_LABEL_KEY: [f"component{k}" for k in simulation.labels]},
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(index=[f"gene{j}" for j in range(n_genes)]),
    )
    return make_count_data(adata, where="data=sim", min_counts=min_counts)

"""Data sets with one awkward property each, made from real ones or simulated: do the defaults behave?

Used by quality.py, as its data sets "made". All randomness has a fixed seed, so a data set is the same again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import sources

import nbmix
from nbmix.data.zheng import MIXTURES

SPARSE_TOTAL = 150.0  # median molecules a cell
DEEP_SIZE = 1e6  # molecules a cell, of which a gene of the simulation has up to 2,500
N_SUMS, N_CELLS_SUMMED = 400, 50
N_MANY = 50_000
DEPTH_RATIO = 8
RARE_SHARE = 0.01
READS_A_MOLECULE = 20.0

Source = Callable[[Path], ad.AnnData]
Change = Callable[[ad.AnnData, np.random.Generator], ad.AnnData]


class Kind(NamedTuple):
    """What is awkward, the number of components to look for, the source, and what is done to it."""

    what: str
    n_components: int
    source: Source
    change: Change = lambda adata, rng: adata


def write(name: str, data_dir: Path, path: Path) -> None:
    """Make a data set and write it as .h5ad; nothing where the file that it is made from is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = KINDS[name]
    try:
        adata = kind.change(kind.source(data_dir), np.random.default_rng(0))
    except FileNotFoundError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return
    part = path.with_suffix(".part")  # an interrupted one leaves no file that looks whole
    adata.write_h5ad(part)
    part.replace(path)


# From what they are made


def simulated(n_cells: int, n_genes: int, size: float) -> Source:
    """Four components of the model, all cells of one depth."""

    def draw(data_dir: Path) -> ad.AnnData:
        drawn = nbmix.simulate(n_cells, n_genes, 4, size, seed=1)
        return labelled(drawn.counts, np.char.add("component", drawn.labels.astype(str)))

    return draw


def real(data_dir: Path, file: str) -> ad.AnnData:
    """Counts and obs["cell_type"] of a file, without the rest."""
    adata = ad.read_h5ad(data_dir / f"{file}.h5ad")
    return labelled(adata.X.tocsr(), adata.obs["cell_type"].astype(str).to_numpy())


def mix4(data_dir: Path) -> ad.AnnData:
    """Four sorted populations of blood cells."""
    adata = real(data_dir, "pbmc_facs")
    return adata[adata.obs["cell_type"].isin(MIXTURES["mix4"])].copy()


def labelled(counts: sp.csr_matrix, labels: np.ndarray, **obs: np.ndarray) -> ad.AnnData:
    """(cells, genes) counts with new names."""
    index = pd.Index([f"cell{i}" for i in range(counts.shape[0])])
    var = pd.DataFrame(index=[f"gene{j}" for j in range(counts.shape[1])])
    frame = pd.DataFrame({"cell_type": pd.Categorical(labels), **obs}, index=index)
    return ad.AnnData(sp.csr_matrix(counts, dtype=np.float32), obs=frame, var=var)


def with_counts(adata: ad.AnnData, counts: sp.csr_matrix, **obs: np.ndarray) -> ad.AnnData:
    """Other counts for the same cells."""
    return labelled(counts, adata.obs["cell_type"].to_numpy(), **obs)


def many(data_dir: Path) -> ad.AnnData:
    """N_MANY cells of the ten sorted populations, each the sum of two half-thinned cells of one of them."""
    data = sources.large_counts(data_dir / "pbmc_facs.h5ad", N_MANY)
    assert data.labels is not None
    return labelled(data.counts, data.labels)


# What is done to them


def thinned(adata: ad.AnnData, share: float | np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    """Counts of which every molecule is kept with the probability ``share`` of its cell."""
    counts = adata.X.tocsr().copy()
    of_entry = np.repeat(np.broadcast_to(share, counts.shape[0]), np.diff(counts.indptr))
    counts.data = rng.binomial(counts.data.astype(np.int64), of_entry).astype(np.float32)
    counts.eliminate_zeros()
    return counts


def median_total(adata: ad.AnnData) -> float:
    """Molecules of the typical cell."""
    return float(np.median(np.asarray(adata.X.sum(1)).ravel()))


def some(adata: ad.AnnData, rng: np.random.Generator, *, n_cells: int) -> ad.AnnData:
    """A random subset of the cells."""
    return adata[np.sort(rng.choice(adata.n_obs, n_cells, replace=False))].copy()


def sparse(adata: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    """Thinned to a median total of SPARSE_TOTAL."""
    return with_counts(adata, thinned(adata, SPARSE_TOTAL / median_total(adata), rng))


def deep(adata: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    """Each cell the sum of N_CELLS_SUMMED of one population: totals of 75,000, counts up to thousands."""
    codes = adata.obs["cell_type"].cat.codes.to_numpy()
    chosen = np.sort(rng.choice(codes, N_SUMS))
    parents = np.stack([rng.choice(np.flatnonzero(codes == k), N_CELLS_SUMMED) for k in chosen])
    chooser = sp.csr_matrix(
        (np.ones(parents.size), parents.ravel(), np.arange(N_SUMS + 1) * N_CELLS_SUMMED),
        shape=(N_SUMS, adata.n_obs),
    )
    return labelled(chooser @ adata.X, adata.obs["cell_type"].cat.categories.to_numpy()[chosen])


def two_depths(adata: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    """Half of the cells, whatever their kind, are DEPTH_RATIO times as shallow: obs["batch"]."""
    shallow = rng.random(adata.n_obs) < 0.5
    counts = thinned(adata, np.where(shallow, 1 / DEPTH_RATIO, 1.0), rng)
    return with_counts(adata, counts, batch=np.where(shallow, "shallow", "deep"))


def rare(adata: ad.AnnData, rng: np.random.Generator, *, label: str) -> ad.AnnData:
    """So few cells of ``label`` that they are RARE_SHARE of all."""
    is_rare = (adata.obs["cell_type"] == label).to_numpy()
    n_kept = round(RARE_SHARE / (1 - RARE_SHARE) * np.sum(~is_rare))
    kept = np.concatenate(
        [np.flatnonzero(~is_rare), rng.choice(np.flatnonzero(is_rare), n_kept, replace=False)]
    )
    return adata[np.sort(kept)].copy()


def twice(adata: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    """Every cell two times, under two names."""
    return _rows(adata, np.tile(np.arange(adata.n_obs), 2))


def some_copies(adata: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    """A tenth of the cells six times."""
    copied = rng.choice(adata.n_obs, adata.n_obs // 10, replace=False)
    return _rows(adata, np.concatenate([np.arange(adata.n_obs), np.tile(copied, 5)]))


def _rows(adata: ad.AnnData, rows: np.ndarray) -> ad.AnnData:
    return labelled(adata.X.tocsr()[rows], adata.obs["cell_type"].to_numpy()[rows])


def many_genes(adata: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    """20,000 genes more without a count, and 20,000 with one count each."""
    entries = (np.ones(20_000), (rng.integers(0, adata.n_obs, 20_000), np.arange(20_000)))
    single = sp.csr_matrix(entries, shape=(adata.n_obs, 20_000))
    silent = sp.csr_matrix((adata.n_obs, 20_000))
    return with_counts(adata, sp.hstack([adata.X, single, silent], format="csr"))


def some_empty(adata: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    """A twentieth of the cells without a count, and a twentieth with about ten."""
    share = np.ones(adata.n_obs)
    rng.permutation(adata.n_obs)  # whose beginning a run of seed 0 holds out
    few = rng.permutation(adata.n_obs)
    twentieth = adata.n_obs // 20
    share[few[:twentieth]] = 0
    share[few[twentieth : 2 * twentieth]] = 10 / median_total(adata)
    return with_counts(adata, thinned(adata, share, rng))


def reads(adata: ad.AnnData, rng: np.random.Generator) -> ad.AnnData:
    """Molecules that were amplified and not collapsed: each is a geometric number of reads."""
    counts = adata.X.tocsr().copy()
    molecules = counts.data.astype(np.int64)
    counts.data = (molecules + rng.negative_binomial(molecules, 1 / READS_A_MOLECULE)).astype(np.float32)
    return with_counts(adata, counts)


FIVE_LINES = partial(real, file="cellbench_5cl_celseq2")
THREE_LINES = partial(real, file="cellbench_3cl_dropseq")

KINDS = {
    "sparse-sim": Kind("simulated, totals of 150", 4, simulated(2000, 3000, SPARSE_TOTAL / 1.24)),
    "sparse-mix4": Kind("mix4 thinned to a median total of 150", 4, mix4, sparse),
    "deep-sim": Kind("simulated, counts up to thousands", 4, simulated(600, 2000, DEEP_SIZE)),
    "deep-mix4": Kind("sums of 50 cells of a kind, counts up to thousands", 4, mix4, deep),
    "few-200": Kind("200 cells of mix4", 4, mix4, partial(some, n_cells=200)),
    "few-60": Kind("60 cells of mix4", 4, mix4, partial(some, n_cells=60)),
    "few-60-3cl": Kind("60 cells of 3cl", 3, THREE_LINES, partial(some, n_cells=60)),
    "many-50000": Kind("50,000 cells, each from two of mix10", 10, many),
    "depths-mix4": Kind("half of mix4 8 times as shallow", 4, mix4, two_depths),
    "depths-5cl": Kind("half of 5cl 8 times as shallow", 5, FIVE_LINES, two_depths),
    "rare-mix4": Kind("mix4, 1 % monocytes", 4, mix4, partial(rare, label="cd14_monocytes")),
    "rare-t": Kind("mix4, 1 % regulatory T cells", 4, mix4, partial(rare, label="regulatory_t")),
    "rare-sim": Kind(
        "simulated, a component of 1 %", 4, simulated(1500, 1000, 5e3), partial(rare, label="component0")
    ),
    "surplus-mix4": Kind("mix4, twice as many components as kinds", 8, mix4),
    "surplus-3cl": Kind("3cl, twice as many components as kinds", 6, THREE_LINES),
    "surplus-sim": Kind("simulated, twice as many components as kinds", 8, simulated(500, 1000, 1e4)),
    "twice-mix4": Kind("every cell of mix4 twice", 4, mix4, twice),
    "copies-mix4": Kind("a tenth of mix4 six times", 4, mix4, some_copies),
    "genes-mix4": Kind("mix4, 20,000 silent genes and 20,000 of one count", 4, mix4, many_genes),
    "empty-mix4": Kind("mix4, 5 % without counts and 5 % with ten", 4, mix4, some_empty),
    "reads-mix4": Kind("mix4, amplified reads in the place of molecules", 4, mix4, reads),
}

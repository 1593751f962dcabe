"""Cells that the tutorials make for themselves, so that they run anywhere."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

MARKERS = {
    "T cells": ("CD3D", "CD3E", "IL7R", "TRAC", "LTB"),
    "monocytes": ("LYZ", "S100A8", "S100A9", "CD14", "FCN1"),
    "B cells": ("MS4A1", "CD79A", "CD79B", "TCL1A", "BANK1"),
    "NK cells": ("NKG7", "GNLY", "KLRD1", "PRF1", "KLRF1"),
}
SHARES = (0.4, 0.3, 0.2, 0.1)


def blood(
    n_cells: int = 800,
    n_genes: int = 800,
    *,
    median_counts: float = 1500,
    kinds: tuple[str, ...] = tuple(MARKERS),
    batch_sd: tuple[float, ...] = (0.0,),
    seed: int = 0,
) -> ad.AnnData:
    """Four kinds of blood cells, drawn from negative binomials around one common profile.

    A kind has its markers (20 times the common level) and 60 genes that differ a little. Cells differ in
    depth. Each batch multiplies every gene by a factor of its own, of all kinds alike.

    Args:
        n_cells, n_genes: how many.
        median_counts: molecules of the median cell.
        kinds: those that are there, of T cells, monocytes, B cells and NK cells.
        batch_sd: for each batch the standard deviation of its genes' log factors.
        seed: of the draw of cells. The kinds themselves are the same for every seed.
    """
    of_kinds, rng = np.random.default_rng(0), np.random.default_rng(seed)
    names = [gene for genes in MARKERS.values() for gene in genes]
    names += [f"GENE{number:04d}" for number in range(1, n_genes - len(names) + 1)]
    log_mean = np.tile(of_kinds.normal(0, 1.2, n_genes), (len(MARKERS), 1))  # (kinds, genes)
    log_mean[:, : sum(map(len, MARKERS.values()))] = -1.5
    inv_disp = np.exp(of_kinds.normal(1, 0.5, n_genes))
    for number, genes in enumerate(MARKERS.values()):
        log_mean[number, [names.index(gene) for gene in genes]] += 3
        log_mean[number, of_kinds.choice(np.arange(40, n_genes), 60, replace=False)] += of_kinds.normal(
            0, 0.8, 60
        )
    offsets = np.stack([of_kinds.normal(0, sd, n_genes) for sd in batch_sd])  # (batches, genes)
    of_cells = rng.choice(len(MARKERS), n_cells, p=SHARES)
    of_cells = of_cells[np.isin(np.array(list(MARKERS))[of_cells], kinds)]
    batch = rng.integers(len(batch_sd), size=len(of_cells))
    expected = np.exp(log_mean[of_cells] + offsets[batch])
    totals = median_counts * rng.lognormal(0, 0.35, len(of_cells))
    expected *= (totals / expected.sum(1))[:, None]
    counts = rng.poisson(rng.gamma(inv_disp, expected / inv_disp))
    obs = pd.DataFrame({"kind": pd.Categorical(np.array(list(MARKERS))[of_cells], list(kinds))})
    obs["batch"] = pd.Categorical(np.array([f"batch {b + 1}" for b in range(len(batch_sd))])[batch])
    obs.index = [f"cell{number}" for number in range(len(obs))]
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs, pd.DataFrame(index=names))


def write_cell_ranger(adata: ad.AnnData, folder: str | Path) -> None:
    """The three files that Cell Ranger writes: matrix, barcodes and features."""
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        scipy.io.mmwrite(file, adata.X.T.astype(int))
    features = [f"ENSG{n:011d}\t{name}\tGene Expression\n" for n, name in enumerate(adata.var_names)]
    for name, lines in (("features", features), ("barcodes", [f"{cell}\n" for cell in adata.obs_names])):
        with gzip.open(folder / f"{name}.tsv.gz", "wt") as file:
            file.writelines(lines)


def thinned(counts: sp.spmatrix, share: float, seed: int = 0) -> sp.csr_matrix:
    """Every molecule is kept with probability ``share``: what shallower sequencing would have seen."""
    counts = sp.csr_matrix(counts, copy=True)
    counts.data = np.random.default_rng(seed).binomial(counts.data.astype(int), share).astype(np.float32)
    counts.eliminate_zeros()
    return counts

"""The data that benchmarks measure on: large matrices built once and kept, and simulations.

As in ``common``, only the standard library is imported above the functions.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    import numpy as np
    import scipy.sparse as sp

    from nbmix.data.counts import CountData

BLOCK_CELLS = 4096


def large_path(arguments: argparse.Namespace) -> Path:
    """The cached file of the large matrix that ``arguments`` describe."""
    source = "simulated" if arguments.data is None else Path(arguments.data).stem
    return arguments.work / f"{source}-{arguments.cells}-{arguments.seed}.h5ad"


def ensure_large(arguments: argparse.Namespace) -> None:
    """Build the large matrix in a process of its own, unless its file is there. ``measure`` knows "build"."""
    path = large_path(arguments)
    if not path.exists() and "error" in (built := common.alone("build")):
        sys.exit(f"{path} could not be built: {built['error']}")


def build_large(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the file of ``large_path``."""
    began = time.perf_counter()
    data = large_counts(arguments.data, arguments.cells, arguments.seed)
    built = time.perf_counter()
    path = large_path(arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    # an interrupted build leaves no file that looks whole
    part = path.with_name(f"{path.name}.{os.getpid()}")
    write_counts(data, part)
    part.replace(path)
    return {
        "build_seconds": built - began,
        "write_seconds": time.perf_counter() - built,
        "nonzeros": data.counts.nnz,
    }


def read_large(arguments: argparse.Namespace) -> tuple[CountData, float]:
    """The large matrix, and the seconds that reading it took."""
    from nbmix.data.read import read_h5ad

    began = time.perf_counter()
    data = read_h5ad(large_path(arguments))
    return data, time.perf_counter() - began


def write_counts(data: CountData, path: Path) -> None:
    """An uncompressed .h5ad file with the labels in obs["cell_type"]."""
    import anndata as ad
    import pandas as pd

    obs = pd.DataFrame(index=data.cell_names)
    if data.labels is not None:
        obs["cell_type"] = pd.Categorical(data.labels)
    ad.AnnData(data.counts, obs=obs, var=pd.DataFrame(index=data.gene_names)).write_h5ad(path)


def large_counts(path: str | Path | None, n_cells: int = common.LARGE_CELLS, seed: int = 0) -> CountData:
    """A matrix of any number of cells that keeps the populations, genes and sparsity of a small one.

    A new cell is the sum of two cells of one population, each thinned binomially by half: its depth is that
    of a cell, and no two are the same. Populations are drawn in the proportions of the source.

    Args:
        path: .h5ad file with populations in obs["cell_type"]; None for a simulation of the size of
            pbmc_facs.
        n_cells: of the result.
        seed: of ``np.random.default_rng``.
    """
    import numpy as np
    import scipy.sparse as sp

    from nbmix.data.counts import CountData
    from nbmix.data.read import read_h5ad

    source = simulated(3774, 16791, 10, seed=seed) if path is None else read_h5ad(path)
    if source.labels is None:
        sys.exit(f'{path}: has no populations in obs["cell_type"]')
    generator = np.random.default_rng(seed)
    names, codes = np.unique(source.labels, return_inverse=True)
    sizes = np.bincount(codes)
    members, first = np.argsort(codes, kind="stable"), np.cumsum(sizes) - sizes
    drawn = generator.choice(sizes.size, n_cells, p=sizes / sizes.sum())  # (cells,) population
    parents = members[first[drawn] + generator.integers(0, sizes[drawn], (2, n_cells))]  # (2, cells)
    # as many as there can be: pages that are never written to take no memory
    most = int(np.diff(source.counts.indptr)[parents].sum())
    values, indices = np.empty(most, np.float32), np.empty(most, np.int32)
    indptr = np.zeros(n_cells + 1, np.int32 if most <= np.iinfo(np.int32).max else np.int64)
    for begin in range(0, n_cells, BLOCK_CELLS):
        rows = slice(begin, begin + BLOCK_CELLS)
        block = sum(halved(source.counts[parent[rows]], generator) for parent in parents)
        block.sort_indices()
        there = slice(int(indptr[begin]), int(indptr[begin]) + block.nnz)
        values[there], indices[there] = block.data, block.indices
        indptr[begin + 1 : begin + 1 + block.shape[0]] = there.start + block.indptr[1:]
    n_kept = int(indptr[-1])
    counts = sp.csr_matrix((values[:n_kept], indices[:n_kept], indptr), shape=(n_cells, source.n_genes))
    return CountData(
        counts,
        np.asarray(counts.sum(1, dtype=np.float64)).ravel(),
        np.char.add("cell", np.arange(n_cells).astype(str)),
        source.gene_names,
        labels=names[drawn],
    )


def halved(counts: sp.csr_matrix, generator: np.random.Generator) -> sp.csr_matrix:
    """``counts`` thinned binomially by half; changed in place."""
    import numpy as np

    # Binomial(x, 1/2) is the number of ones among x random bits
    bits = generator.integers(0, 2**64, counts.nnz, dtype=np.uint64)
    number = np.minimum(counts.data, 64).astype(np.uint64)
    kept = np.bitwise_count(bits >> (np.uint64(64) - number))
    deep = np.flatnonzero(counts.data > 64)
    more = generator.binomial(counts.data[deep].astype(np.int64) - 64, 0.5)
    counts.data = kept.astype(np.float32)
    counts.data[deep] += more
    counts.eliminate_zeros()
    return counts


def simulated(
    n_cells: int, n_genes: int, n_components: int, *, density: float = 0.043, seed: int = 0
) -> CountData:
    """Counts of the model at unequal depths, drawn without a dense matrix; ``density`` of them not 0.

    A negative binomial is a Poisson number -r ln(1 - w) of clusters with sizes of the logarithmic
    distribution in w = s mu / (r + s mu) (Quenouille 1949, Biometrics 5:162), and a thinned one is a
    negative binomial of a smaller size factor. Genes without a count are dropped.
    """
    import numpy as np
    import scipy.optimize
    import scipy.sparse as sp

    from nbmix.data.counts import CountData

    generator = np.random.default_rng(seed)
    inv_disp = np.exp(generator.uniform(0, 4, (n_components, n_genes)))
    mean = np.exp(generator.uniform(-6, 0, (n_components, n_genes)))
    share = np.clip(generator.lognormal(np.log(0.5), 0.4, n_cells), 0.05, 1)  # of the deepest cell's depth
    typical = np.quantile(share, np.linspace(0.05, 0.95, 10))[:, None, None]
    some = slice(None, None, max(1, n_genes // 500))

    def excess(log_scale: float) -> float:
        ratio = np.exp(log_scale) * typical * mean[:, some] / inv_disp[:, some]
        return float(np.mean(-np.expm1(-inv_disp[:, some] * np.log1p(ratio)))) - density

    mean *= np.exp(scipy.optimize.brentq(excess, -20, 20))
    codes = np.sort(generator.integers(0, n_components, n_cells))
    blocks = []
    for k in range(n_components):
        rows = np.flatnonzero(codes == k)
        if not rows.size:
            continue
        number = generator.poisson(rows.size * inv_disp[k] * np.log1p(mean[k] / inv_disp[k]))
        gene = np.repeat(np.arange(n_genes, dtype=np.int32), number)
        cell = generator.integers(0, rows.size, gene.size, dtype=np.int32)
        size = generator.logseries((mean[k] / (inv_disp[k] + mean[k]))[gene])
        kept = generator.binomial(size, share[rows][cell]).astype(np.float32)
        there = kept > 0
        entries = (kept[there], (cell[there], gene[there]))
        blocks.append(sp.csr_matrix(entries, shape=(rows.size, n_genes)))
    counts = sp.vstack(blocks, format="csr", dtype=np.float32)
    order = generator.permutation(n_cells)  # cells of a component need not lie together
    counts, codes = counts[order], codes[order]
    used = np.flatnonzero(np.bincount(counts.indices, minlength=n_genes))
    counts = counts[:, used]
    counts.sort_indices()
    return CountData(
        counts,
        np.asarray(counts.sum(1, dtype=np.float64)).ravel(),
        np.char.add("cell", np.arange(n_cells).astype(str)),
        np.char.add("gene", used.astype(str)),
        labels=np.char.add("component", codes.astype(str)),
    )


def describe(data: CountData) -> dict[str, Any]:
    """Size of a data set, for the record."""
    return {
        "n_cells": data.n_cells,
        "n_genes": data.n_genes,
        "nonzeros": int(data.counts.nnz),
        "density": data.counts.nnz / (data.n_cells * data.n_genes),
    }

"""What the notebooks share: the cells, the source's own settings, and its numbers beside ours."""
# ruff: noqa: E402  the filter below has to come before the imports that it is for

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's; no bar is shown here

import numpy as np
import pandas as pd
import pooch
import scipy.sparse as sp
import torch

from nbmix import component_log_likelihood
from nbmix.core.batch import Basis, CellBatch
from nbmix.core.expected_log_likelihood import curvature
from nbmix.core.parameters import Components, lowest_log_mean
from nbmix.core.settings import MixtureSettings
from nbmix.core.statistics import SufficientStatistics
from nbmix.data.counts import CountData
from nbmix.data.simulate import simulated_count_data
from nbmix.data.zheng import MIXTURES, ZHENG_URL, read_zheng
from nbmix.starts.base import StartState

pd.options.display.float_format = "{:.6g}".format  # one tiny number would turn a table into powers of ten

FACS = "pbmc_facs.h5ad"
CD74 = "ENSG00000019582"
SIMULATED_CELLS, SIMULATED_GENES = 600, 1000


class SourceFit(NamedTuple):
    """Components (K, genes) in logarithms, and responsibilities (cells, K): numpy, float64."""

    log_mean: np.ndarray
    log_inv_disp: np.ndarray
    responsibilities: np.ndarray


def source_em(
    counts: sp.csr_matrix,
    n_components: int,
    *,
    seed: int = 0,
    responsibilities: np.ndarray | None = None,
    iterations: int = 10,
    epochs: int = 50,
    lr: float = 1e-2,
) -> SourceFit:
    """The source's EM from its own random start, as its library does it (``mpebpm.gam_mix``).

    It draws uniform numbers with torch and divides each row by its sum; takes ln mu from them in closed form,
    as of a Poisson, and ln r = 0; moves both by RMSprop, begun anew in every M step, and sets
    q_i = softmax(l_i). The gradient is that of the same loss, from sums over cells instead of a dense tensor.
    The numbers are drawn on the CPU, so they are not those of the source's GPU.

    Args:
        counts: (cells, genes); row sums are the size factors.
        n_components: K.
        seed: of torch.
        responsibilities: (cells, K) to begin at instead.
        iterations, epochs, lr: of EM; of RMSprop in each M step; its rate.
    """
    s = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    basis = Basis.of(counts, s)
    cells = CellBatch.build(counts, s, basis)
    drawn = torch.rand(len(s), n_components, generator=torch.Generator().manual_seed(seed)).double()
    q = drawn / drawn.sum(1, keepdim=True) if responsibilities is None else torch.as_tensor(responsibilities)
    total = torch.from_numpy((counts.T.astype(np.float64) @ q.numpy()).T)  # (K, genes)
    mean = total / (q.T @ torch.from_numpy(s)).clamp(min=1)[:, None]  # a component without cells has none
    log_mean = mean.log().clamp(min=lowest_log_mean(s.sum())).requires_grad_()
    log_inv_disp = torch.zeros_like(log_mean).requires_grad_()
    for _ in range(iterations):
        statistics = SufficientStatistics.collect(cells, basis, q, torch.float64)
        optimizer = torch.optim.RMSprop([log_mean, log_inv_disp], lr=lr)
        for _ in range(epochs):
            now = curvature(statistics, basis, Components(log_mean.detach(), log_inv_disp.detach()))
            log_mean.grad, log_inv_disp.grad = -now.grad_a / q.numel(), -now.grad_b / q.numel()
            optimizer.step()
        found = log_mean.detach().numpy(), log_inv_disp.detach().numpy()
        q = torch.softmax(component_log_likelihood(counts, s, *found), dim=1)
    return SourceFit(*found, q.numpy())


@dataclass(frozen=True)
class KnownStart:
    """Begin where something that was fitted before has ended."""

    state: StartState

    def __call__(
        self, data: CountData, settings: MixtureSettings, generator: np.random.Generator
    ) -> StartState:
        return self.state


def sorted_cells(
    mixture: str, n_cells: int | None = None, each: int | None = None, seed: int = 0
) -> CountData:
    """Sorted blood cells of Zheng et al. (2017), or simulated ones with their labels where there are none.

    They come from the first that is there: the file that the environment variable NBMIX_PBMC_FACS names,
    shared/data/pbmc_facs.h5ad beside the clone, archives that nbmix has downloaded for this user.

    Args:
        mixture: "mix2", "mix4" or "mix10".
        n_cells: drawn at random, at most; default all.
        each: cells of every population, drawn at random.
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
    else:
        origin = "SIMULATED: no number below is of the sorted cells (NBMIX_PBMC_FACS names their file)"
        data = _simulated(populations, seed)
    generator = np.random.default_rng(seed)
    if each is not None:
        of_label = [np.flatnonzero(data.labels == label) for label in np.unique(data.labels)]
        rows = np.concatenate([generator.choice(places, each, replace=False) for places in of_label])
    elif n_cells is not None and n_cells < data.n_cells:
        rows = generator.choice(data.n_cells, n_cells, replace=False)
    else:
        rows = np.arange(data.n_cells)
    data = data.select_cells(np.sort(rows))
    data = data.select_genes(np.flatnonzero(data.counts.sum(axis=0)))
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


def _simulated(populations: tuple[str, ...], seed: int) -> CountData:
    data = simulated_count_data(SIMULATED_CELLS, SIMULATED_GENES, len(populations), seed=seed)
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

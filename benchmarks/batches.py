"""Cells of several batches: kinds that are found with the batches known, and beside other methods.

    python benchmarks/batches.py --data-dir DATA --json batches.json
    python benchmarks/batches.py --data-dir DATA --json batches.json --data protocols two --seeds 0 1
    python benchmarks/batches.py --json batches.json

DATA holds cellbench_5cl_celseq2.h5ad and cellbench_3cl_dropseq.h5ad (cell lines, told apart by their
genotype; Tian et al. 2019) and pbmc_facs.h5ad, of which mix4 takes four sorted populations (Zheng et al.
2017). A data set whose file is missing is skipped. Without --data-dir nothing is run, and the table is of
the JSON file.

"protocols" are the two sets of cell lines with the genes that both have: five lines, three of which are in
both. The others are cells of mix4 whose batches are drawn by lot. In all batches but the first a molecule of
gene j is kept with the probability min(1, e_j / 2), ln e_j ~ N(0, sd^2), drawn anew for each batch: so a
batch has other efficiencies, and half the depth. "none" changes nothing: there is nothing to correct. "same"
are the cells of "two" where all genes of the second batch are caught with half the efficiency: what there is
to find in these cells without offsets. "donors" are 10,000 simulated cells of four kinds from 200 donors.

All methods see the same cells and the true number of kinds, and none the labels. ``nbmix`` is a fit as
train.py makes it, of all cells, with data.batch_key; ``unaware`` is the same without; ``amortized``,
``vaec`` and ``gmvae``, which --methods can name, are those models with data.batch_key. The others are
normalised to the median total, ln(1 + x), 50 PCs, 15 neighbours, and Leiden at the resolution that gives the
true number: ``leiden`` of these, ``harmony`` of PCs corrected by harmonypy, ``combat`` of values corrected by
scanpy's ComBat, ``scvi`` of the latent means of scVI with that batch key and its defaults, on raw counts.

    ARI       with the kinds: mean over seeds, and the lowest
    batch     ARI with the batches
    unseen    log likelihood a cell in the last iteration, by components that have not seen it, nats
    CPU s     of one thread, from the file to the clusters, after a warm-up; the mean

Every run is added to the JSON file when it ends, and runs that it holds are not repeated.
"""

from __future__ import annotations

import os

# before anything starts threads
os.environ.update({f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMBA")})

import argparse
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import common
import made
import numpy as np
import scipy.sparse as sp
import torch
from sklearn.metrics import adjusted_rand_score

import nbmix
from nbmix.evaluation.baselines import leiden
from nbmix.evaluation.baselines.base import require

KEYS = ("data", "method", "seed")  # of a run
METHODS = ("nbmix", "unaware", "leiden", "harmony", "combat", "scvi")  # without --methods
MODELS = ("amortized", "vaec", "gmvae")  # by minibatches; each with data.batch_key
N_CELLS = 800  # of mix4 where batches differ


class DataSet(NamedTuple):
    """What the table calls it, the number of kinds, and how it is drawn."""

    title: str
    n_components: int
    draw: Callable[[Path, np.random.Generator], ad.AnnData]


def four_simulated(_: Path) -> ad.AnnData:
    """10,000 cells of four kinds by the source's simulation, 2,000 counts each."""
    drawn = nbmix.simulate(n=10_000, p=2_000, k=4, s=2_000.0, seed=1)
    return made.labelled(drawn.counts, drawn.labels.astype(str))


class Efficiencies(NamedTuple):
    """Batches of mix4, or of other cells.

    Attributes:
        n_batches: that cells are dealt to.
        n_cells: in all; 0: those that there are.
        spread: sd of ln efficiency of a gene in all batches but the first.
        first: share of the cells in the first batch; 0: as many as in the others.
        missing: kind that is not in the second batch.
        changes: false: batches are names alone.
        cells: the cells.
    """

    n_batches: int = 2
    n_cells: int = N_CELLS
    spread: float = 0.6
    first: float = 0.0
    missing: str = ""
    changes: bool = True
    cells: Callable[[Path], ad.AnnData] = made.mix4

    def __call__(self, data_dir: Path, rng: np.random.Generator) -> ad.AnnData:
        adata = self.cells(data_dir)
        if self.n_cells:
            adata = made.some(adata, rng, n_cells=self.n_cells)
        shares = np.full(self.n_batches, 1 / self.n_batches)
        if self.first:
            shares[0], shares[1:] = self.first, (1 - self.first) / (self.n_batches - 1)
        batch = rng.choice(self.n_batches, adata.n_obs, p=shares)
        counts = adata.X.tocsr().copy()
        if self.changes:
            kept = np.exp(rng.normal(0, self.spread, (self.n_batches, adata.n_vars))) / 2
            kept[0] = 1.0
            of_entry = np.repeat(batch, np.diff(counts.indptr))
            share = np.minimum(kept[of_entry, counts.indices], 1.0)
            counts.data = rng.binomial(counts.data.astype(np.int64), share).astype(np.float32)
            counts.eliminate_zeros()
        found = made.with_counts(adata, counts, batch=np.char.add("batch", batch.astype(str)))
        gone = (found.obs["cell_type"] == self.missing) & (found.obs["batch"] == "batch1")
        return found[~gone.to_numpy()].copy()


def protocols(data_dir: Path, rng: np.random.Generator) -> ad.AnnData:
    """Five cell lines by CEL-seq2, three of them by Drop-seq too."""
    parts = [
        ad.read_h5ad(data_dir / f"{name}.h5ad") for name in ("cellbench_5cl_celseq2", "cellbench_3cl_dropseq")
    ]
    genes = parts[0].var_names.intersection(parts[1].var_names)
    counts = sp.vstack([part[:, genes].X for part in parts]).tocsr()
    kinds = np.concatenate([part.obs["cell_type"].astype(str) for part in parts])
    return made.labelled(
        counts, kinds, batch=np.repeat(["celseq2", "dropseq"], [part.n_obs for part in parts])
    )


DATA = {
    "protocols": DataSet("5 lines by CEL-seq2, 3 by Drop-seq", 5, protocols),
    "weak": DataSet("mix4, 2 batches, sd 0.3", 4, Efficiencies(spread=0.3)),
    "two": DataSet("mix4, 2 batches, sd 0.6", 4, Efficiencies()),
    "same": DataSet("the same cells, one batch at half the depth, no offsets", 4, Efficiencies(spread=0)),
    "strong": DataSet("mix4, 2 batches, sd 1", 4, Efficiencies(spread=1.0)),
    "unbalanced": DataSet("mix4, 2 batches, 85 : 15", 4, Efficiencies(first=0.85)),
    "missing": DataSet("mix4, monocytes in one batch alone", 4, Efficiencies(missing="cd14_monocytes")),
    "ten": DataSet("mix4, 10 batches", 4, Efficiencies(10, 0)),
    "none": DataSet("mix4, 2 names, nothing to correct", 4, Efficiencies(2, 0, changes=False)),
    "none20": DataSet("mix4, 20 names, nothing to correct", 4, Efficiencies(20, 0, changes=False)),
    "thirty": DataSet("mix4, 30 donors of 50 cells", 4, Efficiencies(30, 0)),
    "donors": DataSet(
        "simulated, 200 donors of 50 cells, sd 0.3", 4, Efficiencies(200, 0, 0.3, cells=four_simulated)
    ),
}


# One run


def measure(method: str, path: Path, n_components: int, seed: int) -> dict[str, Any]:
    """Scores and seconds of one method on the cells of a file."""
    clock = common.Clock()

    def work(folder: str) -> dict[str, Any]:
        if method in ("nbmix", "unaware", *MODELS):
            groups, unseen = ours(method, path, n_components, seed, folder, clock)
        else:
            groups, unseen = peer(method, path, n_components, seed, clock), None
        obs = ad.read_h5ad(path).obs
        return {
            "ari": adjusted_rand_score(obs["cell_type"], groups),
            "batch_ari": adjusted_rand_score(obs["batch"], groups),
            "unseen": unseen,
            "cpu_seconds": clock.cpu_seconds("run"),
        }

    return common.watched(work)


def ours(
    method: str, path: Path, n_components: int, seed: int, folder: str, clock: common.Clock
) -> tuple[np.ndarray, float | None]:
    settings = ["data=h5ad", f"data.path={path}", "data.validation_share=0", f"seed={seed}"]
    settings += [f"model.n_components={n_components}"]
    if method != "unaware":
        settings.append("data.batch_key=batch")
    if method in MODELS:
        settings.append(f"model={method}")
    results = common.fitted(common.configure(settings, folder), clock)
    # an ELBO is of cells that have been seen
    return results.assignments, None if method in MODELS else results.model.objective[-1]


def peer(method: str, path: Path, n_components: int, seed: int, clock: common.Clock) -> np.ndarray:
    sc = require("scanpy", "igraph", "leidenalg")
    with clock("run"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = ad.read_h5ad(path)
        adata = adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()
        if method == "scvi":
            return scvi_groups(adata, n_components, seed)
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
        if method == "combat":
            sc.pp.combat(adata, "batch")
        sc.pp.pca(adata, n_comps=leiden.N_PCS, random_state=seed)
        if method == "harmony":
            import harmonypy

            found = harmonypy.run_harmony(
                adata.obsm["X_pca"].astype(np.float64), adata.obs, "batch", random_state=seed, verbose=False
            ).Z_corr
            adata.obsm["X_pca"] = found if found.shape[0] == adata.n_obs else found.T
        sc.pp.neighbors(adata, n_neighbors=leiden.N_NEIGHBORS, use_rep="X_pca", random_state=seed)
        graph = leiden.NeighborGraph(adata.obsm["X_pca"], adata.obsp["connectivities"].tocsr())
        return leiden.leiden_with(graph, n_components, seed).codes


def scvi_groups(adata: ad.AnnData, n_components: int, seed: int) -> np.ndarray:
    sc, scvi = require("scanpy", "igraph", "leidenalg"), require("scvi")
    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata)
    model.train(accelerator="cpu", enable_progress_bar=False)
    latent = model.get_latent_representation()
    adata.obsm["X_scvi"] = latent
    sc.pp.neighbors(adata, n_neighbors=leiden.N_NEIGHBORS, use_rep="X_scvi", random_state=seed)
    graph = leiden.NeighborGraph(latent, adata.obsp["connectivities"].tocsr())
    return leiden.leiden_with(graph, n_components, seed).codes


# All of them


def run_all(record: common.Record, arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for name in arguments.data:
                wanted = [m for m in arguments.methods if not record.holds(name, m, seed)]
                if not wanted:
                    continue
                data = DATA[name]
                try:
                    adata = data.draw(Path(arguments.data_dir), np.random.default_rng(seed))
                except FileNotFoundError as error:
                    print(f"{name} is skipped: {error}", file=sys.stderr)
                    continue
                path = Path(folder) / f"{name}{seed}.h5ad"
                adata.write_h5ad(path)
                for method in wanted:
                    found = measure(method, path, data.n_components, seed)
                    row = {"data": name, "method": method, "seed": seed, "code": common.code_state()} | found
                    record.add(row)
                    said = found.get("error") or f"ARI {found['ari']:.3f}, CPU {found['cpu_seconds']:.0f} s"
                    print(f"{name}, {method}, seed {seed}: {said}", flush=True)


def warm_up(methods: Iterable[str]) -> None:
    """Compile and load what the methods use, on a few cells."""
    drawn = nbmix.simulate(n=120, p=100, k=2, seed=1)
    adata = made.labelled(drawn.counts, drawn.labels.astype(str), batch=np.tile(["a", "b"], 60))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "warm.h5ad"
        adata.write_h5ad(path)
        for method in methods:
            measure(method, path, 2, 0)


def show(rows: Sequence[dict[str, Any]], names: Sequence[str], methods: Sequence[str]) -> None:
    """A table of all data sets and methods that were measured."""
    lines = []
    for name in names:
        for method in methods:
            found = [r for r in rows if (r["data"], r["method"]) == (name, method) and "error" not in r]
            if not found:
                continue
            ari, batch, seconds = ([r[key] for r in found] for key in ("ari", "batch_ari", "cpu_seconds"))
            unseen = [r["unseen"] for r in found if r["unseen"] is not None]
            lines.append(
                (
                    DATA[name].title,
                    method,
                    len(found),
                    f"{statistics.mean(ari):.3f}",
                    f"{min(ari):.3f}",
                    f"{statistics.mean(batch):.3f}",
                    f"{statistics.mean(unseen):.2f}" if unseen else None,
                    f"{statistics.mean(seconds):.0f}",
                )
            )
    columns = ("cells", "method", "seeds", "ARI", "lowest", "batch", "unseen", "CPU s")
    shown = [r for r in rows if r["data"] in names and r["method"] in methods]
    notes = common.remarks(shown, lambda row: f"{row['data']} seed {row['seed']}")
    common.show("Cells of several batches", columns, lines, notes)
    common.say_states(shown)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="folder of the .h5ad files; without it nothing is run")
    parser.add_argument("--json", type=Path, help="file of the runs")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), metavar="NAME")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS + MODELS, default=list(METHODS), metavar="NAME"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    record = common.Record(arguments.json, KEYS)
    if arguments.data_dir:
        warm_up(arguments.methods)
        run_all(record, arguments)
    show(record.rows, arguments.data, arguments.methods)


if __name__ == "__main__":
    main()

"""Cells that fit no group: kinds that were left out of the fit, and doublets, beside other scores for them.

    python benchmarks/doubt.py --data-dir DATA --json doubt.json --seeds 0 1 2
    python benchmarks/doubt.py --data-dir DATA --json doubt.json --cases monocytes --models em amortized

A case has several kinds of cells, one of which is left out. A fit with as many groups as there are other
kinds sees four fifths of their cells. Then cells are judged that it has not seen: the other fifth ("own"),
the kind that was left out ("foreign"), and as many sums of two own cells of different kinds ("doublets").
Simulated cells are negative binomials; with a programme a tenth of the genes rise and fall together within
all kinds. Sorted cells are in DATA, see gaps.py; labels of pbmc3k are somebody's clusters.

    own, fitted     share of own cells, and of the fitted ones, that fit no group by nbmix's rule
    foreign         share of foreign cells that do; likewise doublets
    at 1 %          the same where each score calls 1 % of the own cells. The scores: "misfit", nbmix's;
                    "own ll", ln p of the cell, less its group's least squares on ln s and (ln s)^2, over
                    the group's sd; "kNN", the distance to the 15th neighbour among fitted cells; "GMM", the
                    density of a Gaussian mixture with a component a kind, both on 20 principal components
                    of ln(1 + counts per 10^4)
    ambiguous       share of own cells with a margin below ln 9, and the share of cells not in their kind's
                    group, among these and among the others

Labels choose the cells and score them. Every run is added to the JSON file when it ends, and not repeated.
"""

from __future__ import annotations

import os

# before anything starts threads
os.environ.update({f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMBA")})

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import common
import made
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors

from nbmix.data.counts import CountData
from nbmix.data.from_anndata import make_count_data
from nbmix.evaluation.metrics import match_cells
from nbmix.output.results import Results
from nbmix.training.predict import doubt_here, predict_here, restore_for
from nbmix.training.saved_fit import checkpoint_of

KEYS = ("case", "model", "seed")  # of a run
SHARE_FITTED, N_NEIGHBOURS, N_DIMENSIONS, LEVEL = 0.8, 15, 20, 0.01
SCORES = ("misfit", "own ll", "kNN", "GMM")
SEVEN = ("b_cells", "cd14_monocytes", "cd56_nk", "cytotoxic_t", "regulatory_t", "naive_t", "memory_t")


class Simulated(NamedTuple):
    """Of ln means: the standard deviation between kinds in a tenth of the genes, and of the programme."""

    fold_change: float = 1.0
    programme: float = 0.0
    depth: int = 2000
    n_cells: int = 1500
    n_genes: int = 3000
    n_kinds: int = 5

    def draw(self, data_dir: Path, rng: np.random.Generator) -> ad.AnnData:
        n = self.n_genes
        base, inv_disp = rng.normal(0, 1.5, n), np.exp(rng.normal(1.0, 0.7, n))
        change = rng.normal(0, self.fold_change, (self.n_kinds, n)) * (rng.random((self.n_kinds, n)) < 0.1)
        loads = rng.normal(0, self.programme, n) * (rng.random(n) < 0.1)
        kinds = np.sort(rng.integers(self.n_kinds, size=self.n_cells))
        relative = np.exp(base + change[kinds] + loads * rng.normal(size=(self.n_cells, 1)))
        sizes = self.depth * rng.lognormal(0, 0.4, (self.n_cells, 1))
        mean = sizes * relative / relative.sum(1, keepdims=True)
        counts = rng.poisson(mean * rng.gamma(inv_disp, size=mean.shape) / inv_disp)
        names = np.char.add("kind", kinds.astype(str))
        return made.labelled(sp.csr_matrix(counts.astype(np.float32)), names)


class Sorted(NamedTuple):
    """Kinds of a file; () for all."""

    file: str
    kinds: tuple[str, ...] = ()

    def draw(self, data_dir: Path, rng: np.random.Generator) -> ad.AnnData:
        cells = made.real(data_dir, self.file)
        return cells[cells.obs["cell_type"].isin(self.kinds)].copy() if self.kinds else cells


CASES: dict[str, tuple[Simulated | Sorted, str]] = {
    "kinds": (Simulated(), "kind0"),
    "weak kinds": (Simulated(fold_change=0.5), "kind0"),
    "kinds, programme": (Simulated(programme=0.5), "kind0"),
    "kinds, 500 counts": (Simulated(depth=500), "kind0"),
    "monocytes": (Sorted("pbmc_facs", SEVEN), "cd14_monocytes"),
    "B cells": (Sorted("pbmc_facs", SEVEN), "b_cells"),
    "cytotoxic T": (Sorted("pbmc_facs", SEVEN), "cytotoxic_t"),
    "NK cells": (Sorted("pbmc_facs", SEVEN), "cd56_nk"),
    "5 lines, A549": (Sorted("cellbench_5cl_celseq2"), "A549"),
    "pbmc3k, B": (Sorted("pbmc3k_annot"), "B"),
}


class Cells(NamedTuple):
    """Of a case: what is fitted, and what is judged then by name; the labels of "own"."""

    fitted: ad.AnnData
    judged: dict[str, sp.csr_matrix]
    labels: np.ndarray


def divide(cells: ad.AnnData, foreign: str, rng: np.random.Generator) -> Cells:
    labels, counts = cells.obs["cell_type"].astype(str).to_numpy(), cells.X.tocsr()
    own = rng.permutation(np.flatnonzero(labels != foreign))
    n_fitted = round(SHARE_FITTED * own.size)
    fitted, own = np.sort(own[:n_fitted]), np.sort(own[n_fitted:])
    pairs = rng.choice(own, (2, 8 * own.size))
    pairs = pairs[:, labels[pairs[0]] != labels[pairs[1]]][:, : own.size]
    judged = {
        "own": counts[own],
        "foreign": counts[labels == foreign],
        "doublets": counts[pairs[0]] + counts[pairs[1]],
    }
    return Cells(cells[fitted].copy(), judged, labels[own])


# Scores: the higher, the less a cell fits


def by_fit(results: Results, judged: dict[str, Any], names: pd.Index) -> dict[str, Any]:
    """Doubt of cells that were not fitted, and by "own ll"."""
    data = results.data.data
    of_fit = group_regressions(results.assignments, results.cells.log_likelihood.numpy(), data)
    found: dict[str, Any] = {}
    for name, counts in judged.items():
        new = make_count_data(ad.AnnData(counts, var=pd.DataFrame(index=names)), where=name, min_counts=0)
        model, cells = restore_for(checkpoint_of(results.model, results.data), new, name)
        groups = results.model.groups
        said = predict_here(model, cells)
        q = np.stack([said.responsibilities.numpy()[:, list(group)].sum(1) for group in groups], 1)
        misses = below_regressions(q.argmax(1), said.log_likelihood.numpy(), cells, of_fit)
        found[name] = {"doubt": doubt_here(model, cells, said), "q": q, "own ll": misses}
    return found


def on_depth(data: CountData) -> np.ndarray:
    """(cells, 3)"""
    log_size = np.log(np.maximum(data.size_factors, 1))
    return np.stack([np.ones_like(log_size), log_size, log_size**2], 1)


def group_regressions(groups: np.ndarray, values: np.ndarray, data: CountData) -> dict[int, Any]:
    """Coefficients and sd of each group with cells."""
    design = on_depth(data)
    found = {}
    for group in np.unique(groups):
        rows = groups == group
        effect = np.linalg.lstsq(design[rows], values[rows], rcond=None)[0]
        found[int(group)] = effect, float((values[rows] - design[rows] @ effect).std()) + 1e-9
    return found


def below_regressions(
    groups: np.ndarray, values: np.ndarray, data: CountData, of_fit: dict[int, Any]
) -> np.ndarray:
    design, found = on_depth(data), np.zeros(len(values))
    for group, (effect, sd) in of_fit.items():
        rows = groups == group
        found[rows] = (design[rows] @ effect - values[rows]) / sd
    return found


def by_distance(fitted: sp.csr_matrix, judged: dict[str, Any], n_kinds: int, seed: int) -> dict[str, Any]:
    """kNN and GMM."""

    def logs(counts: sp.csr_matrix) -> sp.csr_matrix:
        totals = np.asarray(counts.sum(1)).ravel()
        return (sp.diags_array(1e4 / np.maximum(totals, 1)) @ counts).log1p().tocsr()

    seen = logs(fitted)
    variance = np.asarray(seen.power(2).mean(0)).ravel() - np.asarray(seen.mean(0)).ravel() ** 2
    genes = np.argsort(-variance)[:2000]
    pca = PCA(N_DIMENSIONS, random_state=seed).fit(seen[:, genes].toarray())
    places = pca.transform(seen[:, genes].toarray())
    neighbours = NearestNeighbors(n_neighbors=N_NEIGHBOURS).fit(places)
    density = GaussianMixture(n_kinds, random_state=seed, reg_covar=1e-3).fit(places)
    found = {}
    for name, counts in judged.items():
        there = pca.transform(logs(counts)[:, genes].toarray())
        found[name] = {"kNN": neighbours.kneighbors(there)[0][:, -1], "GMM": -density.score_samples(there)}
    return found


# One run


def measure(case: str, model: str, seed: int, data_dir: Path, folder: str) -> dict[str, Any]:
    source, foreign = CASES[case]
    rng = np.random.default_rng(seed)
    drawn = source.draw(data_dir, rng)
    cells = divide(drawn, foreign, rng)
    n_kinds = len(np.unique(cells.labels))
    path = Path(folder) / "cells.h5ad"
    cells.fitted.write_h5ad(path)
    of_data = ("data=h5ad", f"data.path={path}", "data.label_key=null", "data.validation_share=0")
    settings = (*of_data, f"model={model}", f"model.n_components={n_kinds}", f"seed={seed}")
    began = time.process_time()
    results = common.fitted(common.configure(settings, folder), common.Clock())
    fit_seconds, began = time.process_time() - began, time.process_time()
    of_fitted = results.doubt
    doubt_seconds = time.process_time() - began
    found = by_fit(results, cells.judged, cells.fitted.var_names)
    far = by_distance(cells.fitted.X.tocsr(), cells.judged, n_kinds, seed)
    scores = {
        name: {"misfit": f["doubt"].misfit, "own ll": f["own ll"], **far[name]} for name, f in found.items()
    }
    row: dict[str, Any] = {"fitted": float(of_fitted.fits_no_group.mean())}
    row |= {name: float(f["doubt"].fits_no_group.mean()) for name, f in found.items()}
    for score in SCORES:
        limit = np.quantile(scores["own"][score], 1 - LEVEL)
        row |= {f"{score}: {n}": float((scores[n][score] > limit).mean()) for n in ("foreign", "doublets")}
    unsure = found["own"]["doubt"].is_ambiguous
    wrong = ~match_cells(cells.labels, found["own"]["q"]).correct
    row["ambiguous"] = float(unsure.mean())
    row["wrong if ambiguous"] = float(wrong[unsure].mean()) if unsure.any() else None
    row["wrong if not"] = float(wrong[~unsure].mean()) if (~unsure).any() else None
    row["ambiguous doublets"] = float(found["doublets"]["doubt"].is_ambiguous.mean())
    counted = {f"n {name}": counts.shape[0] for name, counts in cells.judged.items()}
    return row | counted | {"fit_seconds": fit_seconds, "doubt_seconds": doubt_seconds}


def show(record: common.Record) -> None:
    """Means over seeds."""

    def mean(rows: list[dict[str, Any]], name: str) -> Any:
        values = [row[name] for row in rows if row.get(name) is not None]
        return 100 * statistics.mean(values) if values else None

    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in record.rows:
        if "error" not in row:
            runs.setdefault((row["case"], row["model"]), []).append(row)
    named = [
        (f"{case}{'' if model == 'em' else f' ({model})'}", rows) for (case, model), rows in runs.items()
    ]
    rules = ("own", "fitted", "foreign", "doublets", "ambiguous", "wrong if ambiguous", "wrong if not")
    common.show(
        "nbmix's rules, % of cells, means over seeds",
        ("", "seeds", *rules),
        [[title, len(rows), *(mean(rows, name) for name in rules)] for title, rows in named],
    )
    for kind in ("foreign", "doublets"):
        common.show(
            f"{kind} found at 1 % false alarms, %",
            ("", *SCORES),
            [[title, *(mean(rows, f"{score}: {kind}") for score in SCORES)] for title, rows in named],
        )
    for line in common.remarks(
        [row | {"method": row["model"]} for row in record.rows], lambda row: f"{row['case']} {row['seed']}"
    ):
        print(line)
    common.say_states(record.rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, metavar="DATA", help="a folder with the files of the cases")
    parser.add_argument("--cases", nargs="*", choices=tuple(CASES), default=tuple(CASES), metavar="CASE")
    parser.add_argument("--models", nargs="*", choices=("em", "amortized"), default=("em",))
    parser.add_argument("--seeds", nargs="*", type=int, default=(0,))
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the figures are kept")
    arguments = parser.parse_args()
    record = common.Record(arguments.json, KEYS)
    for seed in arguments.seeds:
        for case in arguments.cases:
            is_sorted = isinstance(CASES[case][0], Sorted)
            if is_sorted and arguments.data_dir is None:
                print(f"{case}: is left out; give --data-dir")
                continue
            for model in arguments.models:
                if record.holds(case, model, seed):
                    continue
                row = common.watched(
                    lambda folder, run=(case, model, seed): measure(*run, arguments.data_dir, folder)
                )
                record.add({"case": case, "model": model, "seed": seed, "code": common.code_state()} | row)
                print(f"{case}, {model}, seed {seed}: {row.get('error', 'done')}", flush=True)
    show(record)


if __name__ == "__main__":
    main()

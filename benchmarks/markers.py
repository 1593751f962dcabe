"""Are fold changes of markers right? Beside observed ratios in fits of many K, and beside a known truth.

    python benchmarks/markers.py --data-dir DATA --json markers.json
    python benchmarks/markers.py --data-dir DATA --only sweep --sets kang_ctrl_12k --groups 7 3
    python benchmarks/markers.py --only simulated --json markers.json

sweep: of each file of DATA (see quality.py) up to 1,000 random cells are fitted by ``nbmix.cluster`` with
each K, most of them far too many. Then all that ``adata.uns["nbmix"]["markers"]`` lists of groups of 5 cells
or more is compared with the observed ratio: that of molecules per unit of size factor in the group and
elsewhere, cells weighted by their responsibilities.

    off             log2_fc_rest is farther from log2 of the observed ratio than 1 plus its standard error
    no ratio        rows with less than half a molecule on one side, which cannot be off
    empty           groups without cells; "with markers", those of them that have rows, which is wrong

simulated: counts are drawn with known means, and ``find_markers`` is told the true groups. A seed draws 2,000
genes, of which those with 3 molecules or more are looked at. Counts are negative binomials; the spread of ln
mean between groups differs from gene to gene, a standard deviation of e^-1.9 = 0.15 in the typical one.

    grid            120 cells that belong to three groups in part, and 12 genes, drawn from a prior that is
                    given. The mean and standard deviation ("width") of 36 posteriors of ln mean are compared
                    with sums over 401 x 41 points
    normal          25 groups of 5 to 80 cells, 2,500 molecules a cell; differences are normal
    alone           the same groups, 250 molecules a cell, more dispersed (typically an inverse dispersion of
                    1). An eighth of the genes is nearly alone in one group: 0.1 to 2 molecules a cell there,
                    0.0001 to 0.01 elsewhere
    alone, bursts   the same, typically an inverse dispersion of 0.2
    null            the groups of "normal"; no gene differs
    10 of 1,000     as "normal", in two groups of 10 and 990 cells

    hold            share of estimates from the rest within 1.96 standard errors of the truth
    best            the 25 best markers of each group; "of small" of at most 30 cells
    best off        of those with an observed ratio, as above
    rmse, of ratio  of log2 of these: of the estimates, and of the observed ratios, from the truth
    surely wrong    genes that differ by a factor of less than sqrt 2, and whose lower bound is above it

Every run is added to the JSON file when it ends, and is not repeated, so an interrupted benchmark goes on
with the same command. Tables are of all runs in the file. After a change of the code give another file. The
whole sweep takes 40 minutes of CPU time, the simulations two.
"""

from __future__ import annotations

import os

# before anything starts threads
os.environ.update({f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMBA")})

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import common
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scipy.special import gammaln

import nbmix
from nbmix.core.batch import Basis, CellBatch
from nbmix.core.parameters import GenePrior
from nbmix.core.statistics import SufficientStatistics
from nbmix.evaluation.markers import WIDE_FACTOR, WIDE_SHARE, find_markers
from nbmix.starts.base import one_hot

KEYS = ("case", "groups", "seed")  # of a run; a simulation has its own groups
SETS = (
    "pbmc_facs",
    "pbmc3k_annot",
    "kang_ctrl_12k",
    "worm_neuron_sci",
    "cellbench_rnamix_celseq2",
    "cellbench_5cl_celseq2",
    "cellbench_3cl_dropseq",
)
GROUPS = (30, 25, 20, 15, 12, 9, 7, 5, 3, 2)
MOST_CELLS, FEWEST_CELLS, FEWEST_COUNTS = 1000, 5, 0.5
N_BEST, MOST_CELLS_OF_SMALL = 25, 30
Z_95 = 1.96
# entries of a run of the sweep
OFF = "n_off", "n_rows"
SUMS = {
    "no ratio": "n_without_ratio",
    "empty": "n_empty",
    "with markers": "n_empty_with_markers",
    "CPU s": "cpu_seconds",
}


# The sweep


def fit_and_compare(file: Path, n_groups: int) -> dict[str, Any]:
    """Rows of the table of markers, and those that are off."""
    adata = ad.read_h5ad(file)
    some = np.random.default_rng(0).permutation(adata.n_obs)[:MOST_CELLS]
    adata = adata[np.sort(some)].copy()
    began = time.process_time()
    nbmix.cluster(adata, n_components=n_groups, max_umap_cells=0)
    seconds = time.process_time() - began
    markers, cells = adata.uns["nbmix"]["markers"], adata.obs["nbmix"].value_counts()
    empty = cells.index[cells == 0]
    large = markers[markers["component"].isin(cells.index[cells >= FEWEST_CELLS])]
    found = beside_observed(adata, large, cells)
    return {
        "n_groups": int((cells >= FEWEST_CELLS).sum()),
        "n_rows": len(found),
        "n_off": int(found["off"].sum()),
        "n_without_ratio": int((found[["own", "others"]].min(axis=1) < FEWEST_COUNTS).sum()),
        "n_empty": len(empty),
        "n_empty_with_markers": int(empty.isin(markers["component"]).sum()),
        "off": found[found["off"]].to_dict("records"),
        "cpu_seconds": seconds,
    }


def beside_observed(adata: ad.AnnData, markers: pd.DataFrame, cells: pd.Series) -> pd.DataFrame:
    """Each row with its observed ratio, and molecules of the group and elsewhere; ``cells`` of each group."""
    q, sizes = adata.obsm["X_nbmix"], adata.obs["nbmix_size_factor"].to_numpy()
    molecules = adata.X.T @ q  # (genes, groups)
    genes, groups = adata.var_names.get_indexer(markers["gene"]), markers["component"].astype(int)
    own, of_group = molecules[genes, groups], (sizes @ q)[groups]
    others = molecules[genes].sum(1) - own
    fold_change = markers["log2_fc_rest"].to_numpy()
    error = markers["ln_fc_rest_se"].to_numpy() / np.log(2)
    observed = observed_log2_ratio(own, others, of_group, sizes.sum() - of_group)
    columns = {
        "component": markers["component"].astype(str).to_numpy(),
        "cells": cells[markers["component"]].to_numpy(),
        "gene": markers["gene"].to_numpy(),
        "rank": markers["rank"].to_numpy(),
        "log2_fc": fold_change,
        "se": error,
        "observed": observed,
        "own": own,
        "others": others,
        "off": is_off(fold_change, error, observed),
    }
    return pd.DataFrame(columns)


def observed_log2_ratio(
    own: np.ndarray, others: np.ndarray, size: np.ndarray, other_size: np.ndarray
) -> np.ndarray:
    """Of molecules per unit of size factor; NaN where a side has next to none."""
    few = np.minimum(own, others) < FEWEST_COUNTS
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(few, np.nan, np.log2(own / size) - np.log2(others / other_size))


def is_off(log2_fold_change: np.ndarray, error: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Whether an estimate is too far from the observed ratio, or no number."""
    near = np.abs(log2_fold_change - observed) <= 1 + error
    return ~near & ~(np.isnan(observed) & np.isfinite(log2_fold_change + error))


# Simulations


class Simulated(NamedTuple):
    """Groups of so many cells, and their genes.

    Attributes:
        n_cells: of each group.
        log_spread: mean of ln tau_j, the standard deviation of ln mean between groups; None for tau_j = 0.
        depth: molecules a cell, typically.
        log_mean: mean and standard deviation of ln molecules of a gene in a cell.
        log_inv_disp: mean and standard deviation of ln r_j.
        is_alone: an eighth of the genes is nearly alone in one group.
    """

    n_cells: tuple[int, ...]
    log_spread: float | None = -1.9
    depth: float = 2500.0
    log_mean: tuple[float, float] = (-2.2, 1.6)
    log_inv_disp: tuple[float, float] = (1.5, 0.8)
    is_alone: bool = False


MANY = (5, 5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40, *[50] * 6, *[60] * 4, *[80] * 3)
SPARSE = Simulated(MANY, depth=250.0, log_mean=(-3.0, 1.4), log_inv_disp=(0.0, 1.0), is_alone=True)
GRID = "grid"
CASES: dict[str, Simulated] = {
    "normal": Simulated(MANY),
    "alone": SPARSE,
    "alone, bursts": SPARSE._replace(log_inv_disp=(-1.5, 0.6)),
    "null": Simulated(MANY, log_spread=None),
    "10 of 1,000": Simulated((10, 990)),
}
N_GENES, FEWEST_OF_GENE, SD_LOG_SPREAD, SD_LOG_INV_DISP, SD_LOG_DEPTH = 2000, 3, 0.6, 0.3, 0.4
LEAST_LOG_MEAN, MOST_LOG_MEAN = -7.0, 2.0
SHARE_ALONE, COUNT_ALONE, COUNT_ELSEWHERE = 1 / 8, (0.1, 2.0), (1e-4, 1e-2)


class Drawn(NamedTuple):
    """Counts (cells, genes), size factors and groups (cells,), and the true ln means (groups, genes)."""

    counts: sp.csr_matrix
    sizes: np.ndarray
    groups: np.ndarray
    log_mean: np.ndarray


def draw(case: Simulated, rng: np.random.Generator) -> Drawn:
    """Genes, then cells; only genes that were seen."""
    shape = n_groups, _ = len(case.n_cells), N_GENES
    of_gene = np.clip(rng.normal(*case.log_mean, N_GENES), LEAST_LOG_MEAN, MOST_LOG_MEAN)
    spread = 0.0 if case.log_spread is None else np.exp(rng.normal(case.log_spread, SD_LOG_SPREAD, N_GENES))
    difference = spread * rng.standard_normal(shape)
    if case.is_alone:
        alone = rng.permutation(N_GENES)[: round(SHARE_ALONE * N_GENES)]
        of_gene[alone] = rng.uniform(*np.log(COUNT_ELSEWHERE), alone.size)
        there = rng.uniform(*np.log(COUNT_ALONE), alone.size)
        difference[rng.integers(n_groups, size=alone.size), alone] = there - of_gene[alone]
    log_mean = of_gene + difference - np.log(case.depth)
    log_inv_disp = rng.normal(*case.log_inv_disp, N_GENES) + rng.normal(0, SD_LOG_INV_DISP, shape)
    groups = np.repeat(np.arange(n_groups), case.n_cells)
    sizes = case.depth * rng.lognormal(0, SD_LOG_DEPTH, groups.size)
    inv_disp = np.exp(log_inv_disp)[groups]
    rates = np.exp(log_mean)[groups] * rng.gamma(inv_disp) / inv_disp
    counts = rng.poisson(sizes[:, None] * rates).astype(np.float32)
    seen = counts.sum(0) >= FEWEST_OF_GENE
    return Drawn(sp.csr_matrix(counts[:, seen]), sizes, groups, log_mean[:, seen])


def collected(counts: sp.csr_matrix, sizes: np.ndarray, q: torch.Tensor) -> tuple[Any, Basis, float]:
    """What ``find_markers`` is given."""
    basis = Basis.of(counts, sizes)
    batch = CellBatch.build(counts, sizes, basis)
    return SufficientStatistics.collect(batch, basis, q, torch.float64), basis, float(sizes.sum())


def beside_truth(case: Simulated, seed: int) -> dict[str, Any]:
    """How many estimates are right."""
    drawn = draw(case, np.random.default_rng(seed))
    q = one_hot(drawn.groups, len(case.n_cells))
    began = time.process_time()
    markers = find_markers(*collected(drawn.counts, drawn.sizes, q))
    seconds = time.process_time() - began
    estimate, error = (values.numpy() for values in markers.from_rest)  # (groups, genes), ln
    truth = drawn.log_mean - log_mean_of_rest(drawn.log_mean, case.n_cells)
    holds = np.abs(estimate - truth) < Z_95 * error
    best = np.argsort(np.argsort(-markers.score.numpy(), axis=1), axis=1) < N_BEST
    small = best & (np.array(case.n_cells) <= MOST_CELLS_OF_SMALL)[:, None]
    large = best & ~small
    seen = observed(drawn, q)[best]
    has_ratio = np.isfinite(seen)
    off = is_off(estimate[best] / np.log(2), error[best] / np.log(2), seen)
    little = np.abs(truth) < np.log(2) / 2
    wrong = markers.from_rest.lower_bound.numpy() > np.log(2) / 2
    return {
        "n": holds.size,
        "n_hold": int(holds.sum()),
        "n_small": int(small.sum()),
        "n_small_hold": int(holds[small].sum()),
        "n_large": int(large.sum()),
        "n_large_hold": int(holds[large].sum()),
        "n_off": int(off.sum()),
        "n_ratio": int(has_ratio.sum()),
        "n_little": int(little.sum()),
        "n_surely_wrong": int((wrong & little).sum()),
        "rmse": rmse((estimate - truth)[best][has_ratio] / np.log(2)),
        "rmse_observed": rmse(seen[has_ratio] - truth[best][has_ratio] / np.log(2)),
        "cpu_seconds": seconds,
    }


def rmse(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(errors**2)))


def log_mean_of_rest(log_mean: np.ndarray, n_cells: tuple[int, ...]) -> np.ndarray:
    """(groups, genes) ln of the mean over all cells of other groups."""
    weights = (1 - np.eye(len(n_cells))) * n_cells
    return np.log(weights / weights.sum(1, keepdims=True) @ np.exp(log_mean))


def observed(drawn: Drawn, q: torch.Tensor) -> np.ndarray:
    """(groups, genes) log2 ratio of each group to all others."""
    own, size = q.numpy().T @ drawn.counts, (q.numpy().T @ drawn.sizes)[:, None]
    return observed_log2_ratio(own, own.sum(0) - own, size, size.sum() - size)


# The grid

GRID_CELLS, GRID_GENES, GRID_GROUPS = 120, 12, 3
GRID_LEVEL, GRID_SPREAD = 1.5, 0.8  # of ln r: mean and variance


def beside_grid(seed: int) -> dict[str, Any]:
    """Posteriors of ln mean and sums over a grid: errors in standard deviations, ratios of widths."""
    rng = np.random.default_rng(seed)
    shape = GRID_GROUPS, GRID_GENES
    sizes = np.exp(rng.uniform(np.log(1e3), np.log(1e4), GRID_CELLS))
    q = rng.dirichlet(np.full(GRID_GROUPS, 0.3), GRID_CELLS)
    group = (q.cumsum(1) < rng.random((GRID_CELLS, 1))).sum(1)
    centre, variance = rng.uniform(-11, -5, GRID_GENES), np.linspace(0.05, 2.0, GRID_GENES)
    wide = np.where(rng.random(shape) < WIDE_SHARE, WIDE_FACTOR, 1.0)
    log_mean = centre + np.sqrt(wide * variance) * rng.standard_normal(shape)
    inv_disp = np.exp(rng.normal(GRID_LEVEL, np.sqrt(GRID_SPREAD), shape))[group]
    rates = sizes[:, None] * np.exp(log_mean)[group] * rng.gamma(inv_disp) / inv_disp
    counts = rng.poisson(rates).astype(np.float32)
    number = partial(torch.tensor, dtype=torch.float64)
    level = torch.full((GRID_GENES,), GRID_LEVEL, dtype=torch.float64)
    prior = GenePrior(number(centre), number(variance), level, number(GRID_SPREAD), torch.zeros(3))
    markers = find_markers(*collected(sp.csr_matrix(counts), sizes, torch.from_numpy(q)), prior=prior)
    errors, widths = [], []
    for k in range(GRID_GROUPS):
        for j in range(GRID_GENES):
            true, sd = posterior_on_grid(counts[:, j], sizes, q[:, k], centre[j], variance[j])
            errors.append(abs(float(markers.log_mean[k, j]) - true) / sd)
            widths.append(float(markers.standard_error[k, j]) / sd)
    return {"n": len(errors), "errors": errors, "widths": widths}


def posterior_on_grid(
    counts: np.ndarray, sizes: np.ndarray, weights: np.ndarray, centre: float, variance: float
) -> tuple[float, float]:
    """Mean and standard deviation of ln mean under both parts of the prior."""
    a = centre + np.sqrt(variance) * np.linspace(-20, 20, 401)
    b = GRID_LEVEL + np.sqrt(GRID_SPREAD) * np.linspace(-5, 5, 41)
    r, total = np.exp(b), np.zeros((a.size, b.size))
    for x, s, w in zip(counts.astype(float), sizes, weights, strict=True):
        failures = np.log1p(s * np.exp(a)[:, None] / r)
        total += w * (gammaln(x + r) - gammaln(r) + x * (np.log(s) + a[:, None] - b) - (x + r) * failures)
    total -= (b - GRID_LEVEL) ** 2 / (2 * GRID_SPREAD)
    total -= total.max()
    parts = []
    for share, v, n_seen in (
        (1 - WIDE_SHARE, variance, GRID_GROUPS),
        (WIDE_SHARE, WIDE_FACTOR * variance, np.inf),  # whose variance is not widened
    ):
        density = share / np.sqrt(v) * np.exp(total - ((a - centre) ** 2 / (2 * v))[:, None]).sum(1)
        mean = density @ a / density.sum()
        own = density @ (a - mean) ** 2 / density.sum()
        parts.append((density.sum(), mean, own * (1 + own / v * 2 / (n_seen - 1))))
    weight, mean, own = np.array(parts).T
    weight /= weight.sum()
    return weight @ mean, np.sqrt(weight @ (own + (mean - weight @ mean) ** 2))


# Tables


def show_sweep(rows: list[dict[str, Any]]) -> None:
    """Rows that are off of all rows: a line a K, a column a set; then those that are off."""
    sets = {name: [row for row in rows if row["case"] == name] for name in SETS}
    columns = {name.replace("_", " "): mine for name, mine in sets.items() if mine} | {"all": rows}
    lines: list[list[Any]] = []
    for k in sorted({row["groups"] for row in rows}, reverse=True):
        of_k = ([row for row in mine if row["groups"] == k] for mine in columns.values())
        lines.append([k, *(counted(mine, *OFF) if mine else None for mine in of_k)])
    lines.append(["all K", *(counted(mine, *OFF) for mine in columns.values())])
    lines += [[title, *(total(mine, key) for mine in columns.values())] for title, key in SUMS.items()]
    common.show("sweep: rows that are off", ("K", *columns), lines)
    off = [(row["case"], row["groups"], found) for row in rows for found in row["off"]]
    if off:
        keys = ("component", "cells", "gene", "rank", "log2_fc", "se", "observed", "own", "others")
        titles = ("group", *keys[1:4], "log2 FC", "its error", "observed", "molecules", "elsewhere")
        lines = [[name, k, *(found[key] for key in keys)] for name, k, found in off]
        common.show("those rows", ("", "K", *titles), lines)


def show_simulated(rows: list[dict[str, Any]]) -> None:
    """Sums and means over seeds; of shares the standard error of their mean, too."""
    lines = []
    for name in CASES:
        mine = [row for row in rows if row["case"] == name]
        if mine:
            shares = [share(mine, f"{of}_hold", of) for of in ("n", "n_small", "n_large")]
            counts = counted(mine, "n_off", "n_ratio"), counted(mine, "n_surely_wrong", "n_little")
            errors = [float(np.mean([row[key] for row in mine])) for key in ("rmse", "rmse_observed")]
            lines.append([name, len(mine), *shares, *counts, *errors])
    hold = ("hold, %", "best of small", "of others")
    columns = ("", "seeds", *hold, "best off", "surely wrong", "rmse", "of ratio")
    if lines:
        common.show("simulated", columns, lines)
    mine = [row for row in rows if row["case"] == GRID]
    if mine:
        errors, widths = (np.concatenate([row[key] for row in mine]) for key in ("errors", "widths"))
        of_errors, of_widths = np.quantile(errors, [0.5, 0.99, 1]), np.quantile(widths, [0, 0.01, 0.5, 1])
        columns = ("posteriors", "error in sd, median", "99 %", "largest", "width, least", "1 %", "median")
        lines = [[errors.size, *map(float, (*of_errors, *of_widths))]]
        common.show("beside sums over a grid", (*columns, "largest"), lines)


def total(rows: list[dict[str, Any]], key: str) -> Any:
    return sum(row[key] for row in rows)


def counted(rows: list[dict[str, Any]], part: str, whole: str) -> str:
    return f"{total(rows, part):,} of {total(rows, whole):,}"


def share(rows: list[dict[str, Any]], part: str, whole: str) -> str:
    """Per cent over all seeds, and the standard error of it."""
    each = [100 * row[part] / row[whole] for row in rows]
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None
    return f"{statistics.mean(each):.1f}" + (f" ± {error:.1f}" if error is not None else "")


# All runs


def measure(case: str, groups: int | None, seed: int, data_dir: Path | None) -> dict[str, Any]:
    """One run."""
    if groups is not None:
        assert data_dir is not None
        return fit_and_compare(data_dir / f"{case}.h5ad", groups)
    return beside_grid(seed) if case == GRID else beside_truth(CASES[case], seed)


def wanted(arguments: argparse.Namespace) -> list[tuple[str, int | None, int]]:
    """Values of ``KEYS`` of all runs; a line for each set that is not there."""
    runs: list[tuple[str, int | None, int]] = []
    if "simulated" in arguments.only:
        runs += [(case, None, seed) for case in arguments.cases for seed in range(arguments.seeds)]
    if "sweep" in arguments.only:
        for name in arguments.sets:
            if arguments.data_dir is None or not (arguments.data_dir / f"{name}.h5ad").exists():
                print(f"{name}: is left out; --data-dir has no {name}.h5ad", file=sys.stderr)
            else:
                runs += [(name, k, 0) for k in arguments.groups]
    return runs


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts, cases = ("sweep", "simulated"), (GRID, *CASES)
    parser.add_argument("--data-dir", type=Path, metavar="DATA", help="folder with the .h5ad files")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help=", ".join(parts))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, metavar="SET", help=", ".join(SETS))
    parser.add_argument("--groups", nargs="+", type=int, default=GROUPS, metavar="K", help="default: 30 to 2")
    parser.add_argument(
        "--cases", nargs="+", choices=cases, default=cases, metavar="CASE", help="; ".join(cases)
    )
    parser.add_argument("--seeds", type=int, default=20, help="of simulations, from 0 (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the figures are kept")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    record = common.Record(arguments.json, KEYS)
    for run in wanted(arguments):
        if record.holds(*run):
            continue
        row = common.watched(lambda _, run=run: measure(*run, arguments.data_dir))
        record.add(dict(zip(KEYS, run, strict=True)) | {"code": common.code_state()} | row)
        what = row.get("error") or f"{row['n_off']} off of {row['n_rows']}" if "n_rows" in row else "done"
        print(*run, row.get("error", what), file=sys.stderr, flush=True)
    done = [row for row in record.rows if "error" not in row]
    swept = [row for row in done if row["groups"] is not None]
    if swept:
        show_sweep(swept)
    show_simulated(done)
    of_case = [row | {"method": row["case"]} for row in record.rows]
    for line in common.remarks(of_case, lambda row: str(row["groups"] or f"seed {row['seed']}")):
        print(line)
    common.say_states(done)
    if len(done) < len(record.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

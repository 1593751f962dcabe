"""What is found in shallow data: data sets thinned to fewer and fewer counts a cell, a table and a figure.

    python benchmarks/depth.py --data-dir DATA --json depth.json --plot depth.png
    python benchmarks/depth.py --data-dir DATA --json depth.json --data 5cl made --depths 100 200 --seeds 0 1
    python benchmarks/depth.py --json depth.json --plot depth.png

DATA holds cellbench_5cl_celseq2.h5ad and cellbench_3cl_dropseq.h5ad (cell lines, told apart by their
genotype; Tian et al. 2019) and pbmc_facs.h5ad, of which mix4 takes four sorted populations (Zheng et al.
2017); a data set whose file is missing is skipped. "made" is drawn here: cells of six kinds of uneven size
and negative binomial counts, which favours nbmix. Without --data-dir nothing is run: table and figure are of
the JSON file.

Of each data set every molecule is kept with one probability, the same for all cells, such that the median
cell is left with the wanted number of counts. Each seed is a thinning of its own, and the seed of the methods
too. All methods see the same cells, the genes that are left with a count, and the true number of kinds; none
the labels. ``nbmix`` are fits as train.py makes them, of all cells; ``leiden-k``, ``kmeans`` and ``gmm`` are
those of baselines.py; ``truth``, for "made" alone, has the very parameters that the counts were drawn with,
so that no method can do better but by chance.

    ARI       of all cells, each in its most probable group: mean over thinnings, and its 95 % interval by
              Student's t (the range where there are two thinnings)
    lowest    ARI of the worst thinning
    accuracy  share of cells whose group is matched with their label, one to one
    ECE       expected calibration error of the largest posterior (15 bins), mean and interval as above;
              Leiden and k-means have none. What is left of it for "truth" is chance
    tempered  ECE of nbmix at the inverse temperature of metrics.json
    CPU s     of one thread, from the file to the clusters of all cells, after a warm-up; the mean

Every run is added to the JSON file when it ends. Runs that the file holds are not repeated (failed ones are),
so an interrupted benchmark goes on with the same command; after a change of the code give another file.
"""

from __future__ import annotations

import os

# before anything starts threads
os.environ.update({f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMBA")})

import argparse
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import baselines
import common
import made
import numpy as np
import scipy.stats
import torch
from hydra.utils import instantiate
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from scipy.special import softmax

from nbmix.data.simulate import draw_counts
from nbmix.evaluation.calibration import expected_calibration_error
from nbmix.evaluation.metrics import clustering_metrics, match_cells
from nbmix.evaluation.plots.style import PALETTE, new_figure, open_frame

DEPTHS = (50, 100, 200, 400, 800)
KEYS = ("data", "depth", "method", "seed")  # of a run
PEERS = ("leiden-k", "kmeans", "gmm")
METHODS = ("nbmix", *PEERS, "truth")


# The data sets


class DataSet(NamedTuple):
    """What the figure calls it, the number of kinds, and how it is read before it is thinned."""

    title: str
    n_components: int
    source: made.Source


class Truth(NamedTuple):
    """What "made" is drawn from; genes are all those that are drawn, with a count or without."""

    adata: ad.AnnData
    log_weights: np.ndarray  # (kinds,)
    sizes: np.ndarray  # (cells,) expected counts of each cell
    log_mean: np.ndarray  # (kinds, genes) natural log of the mean at a size of 1
    log_inv_disp: np.ndarray  # (kinds, genes)


KIND_SHARES = (0.36, 0.22, 0.16, 0.12, 0.08, 0.06)
N_CELLS, N_GENES = 1500, 2000
MADE_SIZE, SIZE_SPREAD = 4000.0, 0.4  # median expected counts of a cell, sd of their logarithm
MEAN_SPREAD = 1.5  # sd of the logarithm of the genes' means
# Share of the genes that a kind changes, and by how much (sd of the natural log): chosen so that the true
# parameters tell most cells of 200 counts, but not all
SHARE_CHANGED, CHANGE = 0.05, 1.0


@cache
def truth() -> Truth:
    """Six kinds that differ in few genes; the same at each call."""
    rng = np.random.default_rng(0)
    shape = (len(KIND_SHARES), N_GENES)
    codes = rng.choice(len(KIND_SHARES), N_CELLS, p=KIND_SHARES)
    is_changed = rng.random(shape) < SHARE_CHANGED
    log_mean = rng.normal(0, MEAN_SPREAD, N_GENES) + is_changed * rng.normal(0, CHANGE, shape)
    log_mean -= np.log(np.exp(log_mean).sum(1, keepdims=True))
    log_inv_disp = np.tile(rng.uniform(0, 4, N_GENES), (len(KIND_SHARES), 1))  # as in nbmix.simulate
    sizes = MADE_SIZE * rng.lognormal(0, SIZE_SPREAD, N_CELLS)
    counts = draw_counts(codes, sizes, log_mean, log_inv_disp, rng)
    adata = made.labelled(counts, np.char.add("kind", codes.astype(str)))
    return Truth(adata, np.log(KIND_SHARES), sizes, log_mean, log_inv_disp)


DATA = {
    "5cl": DataSet("5 cell lines, CEL-seq2", 5, made.FIVE_LINES),
    "3cl": DataSet("3 cell lines, Drop-seq", 3, made.THREE_LINES),
    "mix4": DataSet("4 sorted blood cells, 10x", 4, made.mix4),
    "made": DataSet("6 simulated kinds", len(KIND_SHARES), lambda data_dir: truth().adata),
}


class Thinned(NamedTuple):
    """A file with what a thinning has left, and what a run needs to know of it."""

    path: Path
    n_components: int
    share: float  # of the molecules
    seed: int


def thin(adata: ad.AnnData, depth: int, seed: int, n_components: int, path: Path) -> Thinned:
    """Write the cells of ``adata`` with a median of about ``depth`` counts."""
    share = depth / made.median_total(adata)
    counts = made.thinned(adata, share, np.random.default_rng([seed, depth]))
    made.with_counts(adata, counts).write_h5ad(path)
    return Thinned(path, n_components, share, seed)


# One run


class Found(NamedTuple):
    """What a method says of the cells.

    Attributes:
        labels: (cells,) that they are scored by.
        posterior: (cells, K); or (cells,) clusters.
        tempered: (cells,) probability of each assignment, where it is known better than by the posterior.
    """

    labels: np.ndarray
    posterior: np.ndarray
    tempered: np.ndarray | None = None


def measure(method: str, thinned: Thinned) -> dict[str, Any]:
    """Run one method: scores, seconds and warnings; or an error in their place."""
    settings = ("data=h5ad", f"data.path={thinned.path}", f"model.n_components={thinned.n_components}")
    if method == "truth":
        return common.watched(lambda folder: scores(by_truth(thinned)))
    return run(method, settings, thinned.seed)


def run(method: str, settings: Iterable[str], seed: int) -> dict[str, Any]:
    """The same on what arguments of train.py name."""
    clock = common.Clock()

    def work(folder: str) -> dict[str, Any]:
        cfg = common.configure((*settings, f"seed={seed}", "data.validation_share=0"), folder)
        found = ours(cfg, clock) if method == "nbmix" else peer(cfg, method, clock)
        return scores(found) | {"cpu_seconds": clock.cpu_seconds("run"), "seconds": clock.seconds("run")}

    return common.watched(work)


def ours(cfg: Any, clock: common.Clock) -> Found:
    """A fit as train.py makes it, and the posteriors that its results would show."""
    results = common.fitted(cfg, clock)
    tempered = None if results.inverse_temperature is None else results.probabilities
    return Found(results.data.data.labels, results.responsibilities, tempered)


def peer(cfg: Any, method: str, clock: common.Clock) -> Found:
    """A method of baselines.py on the same cells and genes."""
    with clock("run"):
        data = instantiate(cfg.data).data
        outcome = baselines.methods()[method].run(data, cfg.model.n_components, cfg.seed)
    return Found(data.labels, outcome.found)


def by_truth(thinned: Thinned) -> Found:
    """Posteriors under the parameters of "made": a thinned negative binomial is one of a smaller size."""
    known, adata = truth(), ad.read_h5ad(thinned.path)
    counts, sizes = adata.X.toarray(), thinned.share * known.sizes[:, None]
    joint = np.empty((adata.n_obs, len(known.log_weights)))
    for k, weight in enumerate(known.log_weights):
        shape, scale = np.exp(known.log_inv_disp[k]), np.exp(known.log_mean[k] - known.log_inv_disp[k])
        joint[:, k] = weight + scipy.stats.nbinom.logpmf(counts, shape, 1 / (1 + sizes * scale)).sum(1)
    return Found(adata.obs["cell_type"].astype(str).to_numpy(), softmax(joint, axis=1))


def scores(found: Found) -> dict[str, Any]:
    """Agreement with the labels, and how far probabilities can be trusted where there are any."""
    labels, q = found.labels, found.posterior
    has_posterior = q.ndim == 2
    if not has_posterior:
        q = baselines.one_hot(q)
    metrics = clustering_metrics(labels, q)
    row = {"n_cells": len(q), "n_found": len(np.unique(q.argmax(1)))}
    row |= {name: metrics[name] for name in ("ari", "accuracy")}
    if has_posterior:
        correct = match_cells(labels, q).correct
        row |= {"confidence": float(q.max(1).mean()), "ece": expected_calibration_error(q.max(1), correct)}
        if found.tempered is not None:
            row["confidence_tempered"] = float(found.tempered.mean())
            row["ece_tempered"] = expected_calibration_error(found.tempered, correct)
    return row


# All runs


def warm_up(methods: Sequence[str]) -> None:
    """Imports, and what numba compiles, by small fits that are not kept."""
    for method in methods:
        if method != "truth" and "error" in (row := run(method, common.WARM_UP, 0)):
            sys.exit(f"{method}: {row['error']}")


def measured_by(methods: Iterable[str], data: str) -> list[str]:
    """Those methods that can be asked of a data set."""
    return [method for method in methods if method != "truth" or data == "made"]


class Job(NamedTuple):
    """Methods that are still to be run on one thinning."""

    seed: int
    data: str
    depth: int
    methods: list[str]


def jobs(record: common.Record, sources: dict[str, ad.AnnData], arguments: argparse.Namespace) -> list[Job]:
    """What is not recorded yet: all data sets and depths of a seed before the next seed."""
    found = []
    for seed in arguments.seeds:
        for name, adata in sources.items():
            methods = measured_by(arguments.methods, name)
            for depth in arguments.depths:
                missing = [method for method in methods if not record.holds(name, depth, method, seed)]
                if missing and depth <= made.median_total(adata):
                    found.append(Job(seed, name, depth, missing))
    return found


def run_all(record: common.Record, sources: dict[str, ad.AnnData], wanted: Iterable[Job]) -> None:
    """Thin, run and record."""
    code = common.code_state()
    for seed, name, depth, methods in wanted:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "thinned.h5ad"
            thinned = thin(sources[name], depth, seed, DATA[name].n_components, path)
            for method in methods:
                row = measure(method, thinned)
                told = {"data": name, "depth": depth, "method": method, "seed": seed, "code": code}
                record.add(told | {"share_kept": thinned.share} | row)
                said = row.get("error") or f"ARI {row['ari']:.4f}"
                print(f"{name} {depth} {method} seed={seed}: {said}", file=sys.stderr, flush=True)


def available(names: Iterable[str], arguments: argparse.Namespace) -> dict[str, ad.AnnData]:
    """The data sets whose files are there; a line for each that is not, and each depth that it has not."""
    sources = {}
    for name in names:
        try:
            sources[name] = adata = DATA[name].source(arguments.data_dir)
        except FileNotFoundError as error:
            print(f"{name}: skipped, {error}", file=sys.stderr, flush=True)
            continue
        median = made.median_total(adata)
        for depth in arguments.depths:
            if depth > median:
                print(f"{name} {depth}: skipped, its own median is {median:.0f}", file=sys.stderr, flush=True)
    return sources


# Tables


class Summary(NamedTuple):
    """Of a score over the thinnings: mean, 95 % interval of the mean, lowest, and how many they are."""

    mean: float
    low: float
    high: float
    lowest: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Student's t; the range where two values, or one, tell nothing of their spread."""
        mean, lowest, n = statistics.mean(values), min(values), len(values)
        if n < 3:
            return cls(mean, lowest, max(values), lowest, n)
        half = float(scipy.stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
        return cls(mean, mean - half, mean + half, lowest, n)


def summary(rows: Iterable[dict[str, Any]], data: str, depth: int, method: str, score: str) -> Summary | None:
    """Of the runs that did not fail; None where there are none, or the method has no such score."""
    wanted = (data, depth, method)
    mine = [row for row in rows if (row["data"], row["depth"], row["method"]) == wanted]
    values = [row[score] for row in mine if row.get(score) is not None]
    return Summary.of(values) if values else None


def interval(found: Summary) -> str:
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


LINES: dict[str, tuple[str, Callable[[Summary], str]]] = {  # title -> name in a row, what is said of it
    "ARI": ("ari", interval),
    "lowest": ("ari", lambda found: f"{found.lowest:.3f}"),
    "accuracy": ("accuracy", lambda found: f"{found.mean:.3f}"),
    "ECE": ("ece", interval),
    "tempered": ("ece_tempered", interval),
    "CPU s": ("cpu_seconds", lambda found: f"{found.mean:.1f}"),
}


def show(rows: Sequence[dict[str, Any]], data: Sequence[str], methods: Sequence[str]) -> None:
    """A table of each data set, methods side by side; below it what failed, and what was warned of."""
    for name in data:
        all_mine = [row for row in rows if row["data"] == name]
        mine = [row for row in all_mine if "error" not in row]
        notes = common.remarks(all_mine, lambda row: f"{row['depth']}/{row['seed']}")
        if all_mine and not mine:
            print(name, *notes, sep="\n")
        if not mine:
            continue
        shown = measured_by(methods, name)
        lines = []
        for title, (score, say) in LINES.items():
            for depth in sorted({row["depth"] for row in mine}):
                found = [summary(mine, name, depth, method, score) for method in shown]
                if any(found):
                    lines.append([f"{title}, {depth}", *(one and say(one) for one in found)])
        numbers = sorted(Counter((row["depth"], row["method"]) for row in mine).values())
        title = f"{name}: {mine[0]['n_cells']:,} cells, K = {DATA[name].n_components}; "
        title += f"thinnings: {' to '.join(str(n) for n in dict.fromkeys((numbers[0], numbers[-1])))}; "
        title += f"load average up to {max(row['load_average'] for row in mine):.1f}"
        common.show(title, ("counts of the median cell", *shown), lines, notes, width=160)
    common.say_states(rows)


# The figure


class Look(NamedTuple):
    """Of a method in the figure."""

    name: str
    color: str
    marker: str = "o"
    is_ours: bool = False


LOOKS = {
    "nbmix": Look("nbmix", PALETTE[0], "o", True),
    "leiden-k": Look("Leiden at the true K", PALETTE[3], "s"),
    "kmeans": Look("k-means", PALETTE[2], "^"),
    "gmm": Look("Gaussian mixture", PALETTE[4], "D"),
    "truth": Look("true parameters (simulation)", "0.45", ""),
}
WIDTH, HEIGHT = 9.0, 3.3  # inches: at 100 pixels each, letters of 9 points are 12 pixels high


def plot(rows: Sequence[dict[str, Any]], data: Sequence[str], methods: Sequence[str]) -> Figure:
    """ARI against the median cell's counts: a panel a data set, a line a method, bands as in the table."""
    rows = [row for row in rows if row.get("ari") is not None]
    shown = [name for name in data if any(row["data"] == name for row in rows)]
    listed = [method for method in methods if any(row["method"] == method for row in rows)]
    figure = new_figure(WIDTH, HEIGHT)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, shown, strict=True):
        mine = [row for row in rows if row["data"] == name]
        for method in reversed(listed):  # the first lies on top
            draw_line(axes, mine, name, method)
        axes.set_title(f"{DATA[name].title}\n{mine[0]['n_cells']:,} cells", fontsize=9)
        depths = sorted({row["depth"] for row in mine})
        axes.set_xscale("log")
        axes.set_xticks(depths, [str(depth) for depth in depths], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        open_frame(axes)
    panels[0].set_ylim(min(0.0, panels[0].get_ylim()[0]), 1.03)  # which they share
    panels[0].set_ylabel("agreement with the\ntrue kinds (ARI)", fontsize=9)
    figure.supxlabel("median counts per cell", fontsize=9)
    handles = [legend_line(LOOKS[method]) for method in listed]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def draw_line(axes: Axes, rows: Sequence[dict[str, Any]], data: str, method: str) -> None:
    """The means of a method, and a band for their intervals."""
    depths = sorted({row["depth"] for row in rows if row["method"] == method})
    found = [summary(rows, data, depth, method, "ari") for depth in depths]
    there = [(depth, one) for depth, one in zip(depths, found, strict=True) if one is not None]
    if not there:
        return
    x, look = [depth for depth, _ in there], LOOKS[method]
    axes.plot(x, [one.mean for _, one in there], **style(look))
    low, high = [one.low for _, one in there], [min(1.0, one.high) for _, one in there]
    axes.fill_between(x, low, high, color=look.color, alpha=0.25 if look.is_ours else 0.12, linewidth=0)


def style(look: Look) -> dict[str, Any]:
    """Ours is set off by its weight."""
    if not look.marker:
        return {"color": look.color, "linestyle": ":", "linewidth": 1.2}
    width, size = (2.6, 5.5) if look.is_ours else (1.2, 3.5)
    return {"color": look.color, "marker": look.marker, "linewidth": width, "markersize": size}


def legend_line(look: Look) -> Line2D:
    return Line2D([], [], label=look.name, **style(look))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", type=Path, help="folder with the .h5ad files; without it nothing is run"
    )
    parser.add_argument(
        "--data", choices=DATA, nargs="+", metavar="NAME", default=[*DATA], help=", ".join(DATA)
    )
    parser.add_argument("--depths", type=int, nargs="+", metavar="COUNTS", default=[*DEPTHS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(10)])
    parser.add_argument(
        "--methods", choices=METHODS, nargs="+", metavar="NAME", default=[*METHODS], help=", ".join(METHODS)
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="where what is measured is kept")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="where to draw ARI against depth")
    arguments = parser.parse_args()
    if arguments.data_dir is None and (arguments.json is None or not arguments.json.exists()):
        parser.error("give --data-dir, or a --json file that is there")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    record = common.Record(arguments.json, KEYS)
    if arguments.data_dir is not None:
        sources = available(arguments.data, arguments)
        if not sources:
            sys.exit(f"--data-dir {arguments.data_dir}: has none of the files")
        wanted = jobs(record, sources, arguments)
        if wanted:
            warm_up(arguments.methods)
            run_all(record, sources, wanted)
    chosen = {"data": arguments.data, "depth": arguments.depths, "method": arguments.methods}
    chosen["seed"] = arguments.seeds
    rows = [row for row in record.rows if all(row[key] in values for key, values in chosen.items())]
    show(rows, arguments.data, arguments.methods)
    if arguments.plot and any("ari" in row for row in rows):
        plot(rows, arguments.data, arguments.methods).savefig(arguments.plot)
    if any("error" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

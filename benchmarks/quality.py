"""What is found: data sets x methods x seeds, with means and standard deviations, one JSON file and a plot.

    python benchmarks/quality.py --data-dir DATA --json quality.json
    python benchmarks/quality.py --data-dir DATA --data mix4 nine --only ours peers --seeds 0 1 2
    python benchmarks/quality.py --data-dir DATA --data made --methods em leiden-k --seeds 0

DATA holds pbmc_facs.h5ad (sorted populations of Zheng et al. 2017 in obs["cell_type"]), of CellBench (Tian et
al. 2019) cellbench_3cl_dropseq, cellbench_5cl_celseq2 and cellbench_rnamix_celseq2, and pbmc3k_annot,
kang_ctrl_12k and worm_neuron_sci; a data set whose file is missing is skipped. "made" are those of made.py.

All methods are given the true number of groups but leiden and em-auto, and none the labels but
em-from-labels, which asks what the model itself prefers. em-unjoined has one component for each group.
``ours`` are fits as train.py makes them, without pictures and
report; ``ablations`` leave out one ingredient of em each; ``peers`` are those of baselines.py.

    ARI, NMI, accuracy  of all cells, each in its most probable component; accuracy matches components with
                        labels one to one. "lowest" is the lowest ARI of the seeds
    least recall        share of a label's cells in its component, of the label that fares worst
    found               groups, or communities, with cells
    fitted              components that groups were joined from
    with gaps           groups when whatever has no gap between it is joined, and their ARI
    log loss            nats a cell of the matched component, all cells
    held-out            log likelihood, nats a cell, of a tenth of the cells that no part of the fit has seen.
                        The seed chooses the cells, so compare methods by "- em", the difference at each seed
    ECE                 expected calibration error of the largest posterior of those cells (15 bins);
                        "tempered": at the inverse temperature of metrics.json
    CPU s               of one thread, from the file to the clusters of all cells, after a warm-up

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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import baselines
import common
import made
import numpy as np
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig
from sklearn.metrics import adjusted_rand_score

from nbmix.core.joins import group_probabilities
from nbmix.data.counts import CountData
from nbmix.data.zheng import POPULATIONS
from nbmix.evaluation.calibration import expected_calibration_error
from nbmix.evaluation.metrics import clustering_metrics, match_cells
from nbmix.output.scores import score

NINE = ",".join(name for name in POPULATIONS if name != "cd34")  # which is impure


class DataSet(NamedTuple):
    """A file of the data folder, settings of ``data``, and the number of components to look for."""

    file: str
    n_components: int
    settings: tuple[str, ...] = ("data=h5ad",)


REAL = {
    "mix2": DataSet("pbmc_facs", 2, ("data=mix2",)),
    "mix4": DataSet("pbmc_facs", 4, ("data=mix4",)),
    "mix10": DataSet("pbmc_facs", 10, ("data=mix10",)),
    "nine": DataSet("pbmc_facs", 9, ("data=h5ad", f"data.populations=[{NINE}]")),
    "5cl": DataSet("cellbench_5cl_celseq2", 5),
    "3cl": DataSet("cellbench_3cl_dropseq", 3),
    "rnamix": DataSet("cellbench_rnamix_celseq2", 7),
    "pbmc3k": DataSet("pbmc3k_annot", 9),  # silver labels from here on: somebody's clustering
    "kang": DataSet("kang_ctrl_12k", 8),
    "worm": DataSet("worm_neuron_sci", 10),
}
MADE = {name: DataSet(name, kind.n_components) for name, kind in made.KINDS.items()}

OURS: dict[str, tuple[str, ...]] = {
    "em": (),
    "amortized": ("model=amortized",),
    "em-plain": ("model.folds=1", "model.pseudo_cells=0", "start=dirichlet"),
}
ABLATIONS = {
    "em-unjoined": ("model.components_per_group=1",),
    "em-no-axis": ("start.n_axes=0",),
    "em-no-surplus": ("start.surplus=0",),
    "em-two-starts": ("start.n_starts=2",),
    "em-no-search": ("start=dirichlet",),
    "em-no-prior": ("model.pseudo_cells=20",),  # a fixed number of them, not learned gene by gene
    "em-no-folds": ("model.folds=1",),  # brings 20 pseudo-cells
    "em-kmeans": ("start=kmeans",),
}
OTHERS = {
    "em-auto": ("model.n_components=auto",),
    "em-from-labels": ("start=labels",),
}
PEERS = ("leiden", "leiden-k", "kmeans", "gmm", "topics")
SETTINGS = OURS | ABLATIONS | OTHERS
GROUPS = {"ours": tuple(OURS), "ablations": tuple(ABLATIONS), "others": tuple(OTHERS), "peers": PEERS}
METHODS = tuple(method for methods in GROUPS.values() for method in methods)
KEYS = ("data", "method", "seed")  # of a run
SCORES = ("ari", "nmi", "accuracy", "log_loss")


# One run


class Found(NamedTuple):
    """(cells, K) posteriors of a method, and what else is to be known of them."""

    data: CountData
    posterior: np.ndarray
    said: dict[str, Any]


def settings_of(data: DataSet, method: str, folder: Path) -> tuple[str, ...]:
    """The arguments that train.py would get; of a peer, those that read its data."""
    where = (
        *data.settings,
        f"data.path={folder / data.file}.h5ad",
        f"model.n_components={data.n_components}",
    )
    return (*where, *SETTINGS.get(method, ()))


def measure(method: str, settings: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Run one method on one data set: scores, seconds, and warnings; or an error in their place.

    Args:
        method: its name.
        settings: arguments of train.py.
        seed: of the run.
    """
    clock = common.Clock()

    def run(folder: str) -> dict[str, Any]:
        cfg = common.configure((*settings, f"seed={seed}"), folder)
        found = (ours if method in SETTINGS else peer)(cfg, method, clock)
        seconds = {"cpu_seconds": clock.cpu_seconds("run"), "seconds": clock.seconds("run")}
        return scores(found) | found.said | seconds

    return common.watched(run)


def ours(cfg: DictConfig, method: str, clock: common.Clock) -> Found:
    """A fit, and what metrics.json would say of it."""
    results = common.fitted(cfg, clock)
    module = results.data
    metrics, rows, q = score(results), module.validation_rows, results.responsibilities
    kept = (
        "n_components",
        "n_components_fitted",
        "n_groups_with_gaps",
        "log_likelihood",
        "heldout_log_likelihood",
        "crossfit_log_likelihood",
    )
    kept += ("n_iterations", "converged", "inverse_temperature", "ece")
    said = {name: metrics[name] for name in kept if name in metrics}
    if module.data.labels is not None and rows.size:
        correct = match_cells(module.data.labels, q).correct[rows]
        said["ece_heldout"] = expected_calibration_error(q.max(1)[rows], correct)
        if results.inverse_temperature is not None:
            tempered = expected_calibration_error(results.probabilities[rows], correct)
            said |= {"ece_heldout_tempered": tempered, "log_loss_tempered": metrics["log_loss_tempered"]}
    if module.data.labels is not None and (tree := results.joins) is not None:
        with_gaps = group_probabilities(results.of_components, tree.groups(tree.n_with_gaps))
        said["ari_with_gaps"] = adjusted_rand_score(module.data.labels, with_gaps.argmax(1))
    return Found(module.data, q, said)


def peer(cfg: DictConfig, method: str, clock: common.Clock) -> Found:
    """A method of baselines.py on the same cells and genes."""
    with clock("run"):
        data = instantiate(cfg.data).data
        found = baselines.methods()[method].run(data, cfg.model.n_components, cfg.seed).found
    if found.ndim == 1:
        return Found(data, baselines.one_hot(found), {"log_loss": None})  # has no probabilities
    return Found(data, found, {})


def scores(found: Found) -> dict[str, Any]:
    """Agreement with the labels.

    ``least_recall`` is that of the label which is found least: the share of its cells in its own component;
    ``ari_batch`` the agreement with obs["batch"], which should be as low as the labels' own.
    """
    data, q = found.data, found.posterior
    row = {"n_cells": data.n_cells, "n_genes": data.n_genes, "n_found": len(np.unique(q.argmax(1)))}
    if data.labels is None:
        return row
    metrics, matched = clustering_metrics(data.labels, q), match_cells(data.labels, q)
    recall = np.bincount(matched.label_codes, weights=matched.correct) / np.bincount(matched.label_codes)
    row |= {name: metrics[name] for name in (*SCORES, "accuracy_majority")}
    row["least_recall"] = float(recall.min())
    if data.annotations is not None and "batch" in data.annotations.obs:
        row["ari_batch"] = adjusted_rand_score(data.annotations.obs["batch"], matched.assignments)
    return row


# All runs


def warm_up(methods: Sequence[str]) -> None:
    """Imports, and what numba compiles, by small fits that are not kept."""
    own = {"amortized", *PEERS}  # all others run what em does
    for method in sorted({method if method in own else "em" for method in methods}):
        row = measure(method, (*common.WARM_UP, *SETTINGS.get(method, ())), 0)
        if "error" in row:
            sys.exit(f"{method}: {row['error']}")


def run_all(
    record: common.Record, chosen: dict[str, DataSet], methods: Sequence[str], arguments: Any
) -> None:
    """Every run that is not recorded yet: all data sets and methods of a seed before the next seed."""
    code = common.code_state()
    for seed in arguments.seeds:
        for name, data in chosen.items():
            folder = arguments.work / "made" if name in MADE else arguments.data_dir
            for method in methods:
                if record.holds(name, method, seed):
                    continue
                settings = settings_of(data, method, folder)
                row = measure(method, settings, seed)
                # where the data lie is a matter of this machine
                told = [part.replace(f"{folder}/", "") for part in settings]
                run = {"data": name, "method": method, "seed": seed, "settings": told, "code": code}
                record.add(run | row)
                print(f"{name} {method} seed={seed}: {brief(row)}", file=sys.stderr, flush=True)


def brief(row: dict[str, Any]) -> str:
    """A run in one line."""
    if "error" in row:
        return row["error"]
    return f"ARI {row.get('ari', np.nan):.4f}, CPU s {row['cpu_seconds']:.1f}"


def available(names: Iterable[str], arguments: Any) -> dict[str, DataSet]:
    """The data sets whose files are there, or can be made; a line for each that is not."""
    chosen = {}
    for name in names:
        data = (REAL | MADE)[name]
        path = arguments.data_dir / f"{data.file}.h5ad"
        if name in MADE:
            path = arguments.work / "made" / f"{name}.h5ad"
            if not path.exists():
                made.write(name, arguments.data_dir, path)
        if path.exists():
            chosen[name] = data
        else:
            print(f"{name}: skipped, for there is no {path.name}", file=sys.stderr, flush=True)
    return chosen


# Tables and the plot

COLUMNS: dict[str, tuple[str, int]] = {  # title -> name in a row, digits
    "ARI": ("ari", 3),
    "NMI": ("nmi", 3),
    "accuracy": ("accuracy", 3),
    "least recall": ("least_recall", 2),
    "found": ("n_found", 1),
    "fitted": ("n_components_fitted", 1),
    "with gaps": ("n_groups_with_gaps", 1),
    "its ARI": ("ari_with_gaps", 3),
    "log loss": ("log_loss", 2),
    "held-out": ("heldout_log_likelihood", 2),
    "- em": ("above_em", 3),
    "ECE": ("ece_heldout", 3),
    "tempered": ("ece_heldout_tempered", 3),
    "CPU s": ("cpu_seconds", 1),
}


def with_differences(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with ``above_em``: held-out log likelihood minus that of em on the same cells."""
    runs_of_em = [row for row in rows if row["method"] == "em"]
    em = {(row["data"], row["seed"]): row.get("heldout_log_likelihood") for row in runs_of_em}
    found = []
    for row in rows:
        own, other = row.get("heldout_log_likelihood"), em.get((row["data"], row["seed"]))
        found.append(row | {"above_em": None if None in (own, other) else own - other})
    return found


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and standard deviation of what is there: "0.993 ± 0.002"."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    mean = f"{statistics.mean(there):.{digits}f}"
    return mean if len(there) == 1 else f"{mean} ± {statistics.stdev(there):.{digits}f}"


def show(rows: Sequence[dict[str, Any]], data: Sequence[str], methods: Sequence[str]) -> None:
    """A table of each data set; below it what failed, and what was warned of."""
    for name in data:
        measured = [row for row in rows if row["data"] == name and "error" not in row]
        if not measured:
            print(name, *_remarks(rows, name, methods), sep="\n")
            continue
        lines = []
        for method in methods:
            mine = [row for row in measured if row["method"] == method]
            if mine:
                of_seeds = [[row.get(key) for row in mine] for key, _ in COLUMNS.values()]
                digits = [digits for _, digits in COLUMNS.values()]
                ari, *others = (spread(*pair) for pair in zip(of_seeds, digits, strict=True))
                lowest = min((row["ari"] for row in mine if "ari" in row), default=None)
                lines.append([method, len(mine), ari, "" if lowest is None else f"{lowest:.3f}", *others])
        title = f"{name}: {measured[0]['n_cells']:,} cells x {measured[0]['n_genes']:,} genes, "
        title += f"K = {(REAL | MADE)[name].n_components}"
        title += f"; {made.KINDS[name].what}" if name in MADE else ""
        title += f"; load average up to {max(row['load_average'] for row in measured):.1f}"
        titles = ("method", "seeds", "ARI", "lowest", *list(COLUMNS)[1:])
        common.show(title, titles, lines, _remarks(rows, name, methods), width=170)
    common.say_states(rows)


def _remarks(rows: Sequence[dict[str, Any]], data: str, methods: Sequence[str]) -> list[str]:
    """Every failure and warning once for each method, with its seeds."""
    chosen = [row for row in rows if row["data"] == data and row["method"] in methods]
    return common.remarks(chosen, lambda row: f"seed {row['seed']}")


def plot(rows: Sequence[dict[str, Any]], data: Sequence[str], methods: Sequence[str]) -> Figure:
    """ARI: a panel a data set, a line a method, a point a seed; the bar is their mean."""
    rows = [row for row in rows if row.get("ari") is not None]
    shown = [name for name in data if any(row["data"] == name for row in rows)]
    listed = [method for method in methods if any(row["method"] == method for row in rows)]
    colors = dict(zip(GROUPS, ("#0072b2", "#56b4e9", "#009e73", "#d55e00"), strict=True))
    n_columns = min(5, len(shown))
    n_rows = -(-len(shown) // n_columns)
    size = (2.2 + 2.1 * n_columns, n_rows * (0.9 + 0.22 * len(listed)))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, shown, strict=False):
        for place, method in enumerate(listed):
            values = [row["ari"] for row in rows if (row["data"], row["method"]) == (name, method)]
            color = next(colors[group] for group, members in GROUPS.items() if method in members)
            axes.plot(values, [place] * len(values), "o", color=color, alpha=0.5, markersize=4, clip_on=False)
            if values:
                axes.plot(statistics.mean(values), place, "|", color="black", markersize=9, clip_on=False)
        axes.set(title=name, xlim=(min(0.0, *axes.get_xlim()), 1.0), yticks=range(len(listed)))
        axes.set_yticklabels(listed)
        axes.set_ylim(len(listed) - 0.5, -0.5)
        axes.grid(axis="x", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("adjusted Rand index")
    return figure


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the .h5ad files")
    names = (*REAL, "made", *MADE)
    parser.add_argument(
        "--data", choices=names, nargs="+", metavar="NAME", default=[*REAL], help=", ".join(names)
    )
    parser.add_argument(
        "--only", choices=GROUPS, nargs="+", metavar="GROUP", default=[*GROUPS], help=", ".join(GROUPS)
    )
    parser.add_argument("--methods", choices=METHODS, nargs="+", metavar="NAME", help=", ".join(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(10)])
    parser.add_argument("--json", metavar="OUT", type=Path, help="file for the figures; OUT.png is the plot")
    common.add_work(parser, "data sets that are made are")
    arguments = parser.parse_args()
    arguments.data_dir, arguments.work = arguments.data_dir.resolve(), arguments.work.resolve()
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    wanted = dict.fromkeys(n for name in arguments.data for n in (MADE if name == "made" else (name,)))
    methods = arguments.methods or [method for group in arguments.only for method in GROUPS[group]]
    chosen, record = available(wanted, arguments), common.Record(arguments.json, KEYS)
    if not chosen:
        sys.exit(f"--data-dir {arguments.data_dir}: has none of the files")
    if not all(record.holds(d, m, s) for d in chosen for m in methods for s in arguments.seeds):
        warm_up(methods)
        run_all(record, chosen, methods, arguments)
    rows = with_differences([r for r in record.rows if r["data"] in chosen and r["method"] in methods])
    show(rows, list(chosen), methods)
    if arguments.json and any("ari" in row for row in rows):
        plot(rows, list(chosen), methods).savefig(arguments.json.with_suffix(".png"))
    if any("error" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

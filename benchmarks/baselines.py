"""Other methods beside ours on one data set, in one table: Leiden, k-means, a Gaussian mixture, topics, scVI.

    python benchmarks/baselines.py --data pbmc_facs.h5ad --label-key cell_type --json baselines.json
    python benchmarks/baselines.py --data pbmc_facs.h5ad --populations cytotoxic_t regulatory_t

Each method goes from raw counts to clusters in a process of its own, after a warm-up that is not timed.
Beside ours they are the baselines that ``nbmix.evaluation.baselines`` holds; a new file there is a new row.

All see the true number of labels but leiden, and none the labels but logistic-*. "accuracy" pairs clusters
and labels one to one (Hungarian), "majority" gives every cluster its most frequent label, as the source
notebook does; seconds are those of the wall, CPU those of all threads. A supervised row names labels, so its
two accuracies are the share of right names. The extra nbmix[benchmarks] brings scanpy, igraph and leidenalg.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    import numpy as np

    from nbmix.data.counts import CountData
    from nbmix.evaluation.baselines.base import Baseline, Outcome

SHOWN = {"ari": "ARI", "nmi": "NMI", "accuracy": "accuracy", "accuracy_majority": "majority"}
WARM_UP_CELLS = 300


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one method on the file that ``arguments`` name; its scores and seconds."""
    import numpy as np
    import torch
    from sklearn.exceptions import ConvergenceWarning

    from nbmix.errors import InputError
    from nbmix.evaluation.metrics import clustering_metrics

    warnings.simplefilter("ignore", ConvergenceWarning)
    try:
        data = read(arguments)
        n_clusters = arguments.n_components or len(np.unique(data.labels))
        chosen = methods()[name]
        if chosen.warms_up and data.n_cells > WARM_UP_CELLS:
            # imports, and what numba and torch compile
            few = np.random.default_rng(0).choice(data.n_cells, WARM_UP_CELLS, replace=False)
            chosen.run(data.select_cells(np.sort(few)), n_clusters, arguments.seed)
        torch.manual_seed(arguments.seed)
        began, cpu = time.perf_counter(), time.process_time()
        found, said = chosen.run(data, n_clusters, arguments.seed)
        seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    except InputError as error:
        return {"error": str(error)}
    posterior = one_hot(found) if found.ndim == 1 else found
    metrics = clustering_metrics(data.labels, posterior)
    if chosen.supervised:  # it names labels, so nothing is matched
        metrics["accuracy"] = metrics["accuracy_majority"] = float(np.mean(found == data.labels))
    n_found = len(np.unique(posterior.argmax(1)))
    return metrics | seconds | {"n_clusters": n_found, "remark": said}


def methods() -> dict[str, Baseline]:
    """All by name: the baselines, and ours."""
    from nbmix import NBMixture
    from nbmix.evaluation.baselines.base import Baseline, Outcome, find_baselines

    def ours(model: str, start: str | None = None) -> Callable[[CountData, int, int], Outcome]:
        def fit(data: CountData, k: int, seed: int) -> Outcome:
            fitted = NBMixture(k, model=model, start=start, random_state=seed)
            fitted.fit(data.counts, size_factors=data.size_factors)
            steps = "iterations" if model == "em" else "epochs"
            return Outcome(fitted.responsibilities_, f"{fitted.n_iter_} {steps}")

        return fit

    every = [
        *find_baselines(),
        Baseline("em", "nbmix with its defaults, all cells fitted", ours("em")),
        Baseline("em-kmeans", "nbmix, EM from k-means", ours("em", "kmeans")),
        Baseline("amortized", "nbmix with its defaults, all cells fitted", ours("amortized")),
    ]
    return {one.name: one for one in every}


def one_hot(clusters: np.ndarray) -> np.ndarray:
    """(cells, clusters) of whole numbers or names."""
    import numpy as np

    values, codes = np.unique(clusters, return_inverse=True)
    return np.eye(len(values))[codes]


def read(arguments: argparse.Namespace) -> CountData:
    """The cells, with labels.

    Raises:
        InputError: the file cannot be used, or holds no labels.
    """
    from nbmix.data.read import read_h5ad
    from nbmix.errors import InputError

    data = read_h5ad(
        arguments.data,
        label_key=arguments.label_key,
        layer=arguments.layer,
        populations=arguments.populations,
        subsample=arguments.subsample,
        seed=arguments.seed,
    )
    if data.labels is None:
        raise InputError(
            f"--data {arguments.data}: obs has no column {arguments.label_key!r}; set --label-key"
        )
    return data


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print the table, and below it why a method is not in it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    table = Table()
    for column in ("method", "clusters", *SHOWN.values(), "seconds", "CPU", ""):
        table.add_column(column, justify="left" if column in ("method", "") else "right")
    for name, result in results.items():
        if "error" not in result:
            scores = [f"{result[key]:.3f}" for key in SHOWN]
            count = str(result["n_clusters"])
            seconds = [f"{result[key]:.1f}" for key in ("seconds", "cpu_seconds")]
            table.add_row(name, count, *scores, *seconds, result["remark"])
    console.print(table)
    for name in common.failed(results):
        console.print(f"{name}: {results[name]['error']}", markup=False, soft_wrap=True)


def main() -> None:
    every = methods()
    about = "\n".join(f"    {name:16} {one.about}" for name, one in every.items())
    parser = common.new_parser(f"{__doc__}\nThe methods:\n\n{about}", data="labelled raw counts")
    parser.add_argument("--label-key", default="cell_type", help="column of obs (default: %(default)s)")
    parser.add_argument("--layer", help="with the raw counts (default: X)")
    parser.add_argument("--populations", nargs="+", metavar="LABEL", help="labels to keep (default: all)")
    parser.add_argument("--subsample", type=int, metavar="N", help="cells to draw (default: all)")
    parser.add_argument("--n-components", type=int, metavar="K", help="default: the number of labels")
    parser.add_argument(
        "--only", nargs="+", choices=every, metavar="METHOD", help="default: all whose packages are installed"
    )
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data: give an .h5ad file")
    from nbmix.app.command import one_line_errors

    if arguments.measure is None:
        with one_line_errors():
            read(arguments)
    chosen = arguments.only or [name for name, one in every.items() if not one.missing]
    results = common.run_all(chosen, measure, arguments)
    if results is not None:
        show(results)
        for name in [] if arguments.only else [name for name in every if name not in chosen]:
            print(f"{name}: {', '.join(every[name].missing)} is not installed")
        if common.failed(results):
            sys.exit(1)


if __name__ == "__main__":
    main()

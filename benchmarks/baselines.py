"""Other methods beside ours on one data set, in one table: Leiden, k-means, a Gaussian mixture, topics, scVI.

    python benchmarks/baselines.py --data pbmc_facs.h5ad --label-key cell_type --json baselines.json
    python benchmarks/baselines.py --data pbmc_facs.h5ad --populations cytotoxic_t regulatory_t

The methods, each from raw counts to clusters in a process of its own, after a warm-up that is not timed:

    leiden           scanpy's path (normalise, log1p, 50 PCs, 15 neighbours), igraph Leiden, resolution 1
    leiden-k         the same at the resolution that gives the wanted number, searched for
    kmeans, gmm      on the 50, and on the first 20, of scanpy's PCs
    topics           Poisson NMF, 100 iterations; the largest topic of a cell
    em, amortized    nbmix with its defaults, all cells fitted
    em-kmeans        nbmix, EM from k-means
    scvi             k-means on the latent space of scVI; where scvi-tools is installed
    logistic-counts, logistic-size
                     no clustering: labels predicted for held-out tenths of the cells, from the counts and
                     from the size factor alone; what can be told at all, and what depth alone tells

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

SUPERVISED = ("logistic-counts", "logistic-size")
METHODS = (
    "leiden",
    "leiden-k",
    "kmeans",
    "gmm",
    "topics",
    "em",
    "em-kmeans",
    "amortized",
    "scvi",
    *SUPERVISED,
)
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
        run = method(name)
        if name not in SUPERVISED and name != "scvi" and data.n_cells > WARM_UP_CELLS:
            # imports, and what numba and torch compile
            few = np.random.default_rng(0).choice(data.n_cells, WARM_UP_CELLS, replace=False)
            run(data.select_cells(np.sort(few)), n_clusters, arguments.seed)
        torch.manual_seed(arguments.seed)
        began, cpu = time.perf_counter(), time.process_time()
        found, said = run(data, n_clusters, arguments.seed)
        seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    except InputError as error:
        return {"error": str(error)}
    posterior = one_hot(found) if found.ndim == 1 else found
    metrics = clustering_metrics(data.labels, posterior)
    if name in SUPERVISED:  # it names labels, so nothing is matched
        metrics["accuracy"] = metrics["accuracy_majority"] = float(np.mean(found == data.labels))
    n_found = len(np.unique(posterior.argmax(1)))
    return metrics | seconds | {"n_clusters": n_found, "remark": said}


def method(name: str) -> Callable[[CountData, int, int], tuple[np.ndarray, str]]:
    """(data, K, seed) -> clusters (cells,) or posterior (cells, K), and a remark."""
    from nbmix import NBMixture
    from nbmix.evaluation.baselines.kmeans import gaussian_mixture, kmeans
    from nbmix.evaluation.baselines.leiden import leiden, leiden_with, scanpy_graph
    from nbmix.evaluation.baselines.logistic import labels_from_counts, labels_from_size_factors
    from nbmix.evaluation.baselines.scvi_latent import scvi_kmeans
    from nbmix.evaluation.baselines.topics import topic_weights

    def searched(data: CountData, k: int, seed: int) -> tuple[np.ndarray, str]:
        found = leiden_with(scanpy_graph(data, seed), k, seed)
        return found.codes, f"resolution {found.resolution:.3g}"

    def mixture(model: str, start: str | None = None) -> Callable[..., tuple[np.ndarray, str]]:
        def fit(data: CountData, k: int, seed: int) -> tuple[np.ndarray, str]:
            fitted = NBMixture(k, model=model, start=start, random_state=seed)
            fitted.fit(data.counts, size_factors=data.size_factors)
            return fitted.responsibilities_, f"{fitted.n_iter_} {'iterations' if model == 'em' else 'epochs'}"

        return fit

    return {
        "leiden": lambda data, k, seed: (leiden(scanpy_graph(data, seed), 1.0, seed).codes, "resolution 1"),
        "leiden-k": searched,
        "kmeans": lambda data, k, seed: (kmeans(scanpy_graph(data, seed).pcs, k, seed), ""),
        "gmm": lambda data, k, seed: (gaussian_mixture(scanpy_graph(data, seed).pcs, k, seed), ""),
        "topics": lambda data, k, seed: (topic_weights(data, k, seed), ""),
        "em": mixture("em"),
        "em-kmeans": mixture("em", "kmeans"),
        "amortized": mixture("amortized"),
        "scvi": lambda data, k, seed: (scvi_kmeans(data, k, seed), ""),
        "logistic-counts": lambda data, k, seed: (labels_from_counts(data, seed), "held out, 10 folds"),
        "logistic-size": lambda data, k, seed: (labels_from_size_factors(data, seed), "held out, 10 folds"),
    }[name]


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
    parser = common.new_parser(__doc__, data="labelled raw counts")
    parser.add_argument("--label-key", default="cell_type", help="column of obs (default: %(default)s)")
    parser.add_argument("--layer", help="with the raw counts (default: X)")
    parser.add_argument("--populations", nargs="+", metavar="LABEL", help="labels to keep (default: all)")
    parser.add_argument("--subsample", type=int, metavar="N", help="cells to draw (default: all)")
    parser.add_argument("--n-components", type=int, metavar="K", help="default: the number of labels")
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", help=" ".join(METHODS))
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data: give an .h5ad file")
    from nbmix.app.command import one_line_errors
    from nbmix.evaluation.baselines.scvi_latent import is_installed

    if arguments.measure is None:
        with one_line_errors():
            read(arguments)
    chosen = arguments.only or [name for name in METHODS if name != "scvi" or is_installed()]
    results = common.run_all(chosen, measure, arguments)
    if results is not None:
        show(results)
        if common.failed(results):
            sys.exit(1)


if __name__ == "__main__":
    main()

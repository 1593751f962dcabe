"""Two checks on mix4: components fitted to the true labels, and one process against two.

    python benchmarks/checks.py --data pbmc_facs.h5ad --json checks.json

The first repeats the oracle of the source notebook, the second runs train.py twice.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import anndata as ad
import common
import numpy as np
import torch

from nbmix.core.batch import CellBatch
from nbmix.core.em_loop import StoppingRule, run_em
from nbmix.core.mixture import Mixture
from nbmix.core.settings import MixtureSettings
from nbmix.core.tables import batch_log_likelihood
from nbmix.data.counts import CountData
from nbmix.data.zheng import MIXTURES, read_zheng
from nbmix.starts.base import StartState, new_mixture, prepare
from nbmix.starts.clusters import KMeansStart, LabelsStart

CHECKS = ("oracle", "processes")


def train(arguments: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Run train.py and return its metrics.json, or what it said last if it failed."""
    command = [sys.executable, "train.py", *arguments, f"hydra.run.dir={folder}"]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads((folder / "metrics.json").read_text())


def oracle_check(data: CountData, seed: int = 0) -> dict[str, float]:
    """Components fitted to the true labels, and a fit that never saw them, after the source notebook.

    Both are plain maximum likelihood with uniform weights (folds=1, no pseudo-cells): the oracle is one M
    step on the labels, the other is EM to convergence from k-means. The expected log joint per cell is
    sum_k q_ik [ln p(x_i | k) + ln pi_k], with the labels as q of the oracle and the responsibilities as
    q of the fit. Plain EM hardly moves from where it starts, so this checks likelihood and M step, not
    the search for groups.

    Returns:
        oracle_accuracy: share of cells that the oracle's components assign to their own label.
        oracle_log_joint, fitted_log_joint: nats per cell, the counts' own constant ln x! included.
        relative_difference: |fitted - oracle| / |oracle|.
    """
    settings = MixtureSettings(
        len(np.unique(data.labels)), folds=1, pseudo_cells=0.0, weights="uniform", dtype="float64"
    )
    generator = np.random.default_rng(seed)
    basis, batches = prepare(data, 1, generator)

    def fitted(start: StartState, iterations: int) -> Mixture:
        mixture = new_mixture(data, settings, basis)
        run_em(
            mixture,
            batches,
            responsibilities=start.responsibilities,
            max_iterations=iterations,
            stopping=StoppingRule(tolerance=1e-8, patience=1),
        )
        return mixture

    labels = LabelsStart()(data, settings, generator)
    assert labels.responsibilities is not None
    oracle = fitted(labels, 1)
    assigned, _ = common.responsibilities_of(oracle, batches, data.n_cells)
    em = fitted(KMeansStart()(data, settings, generator), 200)
    q, _ = common.responsibilities_of(em, batches, data.n_cells)
    oracle_joint = expected_log_joint(oracle, batches, labels.responsibilities)
    fitted_joint = expected_log_joint(em, batches, q)
    same = assigned.argmax(1) == labels.responsibilities.argmax(1)
    return {
        "oracle_accuracy": float(same.double().mean()),
        "oracle_log_joint": oracle_joint,
        "fitted_log_joint": fitted_joint,
        "relative_difference": abs(fitted_joint - oracle_joint) / abs(oracle_joint),
    }


def expected_log_joint(mixture: Mixture, batches: Any, q: torch.Tensor) -> float:
    """Mean over cells of sum_k q_ik [ln p(x_i | k) + ln pi_k], nats."""
    total, n_cells = 0.0, 0
    for batch in batches:
        total += float((q[batch.rows] * log_joint(mixture, batch)).sum())
        n_cells += batch.n_cells
    return total / n_cells


def log_joint(mixture: Mixture, batch: CellBatch) -> torch.Tensor:
    """(cells, K) ln p(x_i | k) + ln pi_k."""
    return batch_log_likelihood(batch, mixture.basis, mixture.tables(0)) + mixture.log_prior(batch, 0)


def processes_check(path: Path, folder: Path) -> dict[str, Any]:
    """One process against two (DDP on the CPU): the same EM fit, and cells in the same order."""
    arguments = (
        "model=em",
        "start=kmeans",
        "data=mix4",
        f"data.path={path}",
        "model.n_components=4",
        "seed=0",
    )
    one = train(arguments, folder / "one")
    two = train((*arguments, "trainer.processes=2"), folder / "two")
    if "error" in one or "error" in two:
        return {"error": one.get("error", two.get("error"))}
    results = [ad.read_h5ad(folder / name / "result.h5ad") for name in ("one", "two")]
    difference = abs(one["log_likelihood"] - two["log_likelihood"]) / abs(one["log_likelihood"])
    return {
        "log_likelihood_one": one["log_likelihood"],
        "log_likelihood_two": two["log_likelihood"],
        "relative_difference": difference,
        "same_order": bool((results[0].obs_names == results[1].obs_names).all()),
        "largest_probability_difference": float(
            np.abs(results[0].obsm["X_nbmix"] - results[1].obsm["X_nbmix"]).max()
        ),
        "seconds_one": one["seconds"],
        "seconds_two": two["seconds"],
    }


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One of CHECKS."""
    path = Path(arguments.data).resolve()
    if name == "oracle":
        return oracle_check(read_zheng(MIXTURES["mix4"], path=path), arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        return processes_check(path, Path(folder))


def main() -> None:
    parser = common.new_parser(__doc__, data="sorted populations of Zheng et al. 2017")
    parser.add_argument("--only", choices=CHECKS, nargs="+", default=CHECKS)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data: give an .h5ad file")
    results = common.run_all([name for name in CHECKS if name in arguments.only], measure, arguments)
    if results is None:
        return
    for name, result in results.items():
        figures = [(key, repr(value)) for key, value in result.items()]
        common.show(name, ("", ""), figures)
    if common.failed(results):
        sys.exit(1)


if __name__ == "__main__":
    main()

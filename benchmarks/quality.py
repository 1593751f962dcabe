"""What the fits reach, by the command line that a user types: one table and a JSON file.

    python benchmarks/quality.py --data-dir DATA --seeds 0 1 2 --json quality.json

DATA holds pbmc_facs.h5ad (sorted populations of Zheng et al. 2017 in obs["cell_type"]) and, of CellBench,
cellbench_3cl_dropseq.h5ad, cellbench_5cl_celseq2.h5ad, cellbench_rnamix_celseq2.h5ad. Groups of runs can be
chosen with --only; ``auto`` leaves the number of components open.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from nbmix.data.counts import CountData
from nbmix.data.zheng import MIXTURES, read_zheng
from nbmix.mixture import Mixture, MixtureSettings, StoppingRule, responsibilities_of, run_em
from nbmix.products import CellBatch, batch_log_likelihood
from nbmix.start.base import StartState, new_mixture, prepare
from nbmix.start.clusters import KMeansStart, LabelsStart

ROOT = Path(__file__).resolve().parents[1]
CELLBENCH = {"3cl": ("3cl_dropseq", 3), "5cl": ("5cl_celseq2", 5), "rnamix": ("rnamix_celseq2", 7)}
SHOWN = ("n_components", "ari", "accuracy", "log_likelihood", "heldout_log_likelihood", "seconds")
N_COMPONENTS = {"mix2": 2, "mix4": 4, "mix10": 10}


class Run(NamedTuple):
    """One command: its group, what the table calls it, and its arguments to train.py."""

    group: str
    name: str
    seed: int
    arguments: tuple[str, ...]


def runs(data_dir: Path, seeds: list[int]) -> Iterator[Run]:
    """The commands that the table shows."""
    cells = {
        name: (
            f"data={name}",
            f"data.path={data_dir / 'pbmc_facs.h5ad'}",
            f"model.n_components={n_components}",
        )
        for name, n_components in N_COMPONENTS.items()
    } | {
        name: (
            "data=h5ad",
            f"data.path={data_dir / f'cellbench_{file}.h5ad'}",
            f"model.n_components={n_components}",
        )
        for name, (file, n_components) in CELLBENCH.items()
    }
    for seed in seeds:
        for name in cells:
            yield Run("random", f"em {name}", seed, ("model=em", *cells[name]))
        for name in ("mix2", "mix4", "3cl"):
            yield Run("kmeans", f"em start=kmeans {name}", seed, ("model=em", "start=kmeans", *cells[name]))
        for name in ("mix4", "mix10", "5cl"):
            yield Run("amortized", f"amortized {name}", seed, ("model=amortized", *cells[name]))
        for name in cells:
            open_number = (*cells[name][:-1], "model.n_components=auto")
            yield Run("auto", f"em {name}, K open", seed, ("model=em", *open_number))
    for seed in range(10):
        yield Run("simulation", "default: simulation, em start=random", seed, ())


def train(arguments: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Run train.py and return its metrics.json, or what it said last if it failed."""
    command = [sys.executable, "train.py", *arguments, f"hydra.run.dir={folder}"]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    wall = time.perf_counter() - began
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1], "wall_seconds": wall}
    return json.loads((folder / "metrics.json").read_text()) | {"wall_seconds": wall}


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
    assigned, _ = responsibilities_of(oracle, batches, data.n_cells)
    em = fitted(KMeansStart()(data, settings, generator), 200)
    q, _ = responsibilities_of(em, batches, data.n_cells)
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


def processes_check(data_dir: Path, folder: Path) -> dict[str, Any]:
    """One process against two (DDP on the CPU): the same EM fit, and cells in the same order."""
    arguments = (
        "model=em",
        "start=kmeans",
        "data=mix4",
        f"data.path={data_dir / 'pbmc_facs.h5ad'}",
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


def show(rows: list[dict[str, Any]], checks: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    console = Console(width=120)
    table = Table()
    for column in ("run", "seed", *SHOWN):
        table.add_column(column, justify="left" if column == "run" else "right")
    digits = {"ari": 3, "accuracy": 4, "seconds": 1}
    for row in rows:
        values = [f"{row[key]:.{digits.get(key, 3)}f}" if key in row else "" for key in SHOWN]
        table.add_row(row["name"], str(row["seed"]), *values)
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"{row['name']} seed {row['seed']}: {row['error']}", markup=False)
    for name, check in checks.items():
        console.print(name, json.dumps(check), soft_wrap=True)


GROUPS = ("random", "kmeans", "amortized", "auto", "simulation", "oracle", "processes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the .h5ad files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=GROUPS)
    parser.add_argument("--json", metavar="OUT", help="where to write the figures")
    arguments = parser.parse_args()
    data_dir = arguments.data_dir.resolve()
    rows: list[dict[str, Any]] = []
    checks: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, run in enumerate(runs(data_dir, arguments.seeds)):
            if run.group not in arguments.only:
                continue
            metrics = train((*run.arguments, f"seed={run.seed}"), folder / str(number))
            said = metrics.get("error") or {key: round(metrics[key], 4) for key in SHOWN if key in metrics}
            print(f"{run.name} seed={run.seed}: {said}", file=sys.stderr, flush=True)
            # the folder of the data is a matter of this machine
            command = ["train.py", *run.arguments, f"seed={run.seed}"]
            command = [part.replace(f"{data_dir}/", "") for part in command]
            rows.append(run._asdict() | {"arguments": command} | metrics)
        if "oracle" in arguments.only:
            data = read_zheng(MIXTURES["mix4"], path=data_dir / "pbmc_facs.h5ad")
            checks["oracle on mix4"] = oracle_check(data)
        if "processes" in arguments.only:
            checks["two processes against one"] = processes_check(data_dir, folder)
    show(rows, checks)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"runs": rows, "checks": checks}, indent=2) + "\n")


if __name__ == "__main__":
    main()

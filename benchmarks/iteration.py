"""Time and memory of one exact EM iteration, beside one gradient epoch of the dense textbook form.

    python benchmarks/iteration.py --data pbmc_facs.h5ad --json iteration.json

The data are the four populations of mix4 out of a file with their labels, or, without --data, a simulation of
the same size, depth and sparsity. Every measurement has a process of its own, started from one that holds no
data, so that its peak memory is its own. Run it on an idle machine: two threads that share their cores with
other work wait for each other, and took thirty times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

N_CELLS, N_GENES, N_COMPONENTS = 1505, 13705, 4  # mix4 of pbmc_facs
MEASUREMENTS = {
    "plain": "EM, folds=1",
    "crossfit": "EM, folds=5",
    "dense": "dense, one gradient epoch",
}
PARTS = ("e_step", "statistics", "m_step")


def read(path: str | None) -> Any:
    """The cells of mix4, or a simulation like them."""
    from nbmix.data.zheng import MIXTURES, read_zheng

    return simulated() if path is None else read_zheng(MIXTURES["mix4"], path=path)


def simulated() -> Any:
    """Cells of the model, thinned to unequal depths, with about the counts of mix4."""
    import numpy as np

    from nbmix import simulate
    from nbmix.data.counts import CountData

    deepest = 400.0
    simulation = simulate(N_CELLS, N_GENES, N_COMPONENTS, s=deepest, seed=0)
    generator = np.random.default_rng(0)
    share = np.clip(generator.lognormal(np.log(0.28), 0.4, N_CELLS), 0.03, 1)
    counts = simulation.counts.copy()
    # a thinned negative binomial is one of a smaller size factor
    kept = generator.binomial(counts.data.astype(np.int64), np.repeat(share, np.diff(counts.indptr)))
    counts.data = kept.astype(np.float32)
    counts.eliminate_zeros()
    names = [np.arange(n).astype(str) for n in counts.shape]
    return CountData(counts, share * deepest, *names, labels=simulation.labels.astype(str))


def measure_em(data: Any, folds: int, iterations: int) -> dict[str, Any]:
    """EM from random responsibilities: seconds of the parts of every iteration."""
    import numpy as np

    from nbmix.mixture import MixtureSettings
    from nbmix.start.base import new_mixture, prepare, random_responsibilities

    generator = np.random.default_rng(0)
    # what the command line does by default, and plain EM
    settings = MixtureSettings(N_COMPONENTS, folds, "auto" if folds > 1 else 0.0)
    began = time.perf_counter()
    basis, batches = prepare(data, folds, generator)
    prepared = time.perf_counter() - began
    mixture = new_mixture(data, settings, basis)
    start = random_responsibilities(data.n_cells, N_COMPONENTS, generator)
    steps: list[dict[str, float]] = []
    for iteration in range(iterations + 1):
        spent, cpu = dict.fromkeys(PARTS, 0.0), time.process_time()
        mixture.begin()
        for batch in batches:
            q = start[batch.rows]
            if iteration:
                q = timed(spent, "e_step", lambda b=batch: mixture.posterior(b).responsibilities)
            timed(spent, "statistics", lambda b=batch, r=q: mixture.collect(b, r))
        timed(spent, "m_step", lambda warm=iteration > 0: mixture.m_step(warm=warm))
        steps.append(spent | {"total": sum(spent.values()), "cpu": time.process_time() - cpu})
    first, *later = steps
    return {
        "nodes": basis.nodes.log_nodes.numel(),
        "pairs": basis.levels.n_pairs,
        "prepare_seconds": prepared,
        "first_m_step_seconds": first["m_step"],  # from a cold start
        "iterations": len(later),
        "seconds": {part: statistics.median(s[part] for s in later) for part in (*PARTS, "total", "cpu")},
        "slowest_total_seconds": max(s["total"] for s in later),
    }


def timed(spent: dict[str, float], part: str, work: Callable[[], Any]) -> Any:
    """Run ``work`` and add its seconds to ``spent[part]``."""
    began = time.perf_counter()
    result = work()
    spent[part] += time.perf_counter() - began
    return result


def measure_dense(data: Any, batch_size: int, repeats: int) -> dict[str, Any]:
    """One epoch of minibatch gradient steps on -E_q[ln p(x | z)] through (cells, K, genes) tensors."""
    import numpy as np
    import torch

    from nbmix.likelihood import dense_component_log_likelihood
    from nbmix.start.base import random_responsibilities

    generator = np.random.default_rng(0)
    q = random_responsibilities(data.n_cells, N_COMPONENTS, generator).float()
    sizes = torch.from_numpy(data.size_factors).float()
    pooled = np.log(np.asarray(data.counts.sum(0)).ravel() / data.size_factors.sum() + 1e-12)
    log_mean = torch.from_numpy(np.repeat(pooled[None], N_COMPONENTS, 0)).float().requires_grad_()
    log_inv_disp = torch.ones_like(log_mean).detach().requires_grad_()
    optimizer = torch.optim.Adam([log_mean, log_inv_disp], lr=1e-2)

    def epoch(limit: int) -> None:
        for begin in range(0, limit, batch_size):
            rows = slice(begin, begin + batch_size)
            counts = torch.from_numpy(data.counts[rows].toarray())
            optimizer.zero_grad()
            terms = dense_component_log_likelihood(counts, sizes[rows], log_mean, log_inv_disp)
            (-(q[rows] * terms).sum()).backward()
            optimizer.step()

    epoch(2 * batch_size)  # warm up
    seconds, cpu = [], []
    for _ in range(repeats):
        began, began_cpu = time.perf_counter(), time.process_time()
        epoch(data.n_cells)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    medians = {"total": statistics.median(seconds), "cpu": statistics.median(cpu)}
    return {"batch_size": batch_size, "epochs": repeats, "seconds": medians}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement in this process, with the peak resident memory of all of it."""
    import torch

    data = read(arguments.data)
    if name == "dense":
        measured = measure_dense(data, arguments.dense_batch, arguments.dense_epochs)
    else:
        measured = measure_em(data, 1 if name == "plain" else 5, arguments.iterations)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return measured | {
        "peak_gb": peak * (1 if sys.platform == "darwin" else 1024) / 1e9,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # above the number of threads, others had a share of the cores
        "data": {
            "file": None if arguments.data is None else Path(arguments.data).name,
            "n_cells": data.n_cells,
            "n_genes": data.n_genes,
            "nonzero": data.counts.nnz / (data.n_cells * data.n_genes),
        },
    }


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    some = next(iter(results.values()))
    data = some["data"]
    table = Table(
        title=f"{data['file'] or 'simulation'}: {data['n_cells']:,} cells x {data['n_genes']:,} genes, "
        f"{data['nonzero']:.1%} nonzero, K = {N_COMPONENTS}; "
        f"threads {some['threads']}, load average {max(r['load_average'] for r in results.values()):.1f}"
    )
    for column in ("", "E step s", "statistics s", "M step s", "total s", "slowest s", "CPU s", "peak GB"):
        table.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        seconds = result["seconds"]
        parts = [f"{seconds[part]:.3f}" if part in seconds else "" for part in PARTS]
        slowest = result.get("slowest_total_seconds")
        table.add_row(
            MEASUREMENTS[name],
            *parts,
            f"{seconds['total']:.3f}",
            "" if slowest is None else f"{slowest:.3f}",
            f"{seconds['cpu']:.3f}",
            f"{result['peak_gb']:.2f}",
        )
    console = Console(width=110)
    console.print(table)
    if {"dense", "plain"} <= set(results):
        for name in ("plain", "crossfit"):
            ratio = results["dense"]["seconds"]["total"] / results[name]["seconds"]["total"]
            console.print(f"one dense gradient epoch takes as long as {ratio:.0f} of: {MEASUREMENTS[name]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="FILE.h5ad", help="a file with the labels of mix4 in cell_type")
    parser.add_argument("--iterations", type=int, default=15, help="of EM, after the first")
    parser.add_argument("--dense-batch", type=int, default=64, help="cells in a batch of the dense form")
    parser.add_argument("--dense-epochs", type=int, default=2)
    parser.add_argument("--json", metavar="OUT", help="where to write the figures")
    parser.add_argument("--only", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments)))
        return
    results = {}
    for name in MEASUREMENTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        if done.returncode:
            sys.exit(done.returncode)
        results[name] = json.loads(done.stdout.splitlines()[-1])
    show(results)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

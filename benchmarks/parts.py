"""Cells that arrive in parts (``NBMixture.partial_fit``) beside EM on all of them: held-out nats and seconds.

    python benchmarks/parts.py --data pbmc_facs.h5ad --json parts.json

The matrix is the one of scale.py: cells of mix10, in random order. A tenth is held out; the others are fitted

    whole            at once, by ``NBMixture.fit``
    parts_N          in N parts of equal size, each met once, and in memory alone

and the log likelihood of the held-out cells is compared. Every measurement has a process of its own.
Labels are not looked at. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import sources

PARTS = (10, 60)


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in the process that it has to itself."""
    if name == "build":
        return sources.build_large(arguments)
    import numpy as np
    import scipy.sparse as sp

    import nbmix

    data, _ = sources.read_large(arguments)
    order = np.random.default_rng(arguments.seed).permutation(data.n_cells)
    held_out, fitted = np.split(order, [data.n_cells // 10])
    mixture = nbmix.NBMixture(arguments.components, random_state=arguments.seed)
    parts = [fitted] if name == "whole" else np.array_split(fitted, int(name.split("_")[1]))
    with tempfile.TemporaryDirectory(prefix="nbmix-benchmarks-") as folder:
        files = [Path(folder) / f"{number}.npz" for number in range(len(parts))]
        for rows, file in zip(parts, files, strict=True):
            sp.save_npz(file, data.counts[rows], compressed=False)
        unseen = data.counts[held_out]
        del data
        steps = []
        for file in files:
            counts, began, cpu = sp.load_npz(file), time.perf_counter(), time.process_time()
            mixture = mixture.fit(counts) if name == "whole" else mixture.partial_fit(counts)
            steps.append({"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu})
    return {
        "n_cells": fitted.size,
        "n_parts": len(parts),
        "n_held_out": held_out.size,
        "n_components": mixture.component_weights_.size,
        "seconds": sum(step["seconds"] for step in steps),
        "cpu_seconds": sum(step["cpu_seconds"] for step in steps),
        "first_cpu_seconds": steps[0]["cpu_seconds"],
        "heldout_log_likelihood": mixture.score(unseen),
    }


def rows(results: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """Lines of the table."""
    lines: list[list[Any]] = []
    whole = results.get("whole", {}).get("heldout_log_likelihood")
    for name, result in results.items():
        if "error" in result:
            lines.append([name, *[None] * 5, result["error"]])
            continue
        nats = result["heldout_log_likelihood"]
        gain = None if whole is None else nats - whole
        times = result["seconds"], result["cpu_seconds"], result["first_cpu_seconds"]
        lines.append([name, nats, gain, *times, f"{result['n_components']} components"])
    return lines


def main() -> None:
    parser = common.new_parser(
        __doc__, data="a file with populations in cell_type; default: a simulation", work=True
    )
    parser.add_argument("--components", type=int, default=10, help="K")
    parser.add_argument("--parts", type=int, nargs="+", default=PARTS, help="numbers of parts")
    arguments = parser.parse_args()
    if arguments.measure is None:
        sources.ensure_large(arguments)
    names = ["whole", *(f"parts_{number}" for number in arguments.parts)]
    results = common.run_all(names, measure, arguments)
    if results is None:
        return
    size = f"{arguments.cells:,} cells, a tenth held out, K = {arguments.components}"
    common.show(
        f"{size}; {common.conditions(results)}",
        ("", "held-out nats", "less whole", "seconds", "CPU s", "first part CPU s", ""),
        rows(results),
    )
    if common.failed(results):
        sys.exit(1)


if __name__ == "__main__":
    main()

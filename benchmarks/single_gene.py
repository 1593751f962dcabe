"""Fits of one gene over the source notebook's evaluation grid: iterations, time, and the gap to the maximum.

    python benchmarks/single_gene.py --json single_gene.json

log_mean from -12 to -6, log_inv_disp from 0 to 4, 5 trials: 175 simulated genes of 100 cells with size factor
1e5. Each is fitted by both EMs as they are, and by EM alone (accelerate=False). The gap is the log likelihood
of SciPy's bounded optimiser over ln r, or of the Poisson if that is higher, less the fit's, in nats.
It is negative where the fit ends higher.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from typing import Any

import common

SOURCE_SECONDS = 0.168  # a fit of the source notebook, on its machine
FITS = {
    "pois_gam": ("fit_pois_gam", True),
    "pois_log": ("fit_pois_log", True),
    "pois_gam_em_alone": ("fit_pois_gam", False),
    "pois_log_em_alone": ("fit_pois_log", False),
}
N_CELLS, SIZE_FACTOR = 100, 1e5


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One fit of every gene of the grid."""
    import warnings

    import nbmix.em
    import numpy as np
    import torch

    torch.set_num_threads(1)
    function, accelerate = FITS[name]
    fit = getattr(nbmix.em, function)
    warnings.filterwarnings("ignore", message="max_iters=", category=UserWarning)  # counted below
    genes = list(simulated_genes(arguments))
    fit(genes[0], SIZE_FACTOR, accelerate=accelerate)  # the first one also loads libraries
    rows = []
    for x in genes:
        wall, cpu = time.perf_counter(), time.process_time()
        found = fit(x, SIZE_FACTOR, max_iters=arguments.max_iters, accelerate=accelerate)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        iterations, falls = len(found.trace) - 1, (np.diff(found.trace) < 0).sum()
        poisson = np.isinf(found.log_inv_disp)
        rows.append((iterations, wall, cpu, scipy_maximum(x) - found.trace[-1], falls, poisson))
    iterations, wall, cpu, gap, falls, poisson = np.array(rows, dtype=float).T
    return {
        "fits": len(rows),
        "iterations": {"mean": iterations.mean(), "largest": int(iterations.max())},
        "seconds": {"mean": wall.mean(), "median": np.median(wall), "largest": wall.max()},
        "cpu_seconds": cpu.mean(),
        "gap": {"largest": gap.max(), "smallest": gap.min()},
        "short": int((gap > 1e-6).sum()),
        "falling": int((falls > 0).sum()),
        "poisson": int(poisson.sum()),
    }


def simulated_genes(arguments: argparse.Namespace) -> Any:
    """(cells,) counts of every point of the grid and trial, drawn as in the source."""
    import numpy as np

    grid = itertools.product(range(arguments.trials), np.linspace(-12, -6, 7), np.linspace(0, 4, 5))
    for trial, log_mean, log_inv_disp in grid:
        generator = np.random.default_rng(arguments.seed + trial)
        scale = np.exp(log_mean - log_inv_disp)
        rates = generator.gamma(shape=np.exp(log_inv_disp), scale=scale, size=N_CELLS)
        yield generator.poisson(SIZE_FACTOR * rates)


def scipy_maximum(x: Any) -> float:
    """Largest log likelihood for equal size factors: over ln r, at the mean of the counts."""
    import numpy as np
    from scipy.optimize import minimize_scalar
    from scipy.stats import nbinom, poisson

    mean = x.mean()

    def profile(log_inv_disp: float) -> float:
        r = np.exp(log_inv_disp)
        return -nbinom.logpmf(x, r, r / (r + mean)).sum()

    grid = np.linspace(-4, 10, 29)
    best = grid[np.argmin([profile(value) for value in grid])]
    bounds = (best - 0.5, best + 0.5)
    found = minimize_scalar(profile, bounds=bounds, method="bounded", options={"xatol": 1e-8})
    return max(-found.fun, poisson.logpmf(x, mean).sum())


def show(results: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the table."""
    lines = []
    for name, found in results.items():
        lines.append(
            [
                name.replace("_", " "),
                found["iterations"]["mean"],
                found["iterations"]["largest"],
                1e3 * found["seconds"]["mean"],
                1e3 * found["cpu_seconds"],
                SOURCE_SECONDS / found["seconds"]["mean"],
                found["gap"]["largest"],
                found["short"],
                found["falling"],
            ]
        )
    first = next(iter(results.values()))
    common.show(
        f"{first['fits']} genes of {N_CELLS} cells; {common.conditions(results)}",
        (
            "",
            "iterations",
            "most",
            "ms a fit",
            "CPU ms",
            "source / ours",
            "largest gap, nats",
            "gap > 1e-6",
            "falling traces",
        ),
        lines,
        [f"Fits stop after {arguments.max_iters} iterations. {first['poisson']} genes are Poisson."],
    )


def main() -> None:
    parser = common.new_parser(__doc__, data=None)
    parser.add_argument("--trials", type=int, default=5, help="of every point of the grid")
    parser.add_argument("--max-iters", type=int, default=1000, help="iterations of a fit at most")
    arguments = parser.parse_args()
    results = common.run_all(FITS, measure, arguments)
    if results is None:
        return
    if common.failed(results):
        sys.exit(1)
    show(results, arguments)


if __name__ == "__main__":
    main()

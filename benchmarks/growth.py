"""How the cost of EM, and of an amortized step, grows: one factor varied at a time around a base.

    python benchmarks/growth.py --json growth.json --plot growth.png

The data are simulated. Factors: cells, genes, components, density (the share of counts that are not 0), and
batch (cells in a minibatch of amortized inference, beside all cells for EM). Cells and genes scale the number
of counts too, which density varies alone. The cold M step is the first, from the weighted means; later ones
are warm, and quick where the components have settled. EM is plain unless --crossfit is given. A slope is that
of ln seconds against ln size: 0 is a cost that does not grow, 1 one in proportion.

Every point has a process of its own. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import common
import sources

EM_FACTORS = ("cells", "genes", "components", "density")
FACTORS = (*EM_FACTORS, "batch")
EM_SHOWN = ("prepare", "cold_m_step", *common.EM_PARTS, "total")
STEP_SHOWN = ("cut a batch", "step", "both")
LABELS = {
    "cells": "cells n",
    "genes": "genes p",
    "components": "components K",
    "density": "share of counts not 0",
    "batch": "cells in a batch",
}


def points(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Names of the measurements of every factor; a name is the JSON of its sizes."""
    base = {factor: getattr(arguments, factor) for factor in EM_FACTORS}
    found: dict[str, list[str]] = {}
    for factor in arguments.factors:
        middle = getattr(arguments, factor)
        sizes = [middle * multiple for multiple in sorted(arguments.multiples)]
        if factor != "density":
            sizes = [max(1, round(size)) for size in sizes]
        found[factor] = [json.dumps(base | {factor: size}) for size in sizes]
    return found


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One point, in the process that it has to itself."""
    sizes = json.loads(name)
    data = sources.simulated(
        sizes["cells"], sizes["genes"], sizes["components"], density=sizes["density"], seed=arguments.seed
    )
    measured = (measure_batch if "batch" in sizes else measure_em)(data, sizes, arguments)
    return measured | {"sizes": sizes, "data": sources.describe(data)}


def measure_em(data: Any, sizes: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Preparing, and the parts of an iteration."""
    from nbmix.core.settings import MixtureSettings

    folds, pseudo_cells = (5, "auto") if arguments.crossfit else (1, 0.0)
    timed, _ = common.time_em(
        data,
        MixtureSettings(sizes["components"], folds, pseudo_cells),
        common.partition(data, sizes["components"], arguments.seed),
        iterations=arguments.iterations,
        skipped=1,
        seed=arguments.seed,
    )
    shown = {"prepare": timed["prepare_seconds"], "cold_m_step": timed["first_m_step_seconds"]}
    return timed | {"shown": shown | {part: timed["seconds"][part] for part in (*common.EM_PARTS, "total")}}


def measure_batch(data: Any, sizes: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """A minibatch step on the ELBO."""
    timed = common.time_amortized_steps(
        data, sizes["batch"], sizes["components"], steps=arguments.steps, seed=arguments.seed
    )
    parts = (timed[key] for key in ("batch_seconds", "step_seconds", "seconds"))
    # shards are even, so a batch may hold fewer cells than were asked for
    return timed | {
        "sizes": sizes | {"batch": timed["cells_per_step"]},
        "shown": dict(zip(STEP_SHOWN, parts, strict=True)),
    }


def slope(sizes: list[float], seconds: list[float]) -> float | None:
    """Least squares slope of ln seconds against ln size."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    centre_x, centre_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - centre_x) ** 2 for a in x)
    if spread == 0:
        return None
    return sum((a - centre_x) * (b - centre_y) for a, b in zip(x, y, strict=True)) / spread


def curves(found: dict[str, list[str]], results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For every factor its sizes, numbers of counts, peaks, seconds of every part, and the slopes."""
    drawn: dict[str, dict[str, Any]] = {}
    for factor, names in found.items():
        good = [results[name] for name in names if "error" not in results[name]]
        if not good:
            continue
        # what was asked for, but for genes that drew no count
        sizes = [r["data"]["n_genes"] if factor == "genes" else r["sizes"][factor] for r in good]
        seconds = {part: [r["shown"][part] for r in good] for part in good[0]["shown"]}
        drawn[factor] = {
            "sizes": sizes,
            "nonzeros": [r["data"]["nonzeros"] for r in good],
            "seconds": seconds,
            "peak_gb": [r["peak_gb"] for r in good],
            "slopes": {part: slope(sizes, values) for part, values in seconds.items()},
        }
    return drawn


def show(drawn: dict[str, dict[str, Any]], title: str) -> None:
    """Print a table a factor."""
    for factor, curve in drawn.items():
        parts = list(curve["seconds"])
        lines: list[list[Any]] = []
        for at, size in enumerate(curve["sizes"]):
            seconds = [curve["seconds"][part][at] for part in parts]
            label = f"{size:.2%}" if factor == "density" else f"{size:,.0f}"
            lines.append([label, f"{curve['nonzeros'][at] / 1e6:.2f}", *seconds, curve["peak_gb"][at]])
        lines.append(["slope", None, *(_digits(curve["slopes"][part]) for part in parts), None])
        columns = [LABELS[factor], "M counts", *(f"{part.replace('_', ' ')} s" for part in parts), "peak GB"]
        common.show(title if factor == next(iter(drawn)) else "", columns, lines)


def _digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def plot(drawn: dict[str, dict[str, Any]], path: str) -> None:
    """A panel a factor: seconds of every part against its size, both logarithmic."""
    from matplotlib.figure import Figure

    columns = min(3, len(drawn))
    n_rows = -(-len(drawn) // columns)
    picture = Figure(figsize=(5 * columns, 3.2 * n_rows), layout="constrained")
    panels = picture.subplots(n_rows, columns, squeeze=False).ravel()
    colours = {part: f"C{number}" for number, part in enumerate(EM_SHOWN + STEP_SHOWN)}
    for panel, (factor, curve) in zip(panels, drawn.items(), strict=False):
        for part, seconds in curve["seconds"].items():
            rate = curve["slopes"][part]
            label = part.replace("_", " ") + ("" if rate is None else f" ({rate:.2f})")
            panel.loglog(curve["sizes"], seconds, "o-", markersize=3, color=colours[part], label=label)
        panel.set(xlabel=LABELS[factor], ylabel="seconds")
        names = [f"{size:.2%}" if factor == "density" else f"{size:,.0f}" for size in curve["sizes"]]
        panel.set_xticks(curve["sizes"], names, fontsize=7)
        panel.set_xticks([], minor=True)
        panel.legend(
            frameon=False,
            fontsize=7,
            title="(slope)",
            title_fontsize=7,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
        )
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    for panel in panels[len(drawn) :]:
        panel.set_visible(False)
    picture.savefig(path, dpi=150)


def main() -> None:
    parser = common.new_parser(__doc__, data=None)
    parser.add_argument("--cells", type=int, default=20000, help="of the base")
    parser.add_argument("--genes", type=int, default=5000)
    parser.add_argument("--components", type=int, default=8, help="K")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument(
        "--multiples", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4], help="of the base"
    )
    parser.add_argument("--factors", choices=FACTORS, nargs="+", default=FACTORS)
    parser.add_argument("--iterations", type=int, default=5, help="of EM that are timed")
    parser.add_argument("--steps", type=int, default=20, help="amortized, that are timed")
    parser.add_argument(
        "--crossfit", action="store_true", help="the default EM, with folds, in place of plain"
    )
    parser.add_argument("--plot", metavar="PNG", help="default: beside the JSON file")
    arguments = parser.parse_args()
    found = points(arguments)
    # the base belongs to every factor and is measured once
    results = common.run_all(dict.fromkeys(itertools.chain(*found.values())), measure, arguments)
    if results is None:
        return
    drawn = curves(found, results)
    form = "folds=5" if arguments.crossfit else "folds=1"
    show(drawn, f"EM, {form}, and amortized steps; {common.conditions(results)}")
    if arguments.json:
        written = json.loads(Path(arguments.json).read_text()) | {"curves": drawn}
        Path(arguments.json).write_text(json.dumps(written, indent=2) + "\n")
    picture = arguments.plot or (arguments.json and str(Path(arguments.json).with_suffix(".png")))
    if picture and drawn:
        plot(drawn, picture)
    if common.failed(results):
        sys.exit(1)


if __name__ == "__main__":
    main()

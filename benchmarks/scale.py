"""Seconds and memory at the size of a large experiment: EM, amortized inference, and the path of scanpy.

    python benchmarks/scale.py --data pbmc_facs.h5ad --json scale.json

The matrix has 94,655 cells x 16,791 genes and 69 million counts: cells made of two half-thinned cells of one
population of the file, or of a simulation where none is given. It is built once, and kept in --work.

    product          one product of the counts (torch CSR, float32, int32) with a dense (genes x K) matrix:
                     the unit of everything else
    plain, crossfit  parts of an EM iteration without and with cross-fitting ("iteration" is both)
    fit              a whole default fit in Python, from its random starts to groups of all cells
    fit_unjoined     the same with one component for each group
    command          the same by the command line, with prediction, scores and pictures
    amortized_epoch  train.py model=amortized for a few epochs
    amortized_fit    train.py model=amortized as it is
    scanpy           normalise, log1p, PCA, neighbours, Leiden (igraph), always on the CPU
    bandwidth        the products of an E step and of its statistics alone, beside a copy in memory: bytes
                     a second that their kernels ask for, of each entry its index and its row of the table

With --device cuda all but the random start, preparing and scanpy run on the GPU.
Every measurement has a process of its own. Labels are seen by plain and crossfit alone, which nothing scores,
so that their responsibilities look like those of a fit. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import common
import sources

MEASUREMENTS = (
    "product",
    "plain",
    "crossfit",
    "fit",
    "fit_unjoined",
    "command",
    "amortized_epoch",
    "amortized_fit",
    "scanpy",
    "bandwidth",
)
GROUPS = {"iteration": ("plain", "crossfit"), "amortized": ("amortized_epoch", "amortized_fit")}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in the process that it has to itself."""
    if name == "build":
        return sources.build_large(arguments)
    if name in ("command", "amortized_epoch", "amortized_fit"):
        return measure_command(name, arguments)
    if name == "scanpy":
        return measure_scanpy(arguments)
    data, reading = sources.read_large(arguments)
    if name == "product":
        measured = measure_product(data, arguments)
    elif name == "bandwidth":
        measured = measure_bandwidth(data, arguments)
    elif name in ("fit", "fit_unjoined"):
        measured = measure_fit(data, arguments, joined=name == "fit")
    else:
        measured = measure_iteration(data, name == "crossfit", arguments)
    return measured | {"read_seconds": reading, "data": sources.describe(data)}


def measure_product(data: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """One CSR x (genes x K) product."""
    import torch

    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
    counts = data.counts
    indptr, indices, values = map(torch.from_numpy, (counts.indptr, counts.indices, counts.data))
    matrix = torch.sparse_csr_tensor(indptr, indices, values, counts.shape, check_invariants=False)
    matrix = matrix.to(arguments.device)
    dense = torch.rand(data.n_genes, arguments.components, device=arguments.device)
    times = max(5, arguments.repeats)
    wall, cpu = common.repeat(lambda: matrix @ dense, warm_up=3, times=times, device=arguments.device)
    return {"seconds": wall, "cpu_seconds": cpu}


def measure_bandwidth(data: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes a second of the products, and of a copy (read and written)."""
    import numpy as np
    import torch

    from nbmix.starts.base import prepare

    device, n_components = arguments.device, arguments.components
    times = max(5, arguments.repeats)
    large = torch.rand(2, 2**27, device=device)
    seconds, _ = common.repeat(lambda: large[0].copy_(large[1]), warm_up=3, times=times, device=device)
    found = {"copy": {"seconds": seconds, "bytes": 4 * large.numel()}}
    prepared = prepare(data, 5, np.random.default_rng(arguments.seed), dtype=torch.float32)[1]
    batches = [batch.to(device) for batch in prepared]
    for name in ("e_step", "statistics"):
        work, n_bytes = [], 0
        for batch in batches:
            matrix, n_own = batch.pairs, batch.own_nodes.numel()
            width = 2 * n_components + (n_components + 2) * (n_own - 1) + 1  # of a table of steps
            if name == "statistics":
                matrix, width = batch.turned(), n_components * n_own
            table = torch.rand(matrix.n_columns, width, device=device)
            work.append((matrix, table))
            n_bytes += 4 * (matrix.indices.numel() * (1 + width) + matrix.n_rows * width)
        seconds, _ = common.repeat(
            lambda work=work: [matrix.matmul(table) for matrix, table in work],
            warm_up=2,
            times=times,
            device=device,
        )
        found[name] = {"seconds": seconds, "bytes": n_bytes}
    return {"products": found}


def measure_iteration(data: Any, crossfit: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """Parts of an EM iteration: what the command line does by default, or plain EM."""
    from nbmix.core.settings import MixtureSettings

    folds, pseudo_cells = (5, "auto") if crossfit else (1, 0.0)
    timed, _ = common.time_em(
        data,
        MixtureSettings(arguments.components, folds, pseudo_cells),
        common.partition(data, arguments.components, arguments.seed),
        iterations=arguments.iterations,
        skipped=2,
        seed=arguments.seed,
        device=arguments.device,
    )
    return timed


def measure_fit(data: Any, arguments: argparse.Namespace, *, joined: bool) -> dict[str, Any]:
    """A whole fit of all cells, up to their clusters; labels are read by the score alone."""
    from dataclasses import replace

    import numpy as np
    from sklearn.metrics import adjusted_rand_score

    from nbmix.core.em_loop import StoppingRule, run_em
    from nbmix.core.joins import group_probabilities
    from nbmix.core.settings import MixtureSettings, n_to_join
    from nbmix.starts.base import join_evidence, new_mixture, prepare
    from nbmix.starts.random import RandomStart

    n_groups = arguments.components
    settings = MixtureSettings(n_groups)
    if joined:
        settings = MixtureSettings(n_to_join(n_groups), n_groups=n_groups, may_be_fewer=True)
    generator = np.random.default_rng(arguments.seed)
    clock = common.Clock(arguments.device)
    with clock("start"):
        start = RandomStart()(data, settings, generator)
        settings = replace(settings, n_components=start.n_components)
    with clock("prepare"):
        basis, batches = prepare(data, settings.folds, generator, dtype=settings.torch_dtype)
        mixture = new_mixture(data, settings, basis, start).to(arguments.device)
        batches = [batch.to(arguments.device) for batch in batches]
    with clock("em"):
        run = run_em(
            mixture,
            batches,
            responsibilities=start.responsibilities,
            max_iterations=arguments.max_iterations,
            stopping=StoppingRule(),
        )
    with clock("assign"):
        q, log_likelihood = common.responsibilities_of(mixture, batches, data.n_cells)
        assigned = q.argmax(1).numpy()
    if settings.is_joined:
        with clock("join"):
            evidence = join_evidence(mixture, batches)
            assert evidence is not None  # there are folds
            assigned = group_probabilities(q.numpy(), evidence.tree().groups(n_groups)).argmax(1)
    seconds = {name: clock.seconds(name) for name in clock.wall}
    return {
        "seconds": seconds | {"total": sum(seconds.values())},
        "cpu_seconds": sum(clock.cpu_seconds(name) for name in clock.wall),
        "iterations": len(run.objective),
        "converged": run.converged,
        "crossfit_log_likelihood": log_likelihood,
        "n_components_used": len(np.unique(assigned)),
        "ari": None if data.labels is None else float(adjusted_rand_score(data.labels, assigned)),
    }


def measure_command(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """train.py as a user types it; this process holds no data, so the peak is the child's own."""
    with tempfile.TemporaryDirectory(prefix="nbmix-benchmarks-") as folder:
        record = Path(folder) / "clock.json"
        command = [
            *(
                sys.executable,
                "train.py",
                "data=h5ad",
                f"data.path={sources.large_path(arguments).resolve()}",
            ),
            *("model=em" if name == "command" else "model=amortized",),
            *(f"model.n_components={arguments.components}", f"seed={arguments.seed}"),
            *("evaluation.max_umap_cells=0", "logger=csv", f"hydra.run.dir={folder}/run"),
            f"trainer.gpus={int(arguments.device != 'cpu')}",
            *(
                "+callbacks.clock._target_=benchmarks.epoch_clock.EpochClock",
                f"+callbacks.clock.path={record}",
            ),
        ]
        if name == "amortized_epoch":
            # epochs of the encoder alone are cheaper, so one of them and then whole ones
            command += ["model.encoder_epochs=1", f"trainer.max_epochs={1 + arguments.epochs}"]
            command.append("model.heldout_tolerance=null")  # so many, whatever they gain
        if name != "command" and arguments.batch_size:
            command.append(f"data.batch_size={arguments.batch_size}")
        if name == "command":
            command.append(f"trainer.max_epochs={arguments.max_iterations}")
        command += arguments.overrides
        began = time.perf_counter()
        done = subprocess.run(command, cwd=common.ROOT, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - began
        if done.returncode:
            sys.exit(done.returncode)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        metrics = json.loads((Path(folder) / "run" / "metrics.json").read_text())
        epochs = json.loads(record.read_text())
    of_encoder = 0 if name == "command" else 1 if name == "amortized_epoch" else None
    return {
        "seconds": wall,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gb": common.peak_gb(resource.RUSAGE_CHILDREN),
        "median_epoch_seconds": statistics.median(epochs["epoch_seconds"][of_encoder:]),
        "ari": metrics.get("ari"),
        **epochs,
        "metrics": metrics,
    }


def measure_scanpy(arguments: argparse.Namespace) -> dict[str, Any]:
    """The usual path to clusters; some cells first, so that nothing is compiled while the clock runs."""
    import anndata as ad
    import numpy as np
    import scanpy as sc
    from sklearn.metrics import adjusted_rand_score

    began = time.perf_counter()
    adata = ad.read_h5ad(sources.large_path(arguments))
    reading = time.perf_counter() - began
    began = time.perf_counter()
    # below 8,192 cells scanpy finds neighbours by a way that needs no compiling
    few = np.sort(np.random.default_rng(0).choice(adata.n_obs, min(9000, adata.n_obs), replace=False))
    scanpy_path(sc, adata[few].copy(), arguments.seed)
    warming = time.perf_counter() - began
    cpu = time.process_time()
    clock = scanpy_path(sc, adata, arguments.seed)
    seconds = {name: clock.seconds(name) for name in clock.wall}
    labels, found = adata.obs.get("cell_type"), adata.obs["leiden"]
    return {
        "seconds": seconds | {"total": sum(seconds.values())},
        "cpu_seconds": time.process_time() - cpu,
        "read_seconds": reading,
        "warm_up_seconds": warming,
        "n_clusters": found.nunique(),
        "ari": None if labels is None else float(adjusted_rand_score(labels, found)),
    }


def scanpy_path(sc: Any, adata: Any, seed: int) -> common.Clock:
    """Seconds of every step."""
    clock = common.Clock()
    with clock("normalize_total"):
        sc.pp.normalize_total(adata)
    with clock("log1p"):
        sc.pp.log1p(adata)
    with clock("pca"):
        sc.pp.pca(adata, n_comps=min(50, min(adata.shape) - 1), random_state=seed)
    with clock("neighbors"):
        sc.pp.neighbors(adata, random_state=seed)
    with clock("leiden"):
        sc.tl.leiden(adata, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
    return clock


def rows(results: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """Lines of the table: name, seconds, units of the product, CPU seconds, peak GB, remarks."""
    unit = results.get("product", {}).get("seconds")
    lines: list[list[Any]] = []

    def add(name: str, seconds: float, result: dict[str, Any] | None = None, remark: str = "") -> None:
        cpu = None if result is None else result.get("cpu_seconds")
        peak = None if result is None else result["peak_gb"]
        lines.append([name, seconds, seconds / unit if unit else None, cpu, peak, remark])

    for name, result in results.items():
        if "error" in result:
            lines.append([name, None, None, None, None, result["error"]])
        elif name in GROUPS["iteration"]:
            seconds = result["seconds"]
            folds = "folds=1, pseudo_cells=0" if name == "plain" else "folds=5, pseudo_cells=auto"
            add(f"EM iteration, {folds}", seconds["total"], result | {"cpu_seconds": seconds["cpu"]})
            for part in common.EM_PARTS:
                add(f"  {part.replace('_', ' ')}", seconds[part])
            add("  first m step, once", result["first_m_step_seconds"])
            add("  prepare, once", result["prepare_seconds"])
            add("  read, once", result["read_seconds"])
        elif name in ("fit", "fit_unjoined", "scanpy"):
            seconds = result["seconds"]
            found = (
                f"{result['iterations']} iterations"
                if name != "scanpy"
                else f"{result['n_clusters']} clusters"
            )
            remark = found + ("" if result["ari"] is None else f", ARI {result['ari']:.3f}")
            add(f"{name}, without reading", seconds["total"], result, remark)
            for part in seconds:
                if part != "total":
                    add(f"  {part}", seconds[part])
            add("  read", result["read_seconds"])
        elif name == "product":
            add("product", result["seconds"], result)
        elif name == "bandwidth":
            copy = result["products"]["copy"]
            speed = copy["bytes"] / copy["seconds"]
            for part, product in result["products"].items():
                per_second = product["bytes"] / product["seconds"]
                asked = f"{per_second / 1e9:.0f} GB/s, {per_second / speed:.2f} of a copy"
                add(f"products of {part}" if part != "copy" else part, product["seconds"], None, asked)
        else:
            ari = "" if result["ari"] is None else f", ARI {result['ari']:.3f}"
            add(
                "train.py model=em" if name == "command" else f"train.py model=amortized ({name})",
                result["seconds"],
                result,
                f"{len(result['epoch_seconds'])} epochs{ari}",
            )
            add("  epoch", result["median_epoch_seconds"])
            add("  before the first", result["before_first_epoch_seconds"])
            add("  from reading to prediction", result["metrics"]["seconds"])
    return lines


def ratios(results: dict[str, dict[str, Any]]) -> list[str]:
    """Our fit beside scanpy's path, of the same run."""
    if not {"fit", "scanpy"} <= set(results) or common.failed(results):
        return []
    ours, theirs = results["fit"], results["scanpy"]
    time_ratio = theirs["seconds"]["total"] / ours["seconds"]["total"]
    memory_ratio = theirs["peak_gb"] / ours["peak_gb"]
    return [f"scanpy takes {time_ratio:.2f} times as long as fit, and {memory_ratio:.2f} times its memory"]


def main() -> None:
    parser = common.new_parser(
        __doc__, data="a file with populations in cell_type; default: a simulation", work=True
    )
    common.add_device(parser)
    parser.add_argument("--components", type=int, default=10, help="K")
    parser.add_argument("--iterations", type=int, default=8, help="of EM that plain and crossfit time")
    parser.add_argument("--max-iterations", type=int, default=100, help="of EM in fit and command")
    parser.add_argument("--repeats", type=int, default=9, help="of the product")
    parser.add_argument("--epochs", type=int, default=2, help="whole ones, of amortized_epoch")
    parser.add_argument("--batch-size", type=int, help="of amortized inference; default: the command line's")
    parser.add_argument(
        "--overrides", nargs="+", metavar="KEY=VALUE", default=[], help="further arguments to train.py"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=(*MEASUREMENTS, *GROUPS),
        default=MEASUREMENTS,
        help=f"some of: {', '.join((*MEASUREMENTS, *GROUPS))}",
    )
    arguments = parser.parse_args()
    if arguments.measure is None:
        sources.ensure_large(arguments)
    chosen = [part for name in arguments.only for part in GROUPS.get(name, (name,))]
    results = common.run_all([m for m in MEASUREMENTS if m in chosen], measure, arguments)
    if results is None:
        return
    some = next((r["data"] for r in results.values() if "data" in r), None)
    size = f"{arguments.cells:,} cells"
    if some:
        size = f"{some['n_cells']:,} cells x {some['n_genes']:,} genes, {some['nonzeros'] / 1e6:.1f} M counts"
    common.show(
        f"{size}, K = {arguments.components}; {common.conditions(results)}",
        ("", "seconds", "products", "CPU s", "peak GB", ""),
        rows(results),
        ratios(results),
    )
    if common.failed(results):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Seconds and memory of a fit whose counts stay on disk, beside the same work in memory.

    python benchmarks/stream.py --json stream.json

The file has 1,000,000 cells x 5,000 genes, about 3 % of them not 0 (150 million counts, 1.2 GB), drawn from a
mixture of negative binomials at unequal depths. It is written once, a block of cells at a time, and kept in
--work.

    backed, backed_plain    reading (the survey), and EM iterations on batches from the file, with and without
                            cross-fitting
    memory, memory_plain    the same on the first --memory-cells of it, in memory
    amortized, amortized_memory
                            steps of amortized inference on random batches of --batch-size cells, likewise
    command                 train.py data.backed=true for a few epochs, with prediction, scores and pictures

Every measurement has a process of its own. Labels only make responsibilities that look like those of a fit;
nothing is scored. The file is likely to be in the page cache. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    import h5py
    import numpy as np
    import scipy.sparse as sp

    from nbmix.data.counts import CountData

PARTS = ("wait", *common.EM_PARTS)
GROUPS = {
    "backed": ("backed", "backed_plain", "amortized"),
    "memory": ("memory", "memory_plain", "amortized_memory"),
}
MEASUREMENTS = (*GROUPS["backed"], *GROUPS["memory"], "command")
BLOCK_CELLS = 16384  # written at once
CHUNK = 2**18  # entries of a chunk of the file


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in the process that it has to itself."""
    if name == "build":
        return build(arguments)
    if name == "command":
        return measure_command(arguments)
    if name.startswith("amortized"):
        return measure_steps(arguments, in_memory=name in GROUPS["memory"])
    return measure_iterations(arguments, in_memory=name in GROUPS["memory"], plain=name.endswith("plain"))


# The file


def path_of(arguments: argparse.Namespace) -> Path:
    """The cached file that ``arguments`` describe."""
    size = f"{arguments.cells}x{arguments.genes}-{arguments.density:g}-{arguments.components}"
    return arguments.work / f"stream-{size}-{arguments.seed}.h5ad"


def build(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the file of ``path_of``."""
    path = path_of(arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    # an interrupted build leaves no file that looks whole
    part = path.with_name(f"{path.name}.{os.getpid()}")
    began = time.perf_counter()
    try:
        nonzeros = write_simulation(
            part,
            arguments.cells,
            arguments.genes,
            arguments.components,
            density=arguments.density,
            seed=arguments.seed,
        )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return {"build_seconds": time.perf_counter() - began, "nonzeros": nonzeros}


def write_simulation(
    path: Path, n_cells: int, n_genes: int, n_components: int, *, density: float, seed: int
) -> int:
    """An uncompressed .h5ad file with CSR counts and obs["cell_type"]; the number of counts."""
    import anndata as ad
    import h5py
    import numpy as np
    import pandas as pd
    from anndata.io import write_elem

    generator = np.random.default_rng(seed)
    codes = generator.integers(0, n_components, n_cells)
    with h5py.File(path, "w") as file:
        obs = pd.DataFrame(index=pd.Index([f"cell{i}" for i in range(n_cells)]))
        obs["cell_type"] = pd.Categorical.from_codes(codes, [f"component{k}" for k in range(n_components)])
        var = pd.DataFrame(index=pd.Index([f"gene{j}" for j in range(n_genes)]))
        write_elem(file, "/", ad.AnnData(obs=obs, var=var))
        del obs
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        group.attrs["shape"] = np.array([n_cells, n_genes])
        data = _growing(group, "data", "float32")
        indices = _growing(group, "indices", "int32")
        indptr = np.zeros(n_cells + 1, np.int64)
        for begin, block in simulated_blocks(codes, n_genes, n_components, density, generator):
            first = int(indptr[begin])
            for dataset, values in ((data, block.data), (indices, block.indices)):
                dataset.resize(first + block.nnz, axis=0)
                dataset[first:] = values
            indptr[begin + 1 : begin + 1 + block.shape[0]] = first + block.indptr[1:]
        group.create_dataset("indptr", data=indptr)
    return int(indptr[-1])


def _growing(group: h5py.Group, name: str, kind: str) -> h5py.Dataset:
    return group.create_dataset(name, shape=(0,), maxshape=(None,), chunks=(CHUNK,), dtype=kind)


def simulated_blocks(
    codes: np.ndarray, n_genes: int, n_components: int, density: float, generator: np.random.Generator
) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Blocks of cells of the given components, and where each begins; drawn as ``sources.simulated`` does."""
    import numpy as np
    import scipy.optimize
    import scipy.sparse as sp

    inv_disp = np.exp(generator.uniform(0, 4, (n_components, n_genes)))
    mean = np.exp(generator.uniform(-6, 0, (n_components, n_genes)))
    share = np.clip(generator.lognormal(np.log(0.5), 0.4, codes.size), 0.05, 1)  # of the deepest cell's depth
    typical = np.quantile(share, np.linspace(0.05, 0.95, 10))[:, None, None]
    some = slice(None, None, max(1, n_genes // 500))

    def excess(log_scale: float) -> float:
        ratio = np.exp(log_scale) * typical * mean[:, some] / inv_disp[:, some]
        return float(np.mean(-np.expm1(-inv_disp[:, some] * np.log1p(ratio)))) - density

    mean *= np.exp(scipy.optimize.brentq(excess, -20, 20))
    log_series = mean / (inv_disp + mean)
    for begin in range(0, codes.size, BLOCK_CELLS):
        own = codes[begin : begin + BLOCK_CELLS]
        parts = []
        for k in np.unique(own):
            rows = np.flatnonzero(own == k).astype(np.int32)
            number = generator.poisson(rows.size * inv_disp[k] * np.log1p(mean[k] / inv_disp[k]))
            gene = np.repeat(np.arange(n_genes, dtype=np.int32), number)
            cell = rows[generator.integers(0, rows.size, gene.size, dtype=np.int32)]
            size = generator.logseries(log_series[k][gene])
            depth = share[begin + cell]
            # thinned binomially; most clusters are single
            kept = (generator.random(gene.size, dtype=np.float32) < depth).astype(np.int32)
            large = np.flatnonzero(size > 1)
            kept[large] += generator.binomial(size[large] - 1, depth[large])
            there = np.flatnonzero(kept)
            parts.append((kept[there].astype(np.float32), cell[there], gene[there]))
        values, cell, gene = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        # a cell has one component, so its genes come in order
        block = sp.csr_matrix((values, (cell, gene)), shape=(own.size, n_genes))
        block.sum_duplicates()
        yield begin, block


# Measurements


def measure_iterations(arguments: argparse.Namespace, *, in_memory: bool, plain: bool) -> dict[str, Any]:
    """Reading, and the parts of an EM iteration on the batches that a fit would get."""
    import h5py
    import numpy as np

    from nbmix.core.settings import MixtureSettings
    from nbmix.data.read import read_h5ad

    path = path_of(arguments)
    began = time.perf_counter()
    data = read_h5ad(path, backed=True)
    reading, reading_peak = time.perf_counter() - began, common.peak_gb()
    if in_memory:
        data = data.select_cells(np.arange(min(arguments.memory_cells, data.n_cells))).load()
    with h5py.File(path, "r") as file:
        nonzeros = int(file["X/indptr"][data.n_cells])
    folds, pseudo_cells = (1, 0.0) if plain else (5, "auto")
    settings = MixtureSettings(arguments.components, folds, pseudo_cells)
    timed = time_batches(data, settings, arguments)
    return timed | {
        "read_seconds": None if in_memory else reading,
        "read_peak_gb": reading_peak,
        "seconds_per_nonzero": timed["seconds"]["total"] / nonzeros,
        "data": {
            "n_cells": data.n_cells,
            "n_genes": data.n_genes,
            "nonzeros": nonzeros,
            "density": nonzeros / (data.n_cells * data.n_genes),
        },
    }


def measure_steps(arguments: argparse.Namespace, *, in_memory: bool) -> dict[str, Any]:
    """Amortized inference on as many random batches as --memory-cells fill."""
    import h5py
    import numpy as np

    from nbmix.data.read import read_h5ad

    path = path_of(arguments)
    data = read_h5ad(path, backed=True)
    reading_peak, n_cells = common.peak_gb(), min(arguments.memory_cells, data.n_cells)
    if in_memory:
        data = data.select_cells(np.arange(n_cells)).load()
    with h5py.File(path, "r") as file:
        nonzeros = int(file["X/indptr"][data.n_cells])
    size = arguments.batch_size
    steps = max(1, n_cells // size - 2)
    timed = common.time_amortized_steps(data, size, arguments.components, steps=steps, seed=arguments.seed)
    return timed | {
        "read_peak_gb": reading_peak,
        "steps": steps,
        "seconds_per_nonzero": timed["mean_seconds"] / timed["cells_per_step"] / (nonzeros / data.n_cells),
        "data": {"n_cells": data.n_cells, "n_genes": data.n_genes, "nonzeros": nonzeros},
    }


def time_batches(data: CountData, settings: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the parts of an EM iteration, medians over those that follow the first.

    "wait" is what the batches take: cut out of the file, or made already.
    """
    from nbmix.data.module import CountsDataModule
    from nbmix.starts.base import new_mixture

    responsibilities = common.partition(data, arguments.components, arguments.seed)
    clock = common.Clock()
    with clock("prepare"):
        module = CountsDataModule(
            lambda: data,
            folds=settings.folds,
            validation_share=0.0,
            dtype=settings.dtype,
            seed=arguments.seed,
        )
        module.setup()
        loader = module.train_dataloader()
        mixture = new_mixture(data, settings, module.basis)
    steps: list[dict[str, float]] = []
    n_batches = 0
    for iteration in range(1 + arguments.iterations):
        parts, cpu, began = common.Clock(), time.process_time(), time.perf_counter()
        mixture.reset_statistics()
        batches, n_batches = iter(loader), 0
        while True:
            with parts("wait", add=True):
                batch = next(batches, None)
            if batch is None:
                break
            n_batches += 1
            q = responsibilities[batch.rows]
            if iteration:
                with parts("e_step", add=True):
                    q = mixture.posterior(batch).responsibilities
            with parts("statistics", add=True):
                mixture.collect(batch, q)
        with parts("m_step"):
            mixture.m_step(warm=iteration > 0, whole=True)
        seconds = {part: sum(parts.wall.get(part, [])) for part in PARTS}
        total = time.perf_counter() - began
        steps.append(seconds | {"total": total, "cpu": time.process_time() - cpu})
    later = steps[1:]
    return {
        "prepare_seconds": clock.seconds("prepare"),
        "first_seconds": steps[0]["total"],
        "iterations": len(later),
        "batches": n_batches,
        "seconds": {part: statistics.median(s[part] for s in later) for part in (*PARTS, "total", "cpu")},
        "all_total_seconds": [s["total"] for s in steps],
    }


def measure_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """train.py as a user types it; this process holds no data, so the peak is the child's own."""
    with tempfile.TemporaryDirectory(prefix="nbmix-benchmarks-") as folder:
        record = Path(folder) / "clock.json"
        command = [
            *(sys.executable, "train.py", "data=h5ad", f"data.path={path_of(arguments).resolve()}"),
            *("data.backed=true", f"model.n_components={arguments.components}", f"seed={arguments.seed}"),
            *("evaluation.max_umap_cells=0", "logger=csv", f"trainer.max_epochs={arguments.epochs}"),
            *(
                "+callbacks.clock._target_=benchmarks.epoch_clock.EpochClock",
                f"+callbacks.clock.path={record}",
            ),
            f"hydra.run.dir={folder}/run",
            *arguments.overrides,
        ]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=common.ROOT, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - began
        if done.returncode:
            sys.exit(done.returncode)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        metrics = json.loads((Path(folder) / "run" / "metrics.json").read_text())
        epochs = json.loads(record.read_text())
    return {
        "seconds": wall,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gb": common.peak_gb(resource.RUSAGE_CHILDREN),
        "median_epoch_seconds": statistics.median(epochs["epoch_seconds"]),
        **epochs,
        "metrics": metrics,
    }


# The table


def rows(results: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """Lines of the table: name, seconds, ns per nonzero, CPU seconds, peak GB, remarks."""
    lines: list[list[Any]] = []
    for name, result in results.items():
        if "error" in result:
            lines.append([name, *[None] * 4, result["error"]])
            continue
        if name == "command":
            found = f"{len(result['epoch_seconds'])} epochs"
            measured = (result["seconds"], None, result["cpu_seconds"], result["peak_gb"], found)
            lines.append(["train.py data.backed=true", *measured])
            lines.append(["  epoch", result["median_epoch_seconds"], *[None] * 4])
            lines.append(["  before the first", result["before_first_epoch_seconds"], *[None] * 4])
            lines.append(["  from reading to prediction", result["metrics"]["seconds"], *[None] * 4])
            continue
        if name.startswith("amortized"):  # means: blocks are waited for now and then
            per_nonzero, found = 1e9 * result["seconds_per_nonzero"], f"{result['steps']} steps"
            measured = (
                result["mean_seconds"],
                per_nonzero,
                result["mean_cpu_seconds"],
                result["peak_gb"],
                found,
            )
            lines.append([f"{name}: a step of {result['cells_per_step']:.0f} cells", *measured])
            continue
        seconds, nonzeros = result["seconds"], result["data"]["nonzeros"]
        folds = "folds=1, pseudo_cells=0" if name.endswith("plain") else "folds=5, pseudo_cells=auto"
        per_nonzero = 1e9 * result["seconds_per_nonzero"]
        found = f"{result['data']['n_cells']:,} cells, {result['batches']} batches"
        title = f"{name.removesuffix('_plain')}: EM iteration, {folds}"
        lines.append([title, seconds["total"], per_nonzero, seconds["cpu"], result["peak_gb"], found])
        for part in PARTS:
            label = f"  {part.replace('_', ' ')}"
            lines.append([label, seconds[part], 1e9 * seconds[part] / nonzeros, *[None] * 3])
        lines.append(["  first iteration", result["first_seconds"], *[None] * 4])
        lines.append(["  prepare, once", result["prepare_seconds"], *[None] * 4])
        if result["read_seconds"] is not None:
            lines.append(["  survey, once", result["read_seconds"], None, None, result["read_peak_gb"], None])
    return lines


def ratios(results: dict[str, dict[str, Any]]) -> list[str]:
    """From the file beside in memory, of the same run."""
    notes = []
    for backed, memory in zip(*GROUPS.values(), strict=True):
        if not {backed, memory} <= set(results) or common.failed({n: results[n] for n in (backed, memory)}):
            continue
        ratio = results[backed]["seconds_per_nonzero"] / results[memory]["seconds_per_nonzero"]
        notes.append(f"{backed} takes {ratio:.2f} times as long a nonzero as {memory}")
    return notes


def main() -> None:
    parser = common.new_parser(__doc__, data=None, work=True)
    parser.set_defaults(cells=1_000_000)
    parser.add_argument("--genes", type=int, default=5000)
    parser.add_argument("--density", type=float, default=0.03, help="share of counts that are not 0")
    parser.add_argument("--components", type=int, default=10, help="K")
    parser.add_argument("--memory-cells", type=int, default=100_000, help="of memory and memory_plain")
    parser.add_argument("--batch-size", type=int, default=1024, help="of amortized and amortized_memory")
    parser.add_argument("--iterations", type=int, default=3, help="of EM that are timed, after a first one")
    parser.add_argument("--epochs", type=int, default=3, help="of the command")
    parser.add_argument(
        "--overrides", nargs="+", metavar="KEY=VALUE", default=[], help="further arguments to train.py"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=MEASUREMENTS,
        default=MEASUREMENTS,
        help=f"some of: {', '.join(MEASUREMENTS)}",
    )
    arguments = parser.parse_args()
    if arguments.measure is None and not path_of(arguments).exists():
        built = common.alone("build")
        if "error" in built:
            sys.exit(f"{path_of(arguments)} could not be built: {built['error']}")
        print(
            f"built in {built['build_seconds']:.0f} s, peak {built['peak_gb']:.2f} GB",
            file=sys.stderr,
            flush=True,
        )
    results = common.run_all([m for m in MEASUREMENTS if m in arguments.only], measure, arguments)
    if results is None:
        return
    some = next((r["data"] for n, r in results.items() if n in GROUPS["backed"] and "data" in r), None)
    size = f"{arguments.cells:,} cells x {arguments.genes:,} genes"
    if some:
        size = f"{some['n_cells']:,} cells x {some['n_genes']:,} genes, {some['nonzeros'] / 1e6:.1f} M counts"
    common.show(
        f"{size}, K = {arguments.components}; {common.conditions(results)}",
        ("", "seconds", "ns a nonzero", "CPU s", "peak GB", ""),
        rows(results),
        ratios(results),
    )
    if common.failed(results):
        sys.exit(1)


if __name__ == "__main__":
    main()

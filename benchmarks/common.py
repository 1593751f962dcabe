"""What the benchmarks share: a process for every measurement, its clock and peak memory, and the data.

Only the standard library is imported above the functions. A child's peak memory counts from that of the
process it was started from, so the one that starts them must stay small.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import scipy.sparse as sp
    import torch

    from nbmix.core.mixture import Mixture
    from nbmix.core.settings import MixtureSettings
    from nbmix.data.counts import CountData

ROOT = Path(__file__).resolve().parents[1]
LARGE_CELLS = 94655  # as many as the ten populations of Zheng et al. (2017) hold before any choice
MIX4 = ("cytotoxic_t", "regulatory_t", "b_cells", "cd14_monocytes")
EM_PARTS = ("e_step", "statistics", "m_step")
BLOCK_CELLS = 4096

Measure = Callable[[str, argparse.Namespace], dict[str, Any]]


# Processes


def new_parser(description: str | None, *, data: str | None, work: bool = False) -> argparse.ArgumentParser:
    """A parser with the arguments of every benchmark; ``data`` is the help of ``--data``, None for none."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if data is not None:
        parser.add_argument("--data", metavar="FILE.h5ad", help=data)
    if work:
        add_work(parser, "the large matrix is")
        parser.add_argument("--cells", type=int, default=LARGE_CELLS, help="of the large matrix")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="OUT", help="where to write the figures")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


def add_work(parser: argparse.ArgumentParser, kept: str) -> None:
    """The argument ``--work``: a folder where something "is", or "are", kept."""
    parser.add_argument(
        "--work",
        metavar="DIR",
        type=Path,
        default=Path(tempfile.gettempdir()) / "nbmix-benchmarks",
        help=f"where {kept} kept for later runs (default: %(default)s)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """The argument ``--device``, of torch."""
    parser.add_argument(
        "--device", default="cpu", help="where the fits run: cpu or cuda (default: %(default)s)"
    )


def run_all(
    names: Iterable[str], measure: Measure, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]] | None:
    """Every measurement in a process of its own; None in such a process, which prints its result.

    The JSON file is written after every measurement, so that an interrupted run leaves what it has. One
    that fails leaves its exit status as "error".
    """
    if arguments.measure is not None:
        print(json.dumps(_measured(measure, arguments)))
        return None
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        results[name] = alone(name)
        print(f"{name}: {results[name].get('error') or 'done'}", file=sys.stderr, flush=True)
        if arguments.json:
            written = {"machine": machine(), "results": results}
            Path(arguments.json).write_text(json.dumps(written, indent=2) + "\n")
    return results


def alone(name: str) -> dict[str, Any]:
    """Run one measurement of this script in a fresh process."""
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), *sys.argv[1:], "--measure", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"error": f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _measured(measure: Measure, arguments: argparse.Namespace) -> dict[str, Any]:
    load = os.getloadavg()[0]  # before this process adds to it: above 0, others may share the cores
    began = time.perf_counter()
    result = measure(arguments.measure, arguments)
    result.setdefault("peak_gb", peak_gb())
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    if torch and torch.cuda.is_initialized():
        result["gpu"] = torch.cuda.get_device_name()
        result["gpu_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return result | {
        "process_seconds": time.perf_counter() - began,
        "threads": threads,
        "load_average": load,
    }


def responsibilities_of(mixture: Any, batches: Sequence[Any], n_cells: int) -> tuple[Any, float]:
    """(n_cells, K) responsibilities from copies that have not seen the cell, and nats per cell."""
    import torch

    q = torch.zeros(n_cells, mixture.settings.n_components, dtype=torch.float64)
    total = 0.0
    for batch in batches:
        found, log_likelihood = mixture.posterior(batch)
        q[batch.rows] = found.cpu()
        total += float(log_likelihood.sum())
    return q, total / n_cells


def peak_gb(who: int = resource.RUSAGE_SELF) -> float:
    """Largest resident memory so far, of this process or of its largest child, in 1e9 bytes."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    versions = {}
    for name in ("nbmix", "torch", "numpy", "scipy", "anndata", "scanpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def code_state() -> str:
    """A short hash of nbmix/ and conf/: figures of different ones are of different programs."""
    files = sorted([*(ROOT / "nbmix").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")])
    content = b"\0".join(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()[:8]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def failed(results: dict[str, dict[str, Any]]) -> list[str]:
    """Names of measurements that left an error."""
    return [name for name, result in results.items() if "error" in result]


# Time


class Clock:
    """Wall and CPU seconds of named pieces of work, as often as they were done.

    Work on a GPU is waited for at the end of each piece.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str, *, add: bool = False) -> Iterator[None]:
        """Time the body; ``add`` to the last entry of ``name`` rather than begin another."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        if self.device != "cpu":
            sys.modules["torch"].cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        for entries, spent in ((self.wall, wall), (self.cpu, cpu)):
            if add and name in entries:
                entries[name][-1] += spent
            else:
                entries.setdefault(name, []).append(spent)

    def seconds(self, name: str) -> float:
        """Median wall seconds."""
        return statistics.median(self.wall[name])

    def cpu_seconds(self, name: str) -> float:
        """Median CPU seconds of all threads."""
        return statistics.median(self.cpu[name])


def repeat(
    work: Callable[[], Any], *, warm_up: int = 1, times: int = 5, device: str = "cpu"
) -> tuple[float, float]:
    """Median wall and CPU seconds of ``work``."""
    clock = Clock(device)
    for turn in range(warm_up + times):
        with clock("warm up" if turn < warm_up else "work"):
            work()
    return clock.seconds("work"), clock.cpu_seconds("work")


def time_em(
    data: CountData,
    settings: MixtureSettings,
    responsibilities: torch.Tensor,
    *,
    iterations: int,
    skipped: int,
    seed: int,
    device: str = "cpu",
) -> tuple[dict[str, Any], Mixture]:
    """Seconds of preparing ``data`` and of the parts of an EM iteration.

    Medians over ``iterations`` that follow the first, whose M step is cold, and ``skipped`` more, in which
    components still move far.
    """
    import numpy as np

    from nbmix.starts.base import new_mixture, prepare

    few = data.select_cells(np.arange(min(512, data.n_cells)))
    prepare(few, settings.folds, np.random.default_rng(seed))  # warm up
    clock = Clock(device)
    with clock("prepare"):
        generator = np.random.default_rng(seed)
        basis, batches = prepare(data, settings.folds, generator, dtype=settings.torch_dtype)
        mixture = new_mixture(data, settings, basis)
    with clock("move"):
        mixture, batches = mixture.to(device), [batch.to(device) for batch in batches]
        responsibilities = responsibilities.to(device)
    steps: list[dict[str, float]] = []
    for iteration in range(1 + skipped + iterations):
        parts, cpu = Clock(device), time.process_time()
        mixture.reset_statistics()
        for batch in batches:
            q = responsibilities[batch.rows]
            if iteration:
                with parts("e_step", add=True):
                    q = mixture.posterior(batch).responsibilities
            with parts("statistics", add=True):
                mixture.collect(batch, q)
        with parts("m_step"):
            mixture.m_step(warm=iteration > 0, whole=True)
        seconds = {part: sum(parts.wall.get(part, [])) for part in EM_PARTS}
        steps.append(seconds | {"total": sum(seconds.values()), "cpu": time.process_time() - cpu})
    later = steps[1 + skipped :]
    timed = {
        "prepare_seconds": clock.seconds("prepare"),
        "move_seconds": clock.seconds("move"),
        "first_m_step_seconds": steps[0]["m_step"],
        "iterations": len(later),
        "seconds": {part: statistics.median(s[part] for s in later) for part in (*EM_PARTS, "total", "cpu")},
        "slowest_total_seconds": max(s["total"] for s in later),
        "all_total_seconds": [s["total"] for s in steps],
    }
    return timed, mixture


def time_amortized_steps(
    data: CountData,
    batch_size: int,
    n_components: int,
    *,
    steps: int,
    seed: int,
    warm_up: int = 2,
    device: str = "cpu",
) -> dict[str, Any]:
    """Seconds of a minibatch step on the ELBO by the model's own code: cutting the batch, and the step."""
    import torch

    from nbmix.core.em_loop import run_em
    from nbmix.core.settings import MixtureSettings
    from nbmix.data.module import CountsDataModule
    from nbmix.models.amortized import AmortizedMixture
    from nbmix.starts.base import new_mixture, prepare

    torch.manual_seed(seed)
    cells = CountsDataModule(
        lambda: data,
        batch_size=batch_size,
        validation_share=0.0,
        shuffle=True,
        seed=seed,
        dtype="float32",
    )
    cells.setup()
    model = AmortizedMixture(data.gene_names, n_components=n_components)
    model.mixture.attach(cells.basis, float(data.size_factors.sum()))
    # one M step, so that the components are of the size that a fit has them
    generator = _generator(seed)
    few = data.select_cells(generator.choice(data.n_cells, min(512, data.n_cells), replace=False))
    basis, batches = prepare(few, 1, generator)
    begin = new_mixture(few, MixtureSettings(n_components, 1, 1.0), basis)
    run_em(begin, batches, responsibilities=partition(few, n_components, seed), max_iterations=1)
    model.mixture.set_components(begin.components())
    model.to(device)
    optimizer = model.configure_optimizers()

    clock = Clock(device)
    iterator = iter(cells.train_dataloader())
    n_cells = []
    for step in range(warm_up + steps):
        kind = " (warm up)" if step < warm_up else ""
        with clock(f"batch{kind}"):
            batch = next(iterator, None)
            if batch is None:
                iterator = iter(cells.train_dataloader())
                batch = next(iterator)
            batch = batch.to(device)
        with clock(f"step{kind}"):
            optimizer.zero_grad()
            loss = -model.terms(batch).elbo.sum() / batch.n_cells
            loss.backward()
            optimizer.step()
            model.project()
        n_cells.append(batch.n_cells)
    per_step = statistics.mean(n_cells[warm_up:])
    return step_figures(clock, per_step, steps)


def step_figures(clock: Clock, cells_per_step: float, steps: int) -> dict[str, Any]:
    """What the "batch" and the "step" of minibatches took."""
    total = clock.seconds("batch") + clock.seconds("step")
    return {
        "steps": steps,
        "cells_per_step": cells_per_step,
        "batch_seconds": clock.seconds("batch"),
        "step_seconds": clock.seconds("step"),
        "seconds": total,
        "cpu_seconds": clock.cpu_seconds("batch") + clock.cpu_seconds("step"),
        "cells_per_second": cells_per_step / total,
    }


# Data


def partition(data: CountData, n_components: int, seed: int) -> torch.Tensor:
    """(cells, K) one-hot responsibilities like those of a fit: by the labels, else at random.

    Only for costs: what starts here is never scored.
    """
    import numpy as np

    from nbmix.starts.base import one_hot

    if data.labels is None:
        return one_hot(_generator(seed).integers(0, n_components, data.n_cells), n_components)
    # more components than labels: the labels in as many parts as it takes
    names, codes = np.unique(data.labels, return_inverse=True)
    parts = -(-n_components // len(names))
    codes = codes * parts + _generator(seed).integers(0, parts, data.n_cells)
    return one_hot(codes % n_components, n_components)


def large_path(arguments: argparse.Namespace) -> Path:
    """The cached file of the large matrix that ``arguments`` describe."""
    source = "simulated" if arguments.data is None else Path(arguments.data).stem
    return arguments.work / f"{source}-{arguments.cells}-{arguments.seed}.h5ad"


def ensure_large(arguments: argparse.Namespace) -> None:
    """Build the large matrix in a process of its own, unless its file is there. ``measure`` knows "build"."""
    path = large_path(arguments)
    if not path.exists() and "error" in (built := alone("build")):
        sys.exit(f"{path} could not be built: {built['error']}")


def build_large(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the file of ``large_path``."""
    began = time.perf_counter()
    data = large_counts(arguments.data, arguments.cells, arguments.seed)
    built = time.perf_counter()
    path = large_path(arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    # an interrupted build leaves no file that looks whole
    part = path.with_name(f"{path.name}.{os.getpid()}")
    write_counts(data, part)
    part.replace(path)
    return {
        "build_seconds": built - began,
        "write_seconds": time.perf_counter() - built,
        "nonzeros": data.counts.nnz,
    }


def read_large(arguments: argparse.Namespace) -> tuple[CountData, float]:
    """The large matrix, and the seconds that reading it took."""
    from nbmix.data.read import read_h5ad

    began = time.perf_counter()
    data = read_h5ad(large_path(arguments))
    return data, time.perf_counter() - began


def write_counts(data: CountData, path: Path) -> None:
    """An uncompressed .h5ad file with the labels in obs["cell_type"]."""
    import anndata as ad
    import pandas as pd

    obs = pd.DataFrame(index=data.cell_names)
    if data.labels is not None:
        obs["cell_type"] = pd.Categorical(data.labels)
    ad.AnnData(data.counts, obs=obs, var=pd.DataFrame(index=data.gene_names)).write_h5ad(path)


def large_counts(path: str | Path | None, n_cells: int = LARGE_CELLS, seed: int = 0) -> CountData:
    """A matrix of any number of cells that keeps the populations, genes and sparsity of a small one.

    A new cell is the sum of two cells of one population, each thinned binomially by half: its depth is that
    of a cell, and no two are the same. Populations are drawn in the proportions of the source.

    Args:
        path: .h5ad file with populations in obs["cell_type"]; None for a simulation of the size of
            pbmc_facs.
        n_cells: of the result.
        seed: of ``np.random.default_rng``.
    """
    import numpy as np
    import scipy.sparse as sp

    from nbmix.data.counts import CountData
    from nbmix.data.read import read_h5ad

    source = simulated(3774, 16791, 10, seed=seed) if path is None else read_h5ad(path)
    if source.labels is None:
        sys.exit(f'{path}: has no populations in obs["cell_type"]')
    generator = np.random.default_rng(seed)
    names, codes = np.unique(source.labels, return_inverse=True)
    sizes = np.bincount(codes)
    members, first = np.argsort(codes, kind="stable"), np.cumsum(sizes) - sizes
    drawn = generator.choice(sizes.size, n_cells, p=sizes / sizes.sum())  # (cells,) population
    parents = members[first[drawn] + generator.integers(0, sizes[drawn], (2, n_cells))]  # (2, cells)
    # as many as there can be: pages that are never written to take no memory
    most = int(np.diff(source.counts.indptr)[parents].sum())
    values, indices = np.empty(most, np.float32), np.empty(most, np.int32)
    indptr = np.zeros(n_cells + 1, np.int32 if most <= np.iinfo(np.int32).max else np.int64)
    for begin in range(0, n_cells, BLOCK_CELLS):
        rows = slice(begin, begin + BLOCK_CELLS)
        block = sum(halved(source.counts[parent[rows]], generator) for parent in parents)
        block.sort_indices()
        there = slice(int(indptr[begin]), int(indptr[begin]) + block.nnz)
        values[there], indices[there] = block.data, block.indices
        indptr[begin + 1 : begin + 1 + block.shape[0]] = there.start + block.indptr[1:]
    n_kept = int(indptr[-1])
    counts = sp.csr_matrix((values[:n_kept], indices[:n_kept], indptr), shape=(n_cells, source.n_genes))
    return CountData(
        counts,
        np.asarray(counts.sum(1, dtype=np.float64)).ravel(),
        np.char.add("cell", np.arange(n_cells).astype(str)),
        source.gene_names,
        labels=names[drawn],
    )


def halved(counts: sp.csr_matrix, generator: np.random.Generator) -> sp.csr_matrix:
    """``counts`` thinned binomially by half; changed in place."""
    import numpy as np

    # Binomial(x, 1/2) is the number of ones among x random bits
    bits = generator.integers(0, 2**64, counts.nnz, dtype=np.uint64)
    number = np.minimum(counts.data, 64).astype(np.uint64)
    kept = np.bitwise_count(bits >> (np.uint64(64) - number))
    deep = np.flatnonzero(counts.data > 64)
    more = generator.binomial(counts.data[deep].astype(np.int64) - 64, 0.5)
    counts.data = kept.astype(np.float32)
    counts.data[deep] += more
    counts.eliminate_zeros()
    return counts


def simulated(
    n_cells: int, n_genes: int, n_components: int, *, density: float = 0.043, seed: int = 0
) -> CountData:
    """Counts of the model at unequal depths, drawn without a dense matrix; ``density`` of them not 0.

    A negative binomial is a Poisson number -r ln(1 - w) of clusters with sizes of the logarithmic
    distribution in w = s mu / (r + s mu) (Quenouille 1949, Biometrics 5:162), and a thinned one is a
    negative binomial of a smaller size factor. Genes without a count are dropped.
    """
    import numpy as np
    import scipy.optimize
    import scipy.sparse as sp

    from nbmix.data.counts import CountData

    generator = np.random.default_rng(seed)
    inv_disp = np.exp(generator.uniform(0, 4, (n_components, n_genes)))
    mean = np.exp(generator.uniform(-6, 0, (n_components, n_genes)))
    share = np.clip(generator.lognormal(np.log(0.5), 0.4, n_cells), 0.05, 1)  # of the deepest cell's depth
    typical = np.quantile(share, np.linspace(0.05, 0.95, 10))[:, None, None]
    some = slice(None, None, max(1, n_genes // 500))

    def excess(log_scale: float) -> float:
        ratio = np.exp(log_scale) * typical * mean[:, some] / inv_disp[:, some]
        return float(np.mean(-np.expm1(-inv_disp[:, some] * np.log1p(ratio)))) - density

    mean *= np.exp(scipy.optimize.brentq(excess, -20, 20))
    codes = np.sort(generator.integers(0, n_components, n_cells))
    blocks = []
    for k in range(n_components):
        rows = np.flatnonzero(codes == k)
        if not rows.size:
            continue
        number = generator.poisson(rows.size * inv_disp[k] * np.log1p(mean[k] / inv_disp[k]))
        gene = np.repeat(np.arange(n_genes, dtype=np.int32), number)
        cell = generator.integers(0, rows.size, gene.size, dtype=np.int32)
        size = generator.logseries((mean[k] / (inv_disp[k] + mean[k]))[gene])
        kept = generator.binomial(size, share[rows][cell]).astype(np.float32)
        there = kept > 0
        entries = (kept[there], (cell[there], gene[there]))
        blocks.append(sp.csr_matrix(entries, shape=(rows.size, n_genes)))
    counts = sp.vstack(blocks, format="csr", dtype=np.float32)
    order = generator.permutation(n_cells)  # cells of a component need not lie together
    counts, codes = counts[order], codes[order]
    used = np.flatnonzero(np.bincount(counts.indices, minlength=n_genes))
    counts = counts[:, used]
    counts.sort_indices()
    return CountData(
        counts,
        np.asarray(counts.sum(1, dtype=np.float64)).ravel(),
        np.char.add("cell", np.arange(n_cells).astype(str)),
        np.char.add("gene", used.astype(str)),
        labels=np.char.add("component", codes.astype(str)),
    )


def describe(data: CountData) -> dict[str, Any]:
    """Size of a data set, for the record."""
    return {
        "n_cells": data.n_cells,
        "n_genes": data.n_genes,
        "nonzeros": int(data.counts.nnz),
        "density": data.counts.nnz / (data.n_cells * data.n_genes),
    }


def _generator(seed: int) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng(seed)


# Tables


def show(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    notes: Iterable[str] = (),
    width: int = 120,
) -> None:
    """Print a table of at most ``width`` characters, its first column flush left; None is left empty."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(figure(value) for value in row))
    console = Console(width=width)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def figure(value: Any) -> str:
    """A number in three digits, without an exponent where that stays readable."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 4
        return f"{value:,.{digits}f}"
    return f"{value:.2e}"


def conditions(results: dict[str, dict[str, Any]]) -> str:
    """Threads and load, for a title."""
    measured = [r for r in results.values() if "error" not in r]
    threads = {r["threads"] for r in measured if r.get("threads")}
    load = max((r["load_average"] for r in measured), default=0.0)
    known = f"threads {', '.join(map(str, sorted(threads)))}; " if threads else ""
    return f"{known}load average before a measurement up to {load:.1f}"

"""What the benchmarks share: processes and their clocks, fits by a config, records of runs, and tables.

Only the standard library is imported above the functions. A child's peak memory counts from that of the
process it was started from, so the one that starts them must stay small.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from omegaconf import DictConfig

    from nbmix.core.mixture import Mixture
    from nbmix.core.settings import MixtureSettings
    from nbmix.data.counts import CountData
    from nbmix.output.results import Results

ROOT = Path(__file__).resolve().parents[1]
LARGE_CELLS = 94655  # as many as the ten populations of Zheng et al. (2017) hold before any choice
MIX4 = ("cytotoxic_t", "regulatory_t", "b_cells", "cd14_monocytes")
EM_PARTS = ("e_step", "statistics", "m_step")
# settings of a fit that takes a moment, after which imports and what numba compiles are there
WARM_UP = ("data=sim", "data.n_cells=60", "data.n_genes=80", "model.n_components=2", "trainer.max_epochs=2")

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
    import numpy as np
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
    some = generator.choice(data.n_cells, min(512, data.n_cells), replace=False)
    few = data.select_cells(np.sort(some)).load()
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
        "mean_seconds": statistics.mean(clock.wall["batch"]) + statistics.mean(clock.wall["step"]),
        "mean_cpu_seconds": statistics.mean(clock.cpu["batch"]) + statistics.mean(clock.cpu["step"]),
        "cpu_seconds": clock.cpu_seconds("batch") + clock.cpu_seconds("step"),
        "cells_per_second": cells_per_step / total,
    }


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


def _generator(seed: int) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng(seed)


# Fits as train.py makes them, in this process


def configure(settings: Iterable[str], folder: str) -> DictConfig:
    """The config that train.py would get."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=[*settings, "logger=csv", f"output_dir={folder}"])


def fitted(cfg: DictConfig, clock: Clock) -> Results:
    """Fit and predict as ``nbmix.app.run`` does, which is "run" of the clock.

    Only scalars are written, to the folder of the config.
    """
    import pytorch_lightning as pl
    from hydra.utils import instantiate

    from nbmix.app.run import fit_from_config
    from nbmix.output.results import Results

    pl.seed_everything(cfg.seed, verbose=False)
    trainer = instantiate(cfg.trainer, enable_checkpointing=False)
    with clock("run"):
        fitted = fit_from_config(cfg, trainer)
    return Results(*fitted)


def watched(work: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` returns, given a folder that is deleted after it, and what it warned of.

    If it fails, "error" is in the place of its figures: others are still to be measured.
    """
    from nbmix.app.command import one_line

    log = _Messages(logging.WARNING)
    logging.getLogger().addHandler(log)
    load = os.getloadavg()[0]
    try:
        with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("always")
            row = work(folder)
    except Exception as error:
        caught, row = [], {"error": one_line(error)}
    finally:
        logging.getLogger().removeHandler(log)
    said = {f"{w.category.__name__}: {' '.join(str(w.message).split())}" for w in caught} | set(log.messages)
    return row | {"warnings": sorted(said), "load_average": load}


class _Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


# What was measured


class Record:
    """The rows measured so far, and their file if there is one.

    Args:
        path: the JSON file; rows that it holds are read.
        keys: entries of a row that say which run it is.
    """

    def __init__(self, path: Path | None, keys: Sequence[str]) -> None:
        self.path, self.keys = path, tuple(keys)
        there = path is not None and path.exists()
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if there else []

    def holds(self, *run: Any) -> bool:
        """Whether a run, named by the values of its keys, was measured, and did not fail."""
        return any(self._key(row) == run and "error" not in row for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, in place of an earlier one of the same run, and write the file."""
        from nbmix.output.writing import write_json

        self.rows = [old for old in self.rows if self._key(old) != self._key(row)] + [row]
        if self.path is not None:
            write_json(self.path, {"machine": machine(), "rows": self.rows})

    def _key(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in self.keys)


def remarks(rows: Iterable[dict[str, Any]], run: Callable[[dict[str, Any]], str]) -> list[str]:
    """Every failure and warning once for each method, with the runs that it is of, as ``run`` names them."""
    runs: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        failure = [f"failed: {row['error']}"] if "error" in row else []
        for line in (*failure, *row["warnings"]):
            runs.setdefault((row["method"], line), []).append(run(row))
    return [f"{method}, {' '.join(found)}: {line}" for (method, line), found in runs.items()]


def say_states(rows: Iterable[dict[str, Any]]) -> None:
    """A line where the rows are not all of one program."""
    if len(codes := {row["code"] for row in rows}) > 1:
        print(f"measured with {len(codes)} states of nbmix/ and conf/: {', '.join(sorted(codes))}")


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

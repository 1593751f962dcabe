"""Fits that are killed at random moments and go on: is the result the same, bit by bit?

    python benchmarks/faults.py --json faults.json

For each model one fit is left alone. Then the same command is started again and again, gets SIGKILL at a
random moment, and is given once more with ckpt_path=last. One kill in five comes before the first
checkpoint, the others between it and the end; how long that takes is known from the fit that was left alone.
Compared with it are all fields of result.h5ad, metrics.json but for the seconds, and last.ckpt and best.ckpt:
parameters, state of the optimizer and of the fit, trace. Figures are not drawn.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common

LAST = "checkpoints/last.ckpt"

DATA = ("data=sim", "data.n_cells=300", "data.n_genes=100", "data.batch_size=60", "start=kmeans")
MODELS = {
    "em": (*DATA, "model=em", "model.patience=1000", "trainer.max_epochs=150"),
    "amortized": (*DATA, "model=amortized", "trainer.max_epochs=100"),
}
QUICK = ("logger=csv", "evaluation.pictures=[]")  # pictures take most of the time and are not compared


def settings(model: str, folder: Path, *more: str) -> list[str]:
    """Of a fit into ``folder``."""
    return [*MODELS[model], *QUICK, f"hydra.run.dir={folder}", *more]


class Fit(NamedTuple):
    """How a process ended: its exit status, and CPU seconds to its first checkpoint and to its end."""

    status: int
    first_checkpoint: float
    end: float


def fit(model: str, folder: Path, *more: str, kill_at: tuple[bool, float] | None = None) -> Fit:
    """Run train.py into ``folder`` in a process of its own.

    The process has imported what it needs: seconds, and moments of death, are those of the work. They are
    of its own CPU time, so that other processes do not matter.

    Args:
        model, more: its settings.
        kill_at: whether seconds count from the first checkpoint or from the start, and how many they are.
    """
    if not (child := os.fork()):
        status = 1
        try:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.chdir(common.ROOT)
            sys.argv = ["train.py", *settings(model, folder, *more)]
            runpy.run_path("train.py", run_name="__main__")
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)
    first_checkpoint, killed = math.nan, False
    while True:
        seconds = cpu_seconds(child)
        if math.isnan(first_checkpoint) and (folder / LAST).is_file():
            first_checkpoint = seconds
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return Fit(os.waitstatus_to_exitcode(status), first_checkpoint, seconds)
        if kill_at is not None and not killed:
            since = seconds - first_checkpoint if kill_at[0] else seconds
            if killed := since >= kill_at[1]:  # never, while there is no checkpoint
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def cpu_seconds(child: int) -> float:
    """What a child process has used, also when it has ended and nobody has waited for it."""
    user, system = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def state_of(model: str, folder: Path) -> str:
    """How far a killed fit had come."""
    import torch

    if (folder / "metrics.json").is_file():
        return "finished"
    unfinished = sorted(file.name for file in folder.rglob("*.part") if file.name != "best.ckpt.part")
    writing = f", writing {' '.join(unfinished)}" if unfinished else ""
    if not (folder / LAST).is_file():
        return f"before the first checkpoint{writing}"
    iterations = torch.load(folder / LAST, weights_only=True)[model]["n_iterations"]
    return f"a checkpoint of epoch {iterations}{writing}"


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) of nested mappings and lists."""
    pairs = (
        value.items() if hasattr(value, "items") else enumerate(value) if isinstance(value, list) else None
    )
    if pairs is None:
        yield key, value
        return
    for name, inner in pairs:
        yield from flat(inner, f"{key}.{name}")


def contents(folder: Path) -> dict[str, Any]:
    """All that is compared of a run folder, by name."""
    import anndata as ad
    import numpy as np
    import torch

    found: dict[str, Any] = dict(flat(json.loads((folder / "metrics.json").read_text()), "metrics"))
    del found["metrics.seconds"]
    adata = ad.read_h5ad(folder / "result.h5ad")
    own = adata.uns.pop("nbmix")
    provenance = json.loads(own.pop("provenance"))
    del provenance["config"]["ckpt_path"]
    found |= flat({"provenance": provenance, "uns": {**adata.uns, "nbmix": own}}, "result")
    found = {key: value for key, value in found.items() if str(folder) not in str(value)}
    found |= {"result.X": adata.X.toarray(), **{f"result.obs.{k}": np.array(v) for k, v in adata.obs.items()}}
    found |= {f"result.{k}": v for f in (adata.obsm, adata.varm) for k, v in f.items()}
    for name in ("last", "best"):
        content = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        del content["callbacks"], content["nbmix"]["checksum"]  # paths
        found |= flat(content, name)
    return found


def differences(folder: Path, other: Path) -> list[str]:
    """Names of what is not the same in two run folders, bit by bit."""
    one, two = contents(folder), contents(other)
    names = {**one, **two}
    return [name for name in names if not (name in one and name in two and same(one[name], two[name]))]


def same(one: Any, two: Any) -> bool:
    """Whether two leaves hold the same bits; NaN is NaN."""
    import numpy as np

    one, two = np.asarray(one), np.asarray(two)
    return one.dtype == two.dtype and np.array_equal(one, two, equal_nan=one.dtype.kind == "f")


def trials(model: str, arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The fit that is left alone, and one trial after the other."""
    whole = folder / model
    fit(model, folder / f"{model}-warm-up")  # so that moments are drawn from as long as the others take
    alone = fit(model, whole)
    if alone.status:
        raise RuntimeError(f"the fit that nothing happens to ends with {alone.status}")
    yield {"moment": "", "state": "left alone", **alone._asdict(), "differences": []}
    moments = random.Random(arguments.seed)
    for number in range(arguments.trials):
        killed = folder / f"{model}-{number}"
        after = number % 5 > 0
        seconds = moments.uniform(0, alone.end - alone.first_checkpoint if after else alone.first_checkpoint)
        ended = fit(model, killed, kill_at=(after, seconds))
        state = state_of(model, killed)
        again = fit(model, killed, "ckpt_path=last")
        yield {
            "moment": f"{seconds:.2f} s after {'its first checkpoint' if after else 'the start'}",
            "killed": ended.status == -signal.SIGKILL,
            "state": state,
            "exit_status": again.status,
            "differences": differences(whole, killed) if again.status == 0 else ["no result"],
        }
        shutil.rmtree(killed)


def main() -> None:
    parser = common.new_parser(__doc__, data=None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--trials", type=int, default=10, help="kills of each model (default: %(default)s)")
    arguments = parser.parse_args()
    sys.path.insert(0, str(common.ROOT))
    importlib.import_module("nbmix.app.main")
    results: dict[str, list[dict[str, Any]]] = {}
    print(f"{'model':10} {'killed':>35}  {'it had':40} the same bits")
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            results[model] = []
            for trial in trials(model, arguments, Path(folder)):
                results[model].append(trial)
                same = "yes" if not trial["differences"] else f"NO: {', '.join(trial['differences'][:5])}"
                print(f"{model:10} {trial['moment']:>35}  {trial['state']:40} {same}", flush=True)
                if arguments.json:
                    written = {"machine": common.machine(), "results": results}
                    Path(arguments.json).write_text(json.dumps(written, indent=2) + "\n")
    if any(trial["differences"] for rows in results.values() for trial in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

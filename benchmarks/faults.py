"""Fits that are killed at random moments and go on: is the result the same, bit by bit?

    python benchmarks/faults.py --json faults.json

For each model one fit is left alone. Then the same command is started again and again, gets SIGKILL at a
random moment, and is given once more with ckpt_path=last. Compared with the fit that was left alone are all
fields of result.h5ad, metrics.json but for the seconds, and last.ckpt and best.ckpt: parameters, state of the
optimizer and of the fit, trace. Figures are not drawn.
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
from typing import Any

import common

DATA = ("data=sim", "data.n_cells=300", "data.n_genes=100", "data.batch_size=60", "start=kmeans")
MODELS = {
    "em": (*DATA, "model=em", "model.patience=100", "trainer.max_epochs=30"),
    "amortized": (*DATA, "model=amortized", "trainer.max_epochs=30"),
}
QUICK = ("logger=csv", "evaluation.max_umap_cells=0")


def settings(model: str, folder: Path, *more: str) -> list[str]:
    """Of a fit into ``folder``."""
    return [*MODELS[model], *QUICK, f"hydra.run.dir={folder}", *more]


def fit(words: list[str], kill_after: float = math.inf) -> tuple[int, float]:
    """Run train.py with these settings in a process of its own, and kill it; its status and its seconds.

    The process has imported what it needs: seconds, and moments of death, are those of the work.
    """
    began = time.perf_counter()
    if not (child := os.fork()):
        status = 1
        try:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.chdir(common.ROOT)
            sys.argv = ["train.py", *words]
            runpy.run_path("train.py", run_name="__main__")
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.perf_counter() - began
        if done:
            return os.waitstatus_to_exitcode(status), seconds
        if seconds >= kill_after:
            os.kill(child, signal.SIGKILL)
            kill_after = math.inf
        time.sleep(0.002)


def state_of(folder: Path) -> str:
    """How far a killed fit had come."""
    import torch

    if (folder / "metrics.json").is_file():
        return "finished"
    last = folder / "checkpoints" / "last.ckpt"
    if not last.is_file():
        return "before the first checkpoint"
    content = torch.load(last, weights_only=True)
    model = content["nbmix"]["model"]
    return f"after epoch {content[model]['n_iterations']}"


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
    fit(settings(model, folder / "warm-up"))  # so that moments are drawn from as long as the others take
    shutil.rmtree(folder / "warm-up", ignore_errors=True)
    status, seconds = fit(settings(model, whole))
    if status:
        raise RuntimeError(f"the fit that nothing happens to ends with {status}")
    yield {"moment": None, "state": "left alone", "seconds": seconds, "differences": []}
    moments = random.Random(arguments.seed)
    for number in range(arguments.trials):
        killed = folder / f"{model}-{number}"
        moment = moments.uniform(0, seconds)
        status, _ = fit(settings(model, killed), kill_after=moment)
        state = state_of(killed)
        again, _ = fit(settings(model, killed, "ckpt_path=last"))
        yield {
            "moment": moment,
            "killed": status == -signal.SIGKILL,
            "state": state,
            "exit_status": again,
            "differences": differences(whole, killed) if again == 0 else ["no result"],
        }
        shutil.rmtree(killed)


def main() -> None:
    parser = common.new_parser(__doc__, data=None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--trials", type=int, default=10, help="kills of each model (default: %(default)s)")
    arguments = parser.parse_args()
    sys.path.insert(0, str(common.ROOT))
    importlib.import_module("nbmix.sweep")
    # figures take most of the time and are not compared; mypy knows no attributes of modules found by name
    importlib.import_module("nbmix.evaluation.results").draw = lambda *_: {}  # type: ignore[attr-defined]
    results: dict[str, list[dict[str, Any]]] = {}
    print(f"{'model':10} {'killed at':>10}  {'it was':28} the same bits")
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            results[model] = []
            for trial in trials(model, arguments, Path(folder)):
                results[model].append(trial)
                at = "" if trial["moment"] is None else f"{trial['moment']:.1f} s"
                same = "yes" if not trial["differences"] else f"NO: {', '.join(trial['differences'][:5])}"
                print(f"{model:10} {at:>10}  {trial['state']:28} {same}", flush=True)
                if arguments.json:
                    written = {"machine": common.machine(), "results": results}
                    Path(arguments.json).write_text(json.dumps(written, indent=2) + "\n")
    if any(trial["differences"] for rows in results.values() for trial in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

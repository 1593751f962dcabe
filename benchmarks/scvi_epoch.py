"""An epoch of amortized inference beside one of scVI, as installed from its package, on the CPU.

    python benchmarks/scvi_epoch.py --data pbmc_facs.h5ad --peer-python PEERS/bin/python --json scvi.json

The cells are those of ``scale.py``. PEERS is an environment with scvi-tools, which need not have nbmix.
scVI has its defaults: batches of 128, one hidden layer of 128 units, 10 latent dimensions, all genes. nbmix
has those of ``model=amortized``, as many components as 10 groups are given, and trains encoder and
components. Both are trained by Lightning, without loggers and held-out cells. The first pass is not timed.
Sides take turns, each in a process of its own; seconds are those between the hooks around an epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import common
import sources

SCVI = """
import json, sys, time
import anndata as ad, lightning.pytorch as pl, numpy as np, scvi
path, n_cells, epochs, threads = sys.argv[1], *map(int, sys.argv[2:])
import torch
torch.set_num_threads(threads)
cells = ad.read_h5ad(path)
rows = np.random.default_rng(0).choice(cells.n_obs, min(n_cells, cells.n_obs), replace=False)
cells = cells[np.sort(rows)].copy()
scvi.model.SCVI.setup_anndata(cells)
model = scvi.model.SCVI(cells)
class Clock(pl.Callback):
    wall, cpu = [], []
    def on_train_epoch_start(self, *_):
        self.begun = time.perf_counter(), time.process_time()
    def on_train_epoch_end(self, *_):
        self.wall.append(time.perf_counter() - self.begun[0])
        self.cpu.append(time.process_time() - self.begun[1])
clock = Clock()
model.train(max_epochs=1 + epochs, train_size=1.0, accelerator="cpu", callbacks=[clock], logger=False,
            enable_progress_bar=False)
timed = {"wall": clock.wall[1:], "cpu": clock.cpu[1:]}
print(json.dumps({"cells": cells.n_obs, "version": scvi.__version__} | timed))
"""


def of_scvi(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of scVI's epochs, in the environment that has it."""
    numbers = map(str, (arguments.some, arguments.epochs, arguments.threads))
    path = str(sources.large_path(arguments).resolve())
    done = subprocess.run([arguments.peer_python, "-c", SCVI, path, *numbers], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def of_nbmix(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of epochs in which encoder and components learn."""
    import numpy as np
    import pytorch_lightning as pl
    import torch

    from nbmix.core.parameters import Components
    from nbmix.core.settings import n_to_join
    from nbmix.data.module import CountsDataModule
    from nbmix.models.amortized import AmortizedMixture
    from nbmix.starts.base import StartState
    from nbmix.training.trainer import build_trainer

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.wall: list[float] = []
            self.cpu: list[float] = []

        def on_train_epoch_start(self, *_: Any) -> None:
            self.begun = time.perf_counter(), time.process_time()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.wall.append(time.perf_counter() - self.begun[0])
            self.cpu.append(time.process_time() - self.begun[1])

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    data, _ = sources.read_large(arguments)
    rows = np.random.default_rng(0).choice(data.n_cells, min(arguments.some, data.n_cells), replace=False)
    data = data.select_cells(np.sort(rows))
    cells = CountsDataModule(
        lambda: data, batch_size="auto", validation_share=0.0, shuffle=True, dtype="float32", seed=0
    )
    cells.setup()
    n_components = n_to_join(arguments.components)
    model = AmortizedMixture(
        data.gene_names,
        n_components=n_components,
        components_per_group=1,
        encoder_epochs=0,
        heldout_tolerance=None,
    )
    q = common.partition(data, n_components, 0).numpy()
    means = np.maximum(data.counts.T @ q, 0.01).T / (q.T @ data.size_factors)[:, None]
    log_mean = torch.from_numpy(np.log(means))
    model.begin(StartState(components=Components(log_mean, torch.ones_like(log_mean))), cells)
    clock, schedule = Clock(), cells.schedule
    epochs = schedule.epochs_a_pass * (1 + arguments.epochs)
    trainer = build_trainer(max_epochs=epochs, callbacks=[clock], enable_checkpointing=False, alone=True)
    trainer.fit(model, datamodule=cells)
    timed = slice(schedule.epochs_a_pass, None)
    of_epoch = data.n_cells / schedule.epochs_a_pass
    return {"cells": of_epoch, "wall": clock.wall[timed], "cpu": clock.cpu[timed]} | schedule._asdict()


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One side, once."""
    found = (of_scvi if name.startswith("scvi") else of_nbmix)(arguments)
    wall, cpu = (statistics.median(found[clock]) for clock in ("wall", "cpu"))
    return found | {"cells_per_second": found["cells"] / wall, "cells_per_cpu_second": found["cells"] / cpu}


def main() -> None:
    parser = common.new_parser(
        __doc__, data="a file with populations in cell_type; default: a simulation", work=True
    )
    parser.add_argument("--peer-python", required=True, help="the interpreter that has scvi-tools")
    parser.add_argument("--components", type=int, default=10, help="groups")
    parser.add_argument("--some", type=int, default=common.LARGE_CELLS, help="cells that are used")
    parser.add_argument("--epochs", type=int, default=2, help="passes that are timed")
    parser.add_argument("--repeats", type=int, default=3, help="of both sides")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both sides")
    arguments = parser.parse_args()
    if arguments.measure is None:
        sources.ensure_large(arguments)
    elif arguments.measure == "build":
        print(json.dumps(sources.build_large(arguments)))
        return
    names = [f"{side}_{turn}" for turn in range(arguments.repeats) for side in ("scvi", "nbmix")]
    results = common.run_all(names, measure, arguments)
    if results is None or common.failed(results):
        sys.exit(0 if results is None else 1)
    keys = ("cells_per_second", "cells_per_cpu_second")
    speeds = {
        side: [
            statistics.median(r[key] for name, r in results.items() if name.startswith(side)) for key in keys
        ]
        for side in ("scvi", "nbmix")
    }
    common.show(
        f"{arguments.some:,} cells, {arguments.threads} threads, medians of {arguments.repeats}",
        ("", "cells per s", "cells per CPU s"),
        [[side, *of_side] for side, of_side in speeds.items()],
        [f"nbmix meets {speeds['nbmix'][0] / speeds['scvi'][0]:.1f} times as many cells a second"],
    )


if __name__ == "__main__":
    main()

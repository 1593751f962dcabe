"""What happens to a fit from outside, at a step of its own, so that a test need not wait for the moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

import nbmix.evaluation.results
from nbmix.evaluation.callbacks import LastCheckpoint
from nbmix.folder import held
from tests.running import ROOT, run_here

sys.path.append(str(ROOT / "benchmarks"))
from faults import differences

__all__ = ["At", "apart", "at", "differences", "hold", "run_until_written", "run_without_figures"]
SECONDS = 300  # in which a fit of a few epochs ends on any machine
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])


class At(pl.Callback):
    """Sends this process a signal once it has seen so many batches; until then every epoch is saved.

    Args:
        batch: 0 for before the first.
        number: of the signal.
    """

    def __init__(self, batch: int, number: int = signal.SIGKILL) -> None:
        self.batches, self.number = batch, number

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        LastCheckpoint.SHARE = float("inf")

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.batches == 0:
            os.kill(os.getpid(), self.number)
        self.batches -= 1


def at(batch: int, number: int = signal.SIGKILL) -> tuple[str, ...]:
    """The settings of ``At``."""
    own = (f"_target_={At.__module__}.At", f"batch={batch}", f"number={int(number)}")
    return tuple(f"+callbacks.fault.{setting}" for setting in own)


def apart(work: Callable[..., Any], *arguments: Any) -> int:
    """Do something in a process of its own, which it may end; the status, below 0 for a signal.

    The process comes from a server without threads: one forked from the tests waits forever for the OpenMP
    threads of a fit that they have made before.

    Args:
        work: a function of a module, so that it can be sent.
        arguments: its own.
    """
    process = SERVER.Process(target=_with_threads, args=(torch.get_num_threads(), work, *arguments))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{work.__name__} took more than {SECONDS} s")
    return process.exitcode


def _with_threads(n_threads: int, work: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(n_threads)
    work(*arguments)


def run_without_figures(folder: Path, *settings: str) -> None:
    """``run_here``, without what would take most of the time and is not compared."""
    nbmix.evaluation.results.draw = lambda *_: {}
    run_here(folder, *settings)


def run_until_written(call: int, folder: Path, *settings: str) -> None:
    """``run_without_figures``, killed when something has to reach the disk for the ``call``-th time."""
    real, calls = os.fsync, iter(range(1, 100))
    os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == call else real(file)
    run_without_figures(folder, *settings)


def hold(folder: Path) -> None:
    """Hold a folder until killed."""
    with held(folder):
        os.kill(os.getpid(), signal.SIGKILL)

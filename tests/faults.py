"""What happens to a fit from outside, at a step of its own, so that a test need not wait for the moment."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from nbmix.evaluation.callbacks import LastCheckpoint
from tests.running import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from faults import differences, same

__all__ = ["At", "apart", "at", "differences", "same"]


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


def apart(work: Callable[[], Any], said: Path | None = None) -> int:
    """Do something in a process of its own, which it may end; the status, below 0 for a signal.

    Args:
        work: what to do; an exception is a status of 70.
        said: file for what the process prints.
    """
    if not (child := os.fork()):
        status = 70
        try:
            if said is not None:
                for descriptor in (1, 2):
                    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
            work()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 70
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

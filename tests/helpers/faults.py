"""What happens to a fit from outside, at a step of its own, so that a test need not wait for the moment."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from nbmix.app.run_folder import held
from tests.helpers.running import ROOT, run_here

sys.path.append(str(ROOT / "benchmarks"))
from faults import differences

__all__ = ["at", "differences", "hold", "no_room", "run_until_written"]


class At(pl.Callback):
    """Sends this process a signal once it has seen so many batches.

    Args:
        batch: 0 for before the first.
        number: of the signal.
    """

    def __init__(self, batch: int, number: int = signal.SIGKILL) -> None:
        self.batches, self.number = batch, number

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.batches == 0:
            self.happen()
        self.batches -= 1

    def happen(self) -> None:
        os.kill(os.getpid(), self.number)


class NoRoom(At):
    """From that batch on, no file of this process may have more than ``n_bytes``."""

    def __init__(self, batch: int, n_bytes: int) -> None:
        super().__init__(batch)
        self.n_bytes = n_bytes

    def happen(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.n_bytes, self.n_bytes))


def at(batch: int, number: int = signal.SIGKILL) -> tuple[str, ...]:
    """The settings of ``At``; until then every epoch is saved."""
    return _of_callback(At, batch=batch, number=int(number))


def no_room(batch: int, n_bytes: int) -> tuple[str, ...]:
    """The settings of ``NoRoom``; every epoch is saved, or not."""
    return _of_callback(NoRoom, batch=batch, n_bytes=n_bytes)


def _of_callback(kind: type[pl.Callback], **settings: int) -> tuple[str, ...]:
    own = (f"_target_={kind.__module__}.{kind.__name__}", *(f"{k}={v}" for k, v in settings.items()))
    return ("+callbacks.last.share=1e9", *(f"+callbacks.fault.{setting}" for setting in own))


def run_until_written(call: int, folder: Path, *settings: str) -> None:
    """``run_here``, killed when something has to reach the disk for the ``call``-th time."""
    real, calls = os.fsync, iter(range(1, 100))
    os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == call else real(file)
    run_here(folder, *settings)


def hold(folder: Path) -> None:
    """Hold a folder until killed."""
    with held(folder):
        os.kill(os.getpid(), signal.SIGKILL)

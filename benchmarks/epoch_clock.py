"""A callback that notes when epochs begin and end, for ``train.py +callbacks.clock...`` in scale.py."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl


class EpochClock(pl.Callback):
    """Writes wall seconds of every training epoch, held-out cells not included, to a JSON file.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.created = time.perf_counter()
        self.before: float | None = None
        self.epochs: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = time.perf_counter()
        if self.before is None:
            self.before = self.began - self.created

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # an epoch's end comes after validation
        if batch_idx + 1 == trainer.num_training_batches:
            self.epochs.append(time.perf_counter() - self.began)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        record = {"before_first_epoch_seconds": self.before, "epoch_seconds": self.epochs}
        self.path.write_text(json.dumps(record))

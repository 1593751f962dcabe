"""What happens beside a fit: checkpoints, the line of progress, scores against labels."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from torch.nn.functional import one_hot

from nbmix.core.batch import CellBatch
from nbmix.core.declared import Setting
from nbmix.data.module import CountsDataModule
from nbmix.data.whole_file import commit, part_of
from nbmix.evaluation.metrics import SMALLEST_PROBABILITY, LabelTables
from nbmix.progress import say

log = logging.getLogger(__name__)

FITTING = "fit"  # a phase

_SHOWN = {
    "objective": ("objective", "{:.3f}"),
    "heldout_log_likelihood": ("held-out", "{:.3f}"),
    "changed": ("changed", "{:.1%}"),
}


class BestCheckpoint(Checkpoint):
    """Keeps best.ckpt, by held-out log likelihood; where nothing is held out, by the objective.

    It is best.ckpt.part until the next last.ckpt, so that the two on the disk belong together. A fit that
    goes on in another folder begins its best.ckpt anew.
    """

    def __init__(self, dirpath: Annotated[str, Setting("The folder of best.ckpt.")]) -> None:
        self.path = Path(dirpath).absolute() / "best.ckpt"
        self.best = -math.inf

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            part_of(self.path).unlink(missing_ok=True)  # of a run that was killed
            if trainer.ckpt_path is None:
                self.path.unlink(missing_ok=True)  # of an earlier fit

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning sets it, and does not declare it
        data: CountsDataModule = trainer.datamodule  # type: ignore[attr-defined]
        name = "heldout_log_likelihood" if data.validation_rows.size else "objective"
        # EM has no objective in its first iteration
        now = float(trainer.callback_metrics.get(name, -math.inf))
        if trainer.strategy.reduce_boolean_decision(now > self.best):
            self.best = now
            trainer.save_checkpoint(part_of(self.path), weights_only=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.commit(trainer)

    def commit(self, trainer: pl.Trainer) -> None:
        """Make the best so far best.ckpt."""
        part = part_of(self.path)
        if trainer.is_global_zero and part.exists():
            commit(part, self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "path": str(self.path)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["path"] == str(self.path):
            self.best = state_dict["best"]


class LastCheckpoint(Checkpoint):
    """Saves last.ckpt after the start and after epochs, of which it leaves out some where these are short.

    A fit that goes on from it reaches what the whole one reaches. The last epoch is always saved.
    """

    def __init__(
        self,
        dirpath: Annotated[str, Setting("The folder of last.ckpt.")],
        share: float = 0.1,  # of the time that may go into it
    ) -> None:
        self.path, self.share = Path(dirpath).absolute() / "last.ckpt", share
        self._next = -math.inf  # seconds of ``time.perf_counter``

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is None:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_last = (
            trainer.should_stop
            or trainer.current_epoch + 1 == trainer.max_epochs
            or trainer.global_step == trainer.max_steps
        )
        if trainer.strategy.broadcast(is_last or time.perf_counter() >= self._next):
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        began = time.perf_counter()
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, BestCheckpoint):
                callback.commit(trainer)
        trainer.save_checkpoint(self.path, weights_only=False)
        now = time.perf_counter()
        self._next = now + (now - began) / self.share


class FitProgress(pl.Callback):
    """Says where the fit stands: epochs, objective and held-out log likelihood per cell, cells that moved."""

    def __init__(self) -> None:
        self._state = ""  # after the last epoch

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        say(FITTING, trainer.current_epoch, trainer.max_epochs)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: CellBatch, batch_idx: int
    ) -> None:
        done = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
        say(FITTING, done, trainer.max_epochs, state=self._state)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        known = trainer.callback_metrics
        shown = (f"{n} {f.format(float(known[k]))}" for k, (n, f) in _SHOWN.items() if k in known)
        self._state = " ".join(shown)
        say(FITTING, trainer.current_epoch + 1, trainer.max_epochs, state=self._state)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        converged, done = getattr(module, "converged", None), getattr(module, "n_iterations", 0)
        unit = "epochs" if converged is None else "iterations"
        ended = {True: "converged after", False: "not converged after", None: "ended after"}[converged]
        state = f"{ended} {done} {unit}; {self._state}".rstrip("; ")
        say(FITTING, done, trainer.max_epochs, state=state, has_ended=True)


class LabelScores(pl.Callback):
    """Logs agreement with known labels while the fit runs; reads what the fit says and changes nothing.

    ``label/cross_entropy`` is that of labels and responsibilities in nats per cell, components matched
    one-to-one with labels; ``label/ari`` is the adjusted Rand index. Both are of components, which are joined
    to groups only when the fit has ended.
    """

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._sums: torch.Tensor | None = None  # of LabelTables

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: CellBatch, batch_idx: int
    ) -> None:
        if batch.labels is None:
            return
        r = outputs["responsibilities"].double()  # (cells, components)
        if self._sums is None:
            # Lightning sets it, and does not declare it
            data: CountsDataModule = trainer.datamodule  # type: ignore[attr-defined]
            self._sums = r.new_zeros(len(LabelTables._fields), data.n_labels, r.shape[1])
        assigned = one_hot(r.argmax(1), r.shape[1]).double()
        for total, part in zip(self._sums, (assigned, r, -r.clamp(SMALLEST_PROBABILITY).log()), strict=True):
            total.index_add_(0, batch.labels, part)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._sums is None:
            return
        if trainer.world_size > 1:
            torch.distributed.all_reduce(self._sums)
        tables = LabelTables(*self._sums.cpu().numpy())
        logged = {"label/cross_entropy": tables.log_loss(), "label/ari": tables.ari()}
        module.log_dict(logged, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=True)

"""The Trainer, from settings that a user thinks in: how many GPUs, how many processes."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from pytorch_lightning.utilities import rank_zero_only

from nbmix.core.declared import Setting, checked
from nbmix.data.checkpoint import write_checkpoint
from nbmix.errors import InputError
from nbmix.models.mixture_em import MixtureEM

# of Lightning, about what is meant to be so here
_EXPECTED_WARNINGS = (
    r"GPU available but not used",  # it is for the user to say, by a setting that Lightning does not know
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # torch's, of Lightning's own use
    r"The '\w+' does not have many workers",  # on machines of many cores; threads prepare the batches
    r"Total length of `list` across ranks is zero",  # nothing is held out
    r"It is recommended to use `self.log\(.*sync_dist=True\)`",  # all numbers are those of all ranks already
)


@checked("trainer")
def build_trainer(
    *,
    gpus: Annotated[
        int, Setting("The number of GPUs on each node. 0 is the CPU, -1 takes all GPUs.", least=-1)
    ] = 0,
    processes: Annotated[int, Setting("The number of processes on each node, without GPUs.", least=1)] = 1,
    num_nodes: Annotated[int, Setting("The number of machines.", least=1)] = 1,
    max_epochs: Annotated[
        int, Setting("The largest number of epochs. For model=em an epoch is one iteration.", least=1)
    ] = MixtureEM.defaults.max_epochs,
    default_root_dir: Annotated[str | None, Setting("The folder for what Lightning itself writes.")] = None,
    multirun: bool = False,
    alone: bool = False,
    callbacks: Sequence[pl.Callback] = (),
    logger: Any = None,
    **options: Any,
) -> pl.Trainer:
    """Map ``gpus`` and ``processes`` to Lightning's accelerator, devices and strategy.

    Args:
        multirun: this run is one of a sweep in this process (Hydra's ``-m``).
        alone: a trainer of this process only, also in a job of many.
        default_root_dir, callbacks, logger, options: passed to ``pytorch_lightning.Trainer``.

    Raises:
        InputError: there are not so many GPUs; or several processes inside a sweep, where every child
            process would start the sweep again.
    """
    available = torch.cuda.device_count()
    if gpus > available or (gpus == -1 and available == 0):
        raise InputError(
            f"trainer.gpus={gpus}: GPUs that torch finds on this machine: {available}; set "
            "trainer.gpus to at most that, or trainer.gpus=0 for the CPU"
        )
    if gpus and processes > 1:
        raise InputError(
            f"trainer.processes={processes} is for the CPU; trainer.gpus={gpus} runs one process a GPU"
        )
    devices = (available if gpus == -1 else gpus) or processes
    launched_from_outside = TorchElasticEnvironment.detect() or SLURMEnvironment.detect()
    if multirun and devices * num_nodes > 1 and not launched_from_outside:
        raise InputError(
            f"-m with {devices * num_nodes} processes a trial: every process would start the sweep again; "
            "use one device a trial, or torchrun, or the submitit launcher with tasks_per_node = devices"
        )
    strategy: Any = "auto"
    if devices * num_nodes > 1:
        strategy = DDPStrategy(process_group_backend=None if gpus else "gloo")
    plugins: list[Any] = [WholeCheckpoints()]
    if alone:
        plugins.append(LightningEnvironment())
    elif SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Lightning would save in the midst of an epoch and go on from there, whatever ckpt_path says
        plugins.append(SLURMEnvironment(auto_requeue=False))
    _silence()
    return pl.Trainer(
        accelerator="gpu" if gpus else "cpu",
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        max_epochs=max_epochs,
        default_root_dir=default_root_dir,
        callbacks=[*callbacks, OwnSignals()],
        plugins=plugins,
        logger=logger if logger is not None else False,
        use_distributed_sampler=False,  # Lightning's own repeats cells to make shards equal
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=False,  # ours is a callback
        **options,
    )


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all, with a checksum."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        write_checkpoint(checkpoint, Path(path))


class OwnSignals(pl.Callback):
    """Keeps the process's own answer to SIGTERM; Lightning's talks to other ranks from inside the handler.

    So there is nothing to ask the first rank for before every batch, which would keep ranks in step, each
    waiting for the slowest at each batch.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)
        # there is no setting for it; mypy would have methods left alone
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    on_predict_start = on_train_start


@contextmanager
def embedded() -> Iterator[None]:
    """A fit as a part of something else: its warnings do not leave, and Ctrl-C works as everywhere."""
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            yield
    except SystemExit as stop:  # Lightning's answer to Ctrl-C; it lets SIGINT be ignored from then on
        if in_main and isinstance(stop.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from None
        raise


def is_first_rank() -> bool:
    """Whether this process speaks for all that fit together; the environment says it, before any trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0


def end_with_parent() -> None:
    """End this process soon after the one that started it, which it could wait for half an hour."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_other_ranks(trainer: pl.Trainer) -> None:
    """Kill the processes that ``trainer`` has started, which would wait for this one."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        for process in launcher.procs:
            process.kill()
            process.wait()


def _silence() -> None:
    """Keep the terminal for our own lines: Lightning's reports on hardware and its expected warnings."""
    for name in (
        "pytorch_lightning.utilities.rank_zero",
        "pytorch_lightning.accelerators.cuda",
        "lightning_fabric.utilities.distributed",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)

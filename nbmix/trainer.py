"""The Trainer, from settings that a user thinks in: how many GPUs, how many processes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from nbmix.errors import InputError


def build_trainer(
    *,
    gpus: int = 0,
    processes: int = 1,
    num_nodes: int = 1,
    max_epochs: int = 100,
    multirun: bool = False,
    callbacks: Sequence[pl.Callback] = (),
    logger: Any = None,
    **options: Any,
) -> pl.Trainer:
    """Map ``gpus`` and ``processes`` to Lightning's accelerator, devices and strategy.

    Args:
        gpus: 0 for the CPU, N for N GPUs of each node, -1 for all that there are.
        processes: CPU processes of each node where gpus = 0; more than one run data-parallel.
        num_nodes: machines.
        max_epochs: at most; for EM an epoch is an iteration.
        multirun: this run is one of a sweep in this process (Hydra's ``-m``).
        callbacks, logger, options: passed to ``pytorch_lightning.Trainer``.

    Raises:
        InputError: there are not so many GPUs; or several processes inside a sweep, where every child
            process would start the sweep again.
    """
    available = torch.cuda.device_count()
    if gpus < -1 or processes < 1 or num_nodes < 1 or max_epochs < 1:
        raise InputError(
            f"trainer.gpus={gpus} trainer.processes={processes} trainer.num_nodes={num_nodes} "
            f"trainer.max_epochs={max_epochs}: gpus must be -1, 0 or more, the others 1 or more"
        )
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
    if multirun and devices * num_nodes > 1:
        raise InputError(
            f"-m with {devices * num_nodes} processes a trial: every process would start the sweep again; "
            "use one device a trial, or torchrun, or the submitit launcher with tasks_per_node = devices"
        )
    strategy: Any = "auto"
    if devices * num_nodes > 1:
        # no parameter is unused, and the mixture's buffers never differ between ranks
        strategy = DDPStrategy(process_group_backend=None if gpus else "gloo", broadcast_buffers=False)
    # its reports on hardware and products are noise beside our own lines
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    return pl.Trainer(
        accelerator="gpu" if gpus else "cpu",
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        logger=logger if logger is not None else False,
        use_distributed_sampler=False,  # Lightning's own repeats cells to make shards equal
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=False,  # ours is a callback
        **options,
    )

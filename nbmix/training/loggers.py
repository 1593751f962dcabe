"""Loggers that the config names."""

from __future__ import annotations

import logging
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import wandb
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from nbmix.core.declared import Setting
from nbmix.errors import InputError

log = logging.getLogger(__name__)


def csv_logger(*, save_dir: Annotated[str, Setting("The folder in which csv/ is made.")]) -> CSVLogger:
    """Scalars in csv/metrics.csv of the run folder; a fit that goes on there writes csv-2, csv-3, ..."""
    numbered = (f"csv-{number}" if number > 1 else "csv" for number in count(1))
    version = next(name for name in numbered if not (Path(save_dir) / name).exists())
    return CSVLogger(save_dir, name=None, version=version)


def wandb_logger(
    *,
    save_dir: Annotated[str, Setting("The folder in which wandb/ is made.")],
    project: Annotated[str, Setting("The project at Weights & Biases.")] = "nbmix",
    name: Annotated[
        str | None, Setting("The name of the run. With null Weights & Biases makes one up.")
    ] = None,
    offline: Annotated[bool, Setting("With true the run stays in its folder, for wandb sync.")] = False,
    **settings: Any,
) -> WandbLogger:
    """A W&B logger whose local files are in the run folder.

    Args:
        settings: of ``pytorch_lightning.loggers.WandbLogger``, or of ``wandb.init``.

    Raises:
        InputError: W&B cannot start, for want of a key or of a connection.
    """
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    if offline:  # there is nothing to say but where the run is
        wandb.setup(wandb.Settings(silent=True, mode="offline"))
    logger = WandbLogger(save_dir=save_dir, project=project, name=name, offline=offline, **settings)
    try:
        experiment = logger.experiment  # connects here, before any work
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise InputError(f"logger=wandb: {reason}; run wandb login, or set logger.offline=true") from None
    if offline and getattr(rank_zero_only, "rank", 0) == 0:
        log.info("W&B offline run: upload it with wandb sync %s", Path(experiment.dir).parent)
    return logger

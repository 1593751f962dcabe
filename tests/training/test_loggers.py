"""Loggers that start, or say in one line why they cannot; one of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb
from pytorch_lightning.loggers.logger import Logger

from nbmix.errors import InputError
from nbmix.training.loggers import csv_logger, wandb_logger
from tests.helpers.running import NO_PICTURES, TINY, run_here


class Scalars(Logger):
    """A logger of one's own: names of scalars, a line each."""

    def __init__(self, save_dir):
        super().__init__()
        self.path = Path(save_dir) / "scalars.txt"

    name, version = "scalars", 0

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        with self.path.open("a") as file:
            file.writelines(f"{name}\n" for name in metrics)


def test_a_logger_of_ones_own_is_a_line_of_config(tmp_path):
    run_here(tmp_path, *TINY, NO_PICTURES, "trainer.max_epochs=2", f"logger._target_={__name__}.Scalars")
    assert {"objective", "label/ari"} <= set((tmp_path / "scalars.txt").read_text().split())


def test_wandb_that_cannot_start_is_bad_input(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise wandb.errors.CommError("no connection\nat all")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        InputError, match=r"no connection at all; run wandb login, or set logger\.offline=true"
    ):
        wandb_logger(save_dir=str(tmp_path), project="nbmix")


def test_a_fit_that_goes_on_keeps_the_earlier_csv(tmp_path):
    for name in ("csv", "csv-2", "csv-3"):
        logger = csv_logger(save_dir=str(tmp_path))
        logger.log_metrics({"a": 1.0})
        logger.save()
        assert (tmp_path / name / "metrics.csv").is_file()

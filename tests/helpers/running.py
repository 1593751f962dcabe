"""Runs and fits that are small enough to be made many times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from nbmix.app.run import run
from nbmix.data.counts import CountData
from nbmix.data.module import CountsDataModule
from nbmix.data.simulate import simulated_count_data
from nbmix.models.base import MixtureModule, Prediction
from nbmix.starts.clusters import KMeansStart
from nbmix.training.joining import join_components
from nbmix.training.predict import predict
from nbmix.training.trainer import build_trainer

ROOT = Path(__file__).parents[2]
TINY = ("data.n_cells=60", "data.n_genes=80", "data.n_components=2", "model.n_components=2", "start=kmeans")
NO_PICTURES = "evaluation.pictures=[]"  # they take most of the time of a small run


def configure(*overrides: str, folder: Path | str = "unused") -> DictConfig:
    """The config that ``train.py`` would get."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=[*overrides, f"output_dir={folder}"])


def run_here(folder: Path, *overrides: str) -> dict[str, Any]:
    """``nbmix.app.run.run`` in this process; the metrics."""
    return run(configure("logger=csv", *overrides, folder=folder))


def run_train(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python train.py`` in a process of its own; a table or picture that it leaves out is a fault."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("HYDRA_", "NBMIX_", "WANDB_"))},
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, "train.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert " is left out: " not in done.stdout + done.stderr, done.stderr
    return done


def small_data(n_cells: int = 60, n_genes: int = 80, n_components: int = 2, seed: int = 0) -> CountData:
    return simulated_count_data(n_cells, n_genes, n_components, seed=seed)


def fit(
    model: MixtureModule,
    data: CountData,
    *,
    epochs: int,
    start: Any = None,
    callbacks: Any = (),
    **batches: Any,
) -> tuple[CountsDataModule, Prediction]:
    """Fit as ``run`` does, each component a group; the data module and the predictions of all cells."""
    module = CountsDataModule(
        lambda: data, folds=model.mixture.settings.folds, shuffle=model.shuffle, **batches
    )
    module.setup()
    model.know_origins(data.origin_names)
    begin = start or KMeansStart()
    model.begin(begin(module.training_data, model.mixture.settings, np.random.default_rng(0)), module)
    trainer = build_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=False)
    trainer.fit(model, datamodule=module)
    cells = predict(trainer, model, module)
    join_components(module, model, cells, to_groups=False)
    return module, cells

"""The whole story: read, start, fit, predict, score, write."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from nbmix.app.command import Stopped, stoppable
from nbmix.app.functions import functions_named
from nbmix.app.run_folder import held
from nbmix.app.settings import check_settings
from nbmix.core.memory import give_back
from nbmix.core.settings import MixtureSettings
from nbmix.data.checkpoint import align_to_genes, load_checkpoint
from nbmix.data.module import CountsDataModule
from nbmix.data.whole_file import why_unwritable
from nbmix.errors import InputError
from nbmix.models.base import MixtureModule
from nbmix.models.restore import check_resumable, restore
from nbmix.output.results import Results, gather_predictions
from nbmix.output.scores import score
from nbmix.output.writing import write_outcome
from nbmix.starts.base import Start, check_components
from nbmix.starts.choice import Choice, Range, choose_n_components
from nbmix.starts.random import RandomStart
from nbmix.training.trainer import end_other_ranks, end_with_parent

log = logging.getLogger(__name__)

UNIT_RATIO = 30.0  # between medians of size factors: more is no difference in sequencing depth

LAST = "checkpoints/last.ckpt"  # in the run folder

VERSIONS = ("nbmix", "torch", "pytorch-lightning", "numpy", "scipy", "anndata")


def run(cfg: DictConfig) -> dict[str, Any]:
    """Do what a config asks for and leave the run folder ``cfg.output_dir``.

    Returns:
        The content of metrics.json.

    Raises:
        InputError: a file, field or setting cannot be used; or a file cannot be written.
        Stopped: by Ctrl-C or SIGTERM.
    """
    began = time.perf_counter()
    # a DictConfig becomes a dict with text as keys, which OmegaConf's type does not say
    check_settings(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    if cfg.task not in ("fit", "predict"):
        raise InputError(f"task={cfg.task}: choose fit or predict")
    pl.seed_everything(cfg.seed, verbose=False)
    trainer: pl.Trainer = instantiate(
        cfg.trainer,
        multirun=HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN,
        callbacks=[instantiate(c) for c in cfg.callbacks.values()] if cfg.task == "fit" else [],
    )
    if not trainer.is_global_zero:
        logging.getLogger().setLevel(logging.ERROR)  # rank 0 says it
        end_with_parent()
    folder = Path(cfg.output_dir)
    try:
        with stoppable(), held(folder) if trainer.is_global_zero else nullcontext():
            return work(cfg, trainer, began)
    except BaseException as error:
        end_other_ranks(trainer)
        if isinstance(error, Stopped):
            error.advice = how_to_go_on(folder) if cfg.task == "fit" else ""
        elif (reason := why_unwritable(error)) is not None:
            raise InputError(
                f"hydra.run.dir={folder}: {reason}; make room, or choose another folder; what checkpoints/ "
                "holds is whole, and ckpt_path=last goes on from it"
            ) from error
        raise


def work(cfg: DictConfig, trainer: pl.Trainer, began: float) -> dict[str, Any]:
    """Fit or restore, predict, score, write."""
    pictures = functions_named("evaluation.pictures", cfg.evaluation.pictures)
    scores = functions_named("evaluation.scores", cfg.evaluation.scores)
    if cfg.task == "fit":
        data, model, _ = fit(cfg, trainer)
    else:
        data, model = prepare_prediction(cfg, trainer)
    everything = gather_predictions(trainer.predict(model, datamodule=data), data.data.n_cells)
    give_back()
    seconds = time.perf_counter() - began
    results = Results(data, model, everything, provenance(cfg), cfg.evaluation.max_umap_cells)
    metrics = score(results, scores) | {"seconds": seconds}
    give_back()
    if trainer.is_global_zero:
        folder = Path(cfg.output_dir)
        write_outcome(results, metrics, folder, trainer.loggers, pictures)
        report(metrics, folder)
    return metrics


def fit(cfg: DictConfig, trainer: pl.Trainer) -> tuple[CountsDataModule, MixtureModule, Choice | None]:
    """Fit the model that the config names to its data; the choice of K, where it was left to us."""
    if cfg.data.min_counts < 1:
        raise InputError(
            f"data.min_counts={cfg.data.min_counts}: must be 1 or more, for a silent gene has no fit"
        )
    allowed = Range.parse(cfg.model.n_components)
    data: CountsDataModule = instantiate(
        cfg.data,
        folds=cfg.model.get("folds", 1),
        shuffle=model_class(cfg).shuffle,
        dtype=cfg.model.get("dtype", "float64"),
    )
    data.setup()
    training = data.training_data
    generator = np.random.default_rng(cfg.seed)
    start: Start = instantiate(cfg.start)
    choice, n_components = None, cfg.model.n_components
    path = checkpoint_path(cfg)
    checkpoint = None if path is None else load_checkpoint(path)
    if allowed is not None and checkpoint is not None:
        n_components = checkpoint.settings.get("n_components")
        choice = None if checkpoint.choice is None else Choice.of(checkpoint.choice)
    elif allowed is not None:
        search = start if isinstance(start, RandomStart) else None
        settings = MixtureSettings(1, weights=cfg.model.get("weights", "learned"))
        choice = choose_n_components(training, settings, allowed, generator, search)
        n_components = choice.recommended
    model: MixtureModule = instantiate(cfg.model, gene_names=data.data.gene_names, n_components=n_components)
    check_components(training, model.mixture.settings)
    model.choice = None if choice is None else choice.plain
    if checkpoint is None:
        state = choice.start if choice is not None and isinstance(start, RandomStart) else None
        model.begin(state or start(training, model.mixture.settings, generator), data)
        if trainer.is_global_zero:  # what is there is not of this fit
            (Path(cfg.output_dir) / "metrics.json").unlink(missing_ok=True)
    else:
        check_resumable(checkpoint, model, data, f"ckpt_path={path}")
        if not checkpoint.sealed:
            raise InputError(
                f"ckpt_path={path}: has no checksum; only what train.py saves can be gone on with"
            )
    del training  # a copy of most counts, if they are in memory
    give_back()
    trainer.loggers = [instantiate(cfg.logger)]  # now that all input is known to be good
    try:
        trainer.fit(model, datamodule=data, ckpt_path=path, weights_only=True)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if checkpoint is None or model.has_begun or isinstance(error, InputError | torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"ckpt_path={path}: is damaged, or of another version of nbmix ({reason:.100})"
        ) from error
    return data, model, choice


def checkpoint_path(cfg: DictConfig) -> str | None:
    """The file that ``ckpt_path`` means; "last" is that of the run folder, None if there is none yet.

    Raises:
        InputError: "last", and nobody has said in which folder.
    """
    if cfg.ckpt_path != "last":
        return cfg.ckpt_path
    path = Path(cfg.output_dir) / LAST
    if path.is_file():
        return str(path)
    if cfg.task == "predict" or (HydraConfig.initialized() and not _names_folder(HydraConfig.get())):
        raise InputError(
            f"ckpt_path=last: {path} is not there; say with hydra.run.dir=FOLDER which run it is of"
        )
    log.info("ckpt_path=last: %s is not there yet; the fit begins anew", path)
    return None


def _names_folder(hydra: HydraConf) -> bool:
    given = [override.lstrip("+").split("=")[0] for override in (*hydra.overrides.hydra, *sys.argv)]
    return any(key in given for key in ("hydra.run.dir", "hydra.sweep.dir"))


def how_to_go_on(folder: Path) -> str:
    """The command that goes on with a fit that was stopped."""
    if not (folder / LAST).is_file() or not HydraConfig.initialized():
        return ", before there was anything to save"
    hydra = HydraConfig.get()
    key, where = "hydra.run.dir", folder
    if hydra.mode == RunMode.MULTIRUN:
        key, where = "hydra.sweep.dir", Path(hydra.sweep.dir)
    again = [word for word in sys.argv[1:] if not word.startswith((f"{key}=", "ckpt_path="))]
    shown = os.path.relpath(where)
    quoted = shown if re.fullmatch(r"[\w./-]+", shown) else f"'{shown}'"  # for Hydra; the shell has its own
    command = [Path(sys.executable).name, sys.argv[0], *again, f"{key}={quoted}", "ckpt_path=last"]
    return f"; the fit is saved, go on with: {shlex.join(command)}"


def prepare_prediction(cfg: DictConfig, trainer: pl.Trainer) -> tuple[CountsDataModule, MixtureModule]:
    """Restore a checkpoint and bring new cells to its genes, matched by name."""
    if cfg.ckpt_path is None:
        raise InputError("task=predict: set ckpt_path to a checkpoint of a fit")
    path = checkpoint_path(cfg)
    assert path is not None
    checkpoint = load_checkpoint(path)
    if checkpoint.model != model_class(cfg).kind:
        raise InputError(f"ckpt_path={cfg.ckpt_path}: set model={checkpoint.model}, which it was saved by")
    # a gene that is silent in the new cells is seen all the same
    data: CountsDataModule = instantiate(cfg.data, folds=1, shuffle=False, validation_share=0.0, min_counts=0)
    data.setup()
    model = restore(checkpoint)
    there, here = align_to_genes(checkpoint.gene_names, data.data.gene_names, f"ckpt_path={cfg.ckpt_path}")
    model.n_genes_missing = len(checkpoint.gene_names) - len(there)
    model.restrict_genes(there)
    data.use(data.data.select_genes(here))
    compare_size_factors(checkpoint.median_size_factor, data.data.size_factors)
    return data, model


def compare_size_factors(fitted: float, size_factors: np.ndarray) -> None:
    """Warn where new cells' size factors seem to be in another unit than those of the fit."""
    here = float(np.median(size_factors))
    if here > 0 and fitted > 0 and not 1 / UNIT_RATIO < here / fitted < UNIT_RATIO:
        log.warning(
            "size factors have a median of %.3g, those of the fit had %.3g: set data.size_factor_key to the "
            "same kind of column as in the fit",
            here,
            fitted,
        )


def model_class(cfg: DictConfig) -> type[MixtureModule]:
    """The class that ``model`` names."""
    return get_class(cfg.model._target_)  # type: ignore[return-value]


def provenance(cfg: DictConfig) -> dict[str, Any]:
    """Settings and versions that made a result."""
    return {
        "config": OmegaConf.to_container(cfg, resolve=True),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "threads": torch.get_num_threads(),
    }


def report(metrics: dict[str, Any], folder: Path) -> None:
    """Say in a few lines how it went and where the results are."""
    shown = ("n_cells", "n_genes", "n_components", "log_likelihood", "heldout_log_likelihood", "elbo", "ari")
    parts = [
        f"{k} {metrics[k]:.4g}" if k == "ari" else f"{k} {metrics[k]:.8g}" for k in shown if k in metrics
    ]
    print("  ".join(parts))
    if metrics.get("converged") is False:
        print("not converged: raise trainer.max_epochs, or model.tolerance")
    print(f"results in {os.path.relpath(folder)}")

"""One run: read, fit or restore, predict, score, write the run folder."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from nbmix.app.command import Stopped, stoppable
from nbmix.app.functions import functions_named
from nbmix.app.run_folder import held
from nbmix.app.settings import check_config
from nbmix.app.words import hydra_text
from nbmix.core.memory import give_back
from nbmix.data.checkpoint import load_checkpoint
from nbmix.data.module import CountsDataModule
from nbmix.data.whole_file import why_unwritable
from nbmix.errors import InputError
from nbmix.models.base import MixtureModule
from nbmix.output.groups import how_many
from nbmix.output.results import Results
from nbmix.output.scores import score
from nbmix.output.writing import write_outcome
from nbmix.progress import say
from nbmix.training.callbacks import FITTING
from nbmix.training.display import lines_in_log_files, progress_shown
from nbmix.training.fit import Fitted, ModelSpec, fit
from nbmix.training.predict import predict, restore_for
from nbmix.training.provenance import provenance
from nbmix.training.trainer import end_other_ranks, end_with_parent

log = logging.getLogger(__name__)

LAST = "checkpoints/last.ckpt"  # in the run folder


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
    check_config(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
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
            with shown_by(trainer):
                metrics, results = work(cfg, trainer, began)
            if results is not None:
                report(results, metrics, folder)
            return metrics
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


def shown_by(trainer: pl.Trainer) -> AbstractContextManager[None]:
    """The first rank shows what goes on, on a terminal and in the log; elsewhere the end of the fit alone."""
    if not trainer.is_global_zero:
        return nullcontext()

    def end_of_fit(line: str) -> None:
        if line.startswith(f"{FITTING} "):
            print(line, file=sys.stderr)

    return progress_shown(lines_in_log_files, end_of_fit)


def work(cfg: DictConfig, trainer: pl.Trainer, began: float) -> tuple[dict[str, Any], Results | None]:
    """Fit or restore, predict, score, write: the content of metrics.json, and the first rank's results."""
    pictures = functions_named("evaluation.pictures", cfg.evaluation.pictures)
    pictures += functions_named("evaluation.more_pictures", cfg.evaluation.more_pictures)
    scores = functions_named("evaluation.scores", cfg.evaluation.scores)
    data, model, cells = (fit_from_config if cfg.task == "fit" else predict_from_config)(cfg, trainer)
    give_back()
    seconds = time.perf_counter() - began
    made_by = provenance(OmegaConf.to_container(cfg, resolve=True))
    keys = ("layer", "size_factor_key", "prior_key", "batch_key")
    read_by = {name: made_by["config"]["data"].get(name) for name in keys}
    results = Results(data, model, cells, made_by, cfg.evaluation.max_umap_cells, read_by)
    say("scoring")
    metrics = score(results, scores) | {"seconds": seconds}
    give_back()
    if trainer.is_global_zero:
        folder = Path(cfg.output_dir)
        write_outcome(results, metrics, folder, trainer.loggers, pictures)
        return metrics, results
    return metrics, None


def fit_from_config(cfg: DictConfig, trainer: pl.Trainer) -> Fitted:
    """Fit the model that the config names to its data, or go on with a fit."""
    if cfg.n_groups is not None:
        raise InputError(
            f"n_groups={cfg.n_groups}: is for task=predict; a fit has model.n_components, and nbmix.regroup "
            "makes other groups of its result.h5ad"
        )
    if cfg.data.min_counts < 1:
        raise InputError(
            f"data.min_counts={cfg.data.min_counts}: must be 1 or more, for a silent gene has no fit"
        )
    data: CountsDataModule = instantiate(cfg.data, **model_class(cfg).batch_settings(cfg.model))
    spec = ModelSpec(
        model_class(cfg), cfg.model, lambda names, size: instantiate(cfg.model, gene_names=names, **size)
    )
    path = checkpoint_path(cfg)

    def begin_folder() -> None:
        if path is None and trainer.is_global_zero:  # what is there is not of this fit
            (Path(cfg.output_dir) / "metrics.json").unlink(missing_ok=True)
        trainer.loggers = [instantiate(cfg.logger)]

    return fit(
        spec,
        instantiate(cfg.start),
        data,
        trainer,
        seed=cfg.seed,
        ckpt_path=path,
        when_ready=begin_folder,
    )


def predict_from_config(cfg: DictConfig, trainer: pl.Trainer) -> Fitted:
    """Restore a checkpoint, and ask it of new cells, brought to its genes by name."""
    if cfg.ckpt_path is None:
        raise InputError("task=predict: set ckpt_path to a checkpoint of a fit")
    path = checkpoint_path(cfg)
    assert path is not None
    checkpoint = load_checkpoint(path)
    if checkpoint.model != model_class(cfg).kind:
        raise InputError(f"ckpt_path={cfg.ckpt_path}: set model={checkpoint.model}, which it was saved by")
    say("reading cells")
    # a gene that is silent in the new cells is seen all the same
    data: CountsDataModule = instantiate(cfg.data, folds=1, shuffle=False, validation_share=0.0, min_counts=0)
    if data.data.empty_cells.all():
        raise InputError("data: every cell is empty; a report needs raw counts")
    model, cells = restore_for(checkpoint, data.data, f"ckpt_path={cfg.ckpt_path}")
    data.use(cells)
    if cfg.n_groups is not None:
        model.cut(cfg.n_groups)
    say("assigning cells")
    return Fitted(data, model, predict(trainer, model, data))


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
    command = [Path(sys.executable).name, sys.argv[0], *again, f"{key}={hydra_text(shown)}", "ckpt_path=last"]
    return f"; the fit is saved, go on with: {shlex.join(command)}"


def model_class(cfg: DictConfig) -> type[MixtureModule]:
    """The class that ``model`` names."""
    return get_class(cfg.model._target_)  # type: ignore[return-value]


def report(results: Results, metrics: dict[str, Any], folder: Path) -> None:
    """Say in a few lines how it went and where the results are."""
    shown = ("n_cells", "n_genes", "n_components", "log_likelihood", "heldout_log_likelihood", "elbo", "ari")
    parts = [
        f"{k} {metrics[k]:.4g}" if k == "ari" else f"{k} {metrics[k]:.8g}" for k in shown if k in metrics
    ]
    print("  ".join(parts))
    if results.joins is not None and results.joins.joins:
        print(how_many(results.joins, len(results.groups)))
    if metrics.get("converged") is False:
        print("not converged: raise trainer.max_epochs, or model.tolerance")
    print(f"results in {os.path.relpath(folder)}")

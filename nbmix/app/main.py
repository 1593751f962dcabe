"""Where ``train.py`` enters: one run, a trial of a sweep, or a search."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from nbmix.app.optuna_search import search
from nbmix.app.run import run
from nbmix.app.trial import run_trial
from nbmix.errors import InputError


def main(cfg: DictConfig) -> float | None:
    """Do what a config asks for.

    Returns:
        ``optimized_metric`` of metrics.json; NaN for a trial that failed, the best of a search.

    Raises:
        InputError: as ``nbmix.app.run.run``; never by a trial.
    """
    searching, sweeping = cfg.get("search") is not None, HydraConfig.get().mode == RunMode.MULTIRUN
    if searching and sweeping:
        raise InputError("search: runs its trials itself; leave out -m")
    if searching:
        return search(cfg)
    if sweeping:
        return run_trial(cfg)
    return run(cfg).get(cfg.optimized_metric)

"""A search by Optuna: trial after trial, through Hydra's launchers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.experimental.callback import Callback
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from nbmix.app.settings import check_config
from nbmix.app.sweep import exit_on_failure, summarise
from nbmix.app.trial import run_trial
from nbmix.app.words import hydra_text
from nbmix.errors import InputError


def search(cfg: DictConfig) -> float:
    """Let Optuna choose settings, trial after trial, to maximise ``optimized_metric``.

    Trials go through Hydra's launcher, ``search.n_jobs`` at a time, and their folders stand in that of this
    run. The sampler is the tree-structured Parzen estimator (Bergstra et al. 2011), seeded by ``seed``.

    Args:
        cfg: with ``search.n_trials``, ``search.n_jobs`` and ``search.space``, see conf/sweep/optuna.yaml.

    Returns:
        The largest value; NaN where no trial has one.

    Raises:
        InputError: Optuna is not installed, or the space names a setting or value that cannot be used.
    """
    optuna = _optuna()
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    check_config(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    space = parse_space(list(cfg.search.space))
    task = list(hydra.overrides.task)
    for override in space:
        for value in edges(override):  # a choice that is not there is said before any work
            compose(hydra.job.config_name, [*task, f"{override.key_or_group}={value}"])

    own = [*hydra.overrides.hydra, "hydra.mode=MULTIRUN", f"hydra.sweep.dir={hydra_text(str(folder))}"]
    config = compose(hydra.job.config_name, [*own, *task], return_hydra_config=True)
    loader = GlobalHydra.instance().config_loader()
    context = HydraContext(loader, Callback())  # type: ignore[arg-type]  # of Callbacks, two methods are called
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=context, task_function=run_trial, config=config
    )

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=cfg.seed))
    for begin in range(0, cfg.search.n_trials, cfg.search.n_jobs):
        asked = [study.ask() for _ in range(min(cfg.search.n_jobs, cfg.search.n_trials - begin))]
        chosen = [[f"{o.key_or_group}={suggest(trial, o)}" for o in space] for trial in asked]
        done = launcher.launch([[*task, *settings] for settings in chosen], initial_job_idx=begin)
        for trial, job in zip(asked, done, strict=True):
            reached = float(job.return_value) if job.status == JobStatus.COMPLETED else math.nan
            if math.isnan(reached):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, reached)
    exit_on_failure(summarise(folder, cfg.optimized_metric))
    return max((trial.value for trial in study.trials if trial.value is not None), default=math.nan)


def parse_space(lines: Sequence[str]) -> list[Override]:
    """Settings to search, in Hydra's words for sweeps.

        model.n_components=range(2,11)                 whole numbers, the last one left out
        start=choice(kmeans,random)
        model.lr=tag(log,interval(1e-4,1e-2))          even on a log scale

    Raises:
        InputError: a line that names no values, or a setting twice, or no line at all.
    """
    space = OverridesParser.create().parse_overrides(list(lines))
    if not space:
        raise InputError("search.space is empty; name settings, such as model.n_components=range(2,11)")
    for override in space:
        if not override.is_sweep_override():
            raise InputError(
                f"search.space: {override.input_line} names one value; use choice(a,b), range(from,to) or "
                "interval(from,to)"
            )
    keys = [override.key_or_group for override in space]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise InputError(f"search.space: {twice[0]} is there twice; name every setting once")
    return space


def suggest(trial: Any, override: Override) -> str:
    """The value that an Optuna trial takes of one line of the space, as Hydra writes it."""
    name, values = override.key_or_group, override.value()
    if isinstance(values, IntervalSweep):
        log_scale = "log" in values.tags
        return repr(trial.suggest_float(name, values.start, values.end, log=log_scale))
    choices = list(override.sweep_string_iterator())
    if override.is_range_sweep() and all(choice.lstrip("-").isdigit() for choice in choices):
        numbers = sorted(int(choice) for choice in choices)
        step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
        return str(trial.suggest_int(name, numbers[0], numbers[-1], step=step))
    return str(trial.suggest_categorical(name, choices))


def edges(override: Override) -> list[str]:
    """Values that tell whether a line of the space can be used: all choices, or both ends."""
    values = override.value()
    if isinstance(values, IntervalSweep):
        return [repr(values.start), repr(values.end)]
    choices = list(override.sweep_string_iterator())
    return [choices[0], choices[-1]] if override.is_range_sweep() else choices


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError:
        raise InputError("search: Optuna is not installed: pip install 'nbmix[sweeps]'") from None
    return optuna

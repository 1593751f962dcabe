"""Sweeps: trials that may fail, a table and a figure of all of them, and a search by Optuna.

Hydra runs the trials, in this process or by its joblib and submitit launchers. Each has a run folder below
that of the sweep, which in the end also holds sweep.csv and sweep.png. For a sweep that was stopped

    python -m nbmix.app.sweep multirun/DATE/TIME

writes them.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.experimental.callback import Callback
from hydra.types import HydraContext, RunMode
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from nbmix.app.command import TRACEBACK, is_bad_input, one_line, one_line_errors
from nbmix.app.run import run
from nbmix.app.settings import check_config
from nbmix.errors import InputError
from nbmix.evaluation.plots import held_out_curve, objective_trace

log = logging.getLogger(__name__)

FAILURE = "failure.json"  # of a trial: its one line, and whether the input was to blame

TABLE, PICTURE = "sweep.csv", "sweep.png"

HELD_OUT = "heldout_log_likelihood"

SHOWN = (
    *("n_components", HELD_OUT, "log_likelihood", "elbo", "ari", "nmi", "accuracy"),
    *("n_iterations", "converged", "seconds"),
)

# Trials


def objective(cfg: DictConfig) -> float | None:
    """What ``train.py`` does with a config: one run, a trial of a sweep, or a whole search.

    Returns:
        ``optimized_metric`` of metrics.json; NaN for a trial that failed, the best of a search.

    Raises:
        InputError: as ``nbmix.app.run.run``; never by a trial.
    """
    searching = cfg.get("search") is not None
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        if searching:
            raise InputError("search: runs its trials itself; leave out -m")
        return run_trial(cfg)
    return search(cfg) if searching else run(cfg).get(cfg.optimized_metric)


def run_trial(cfg: DictConfig) -> float:
    """One run of a sweep. A failure is written to its folder and leaves the other trials alone."""
    failure = Path(cfg.output_dir) / FAILURE
    failure.unlink(missing_ok=True)
    try:
        metrics = run(cfg)
        if cfg.optimized_metric not in metrics:
            log.warning("optimized_metric=%s: metrics.json has none to rank this trial", cfg.optimized_metric)
        return float(metrics.get(cfg.optimized_metric, math.nan))
    except Exception as error:
        reason = one_line(error)
        log.error("failed: %s", reason, exc_info=os.environ.get(TRACEBACK) == "1")
        failure.write_text(json.dumps({"error": reason, "bad_input": is_bad_input(error)}) + "\n")
        return math.nan


class Trial(NamedTuple):
    """What a trial left: its folder's name, its overrides, and metrics.json or why there is none."""

    name: str
    settings: dict[str, str]
    metrics: dict[str, Any]
    error: str | None = None
    bad_input: bool = False


def read_trials(folder: Path) -> list[Trial]:
    """Trials below the folder of a sweep, in the order of their numbers."""
    found = [file.parent.parent for file in folder.rglob(".hydra/overrides.yaml")]
    names = [str(trial.relative_to(folder)) for trial in found if trial != folder]
    names.sort(key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
    return [_read_trial(folder / name, name) for name in names]


def _read_trial(folder: Path, name: str) -> Trial:
    overrides = OmegaConf.load(folder / ".hydra/overrides.yaml")
    settings = dict(line.split("=", 1) for line in map(str, overrides) if "=" in line)
    if (folder / FAILURE).is_file():
        failure = json.loads((folder / FAILURE).read_text())
        return Trial(name, settings, {}, failure["error"], failure["bad_input"])
    if not (folder / "metrics.json").is_file():
        return Trial(name, settings, {}, "ended without results: stopped, or out of memory")
    return Trial(name, settings, json.loads((folder / "metrics.json").read_text()))


# The table and the figure


class Candidate(NamedTuple):
    """Trials that differ in their seed alone; mean, lowest and highest of the metric over their seeds.

    The lowest and highest are those after each seed's own level, its mean over all candidates, is moved to
    the mean of all seeds (Cousineau 2005): it is that of the held-out cells, whatever is fitted.
    """

    settings: dict[str, str]
    n_components: int
    mean: float
    lowest: float
    highest: float
    n_seeds: int


def varying(trials: Sequence[Trial]) -> list[str]:
    """Settings in which the trials differ."""
    keys = dict.fromkeys(key for trial in trials for key in trial.settings)
    return [key for key in keys if len({trial.settings.get(key) for trial in trials}) > 1]


def tabulate(trials: Sequence[Trial], metric: str) -> pd.DataFrame:
    """A row a trial: the settings in which they differ, ``metric`` and other results, and what failed."""
    keys = varying(trials)
    results = [name for name in dict.fromkeys((metric, *SHOWN)) if any(name in t.metrics for t in trials)]
    rows = [
        {"trial": trial.name}
        | {key: trial.settings.get(key, "") for key in keys}
        | {name: trial.metrics.get(name) for name in results}
        | {"error": trial.error or ""}
        for trial in trials
    ]
    table = pd.DataFrame(rows, columns=["trial", *keys, *results, "error"])
    return table.convert_dtypes()  # whole numbers stay whole where a trial has none


def candidates(trials: Sequence[Trial], metric: str) -> list[Candidate]:
    """Compare settings by ``metric``, over the seeds that all of them have.

    Held-out cells change with the seed, so a mean over other seeds is no fair comparison; where no seed is
    common to all, each has the mean over its own. Trials without the metric take no part.
    """
    keys = [key for key in varying(trials) if key != "seed"]
    groups: dict[tuple[str, ...], list[Trial]] = {}
    for trial in trials:
        if math.isfinite(trial.metrics.get(metric, math.nan)):
            groups.setdefault(tuple(trial.settings.get(key, "") for key in keys), []).append(trial)
    seeds = [{trial.settings.get("seed") for trial in group} for group in groups.values()]
    common = set.intersection(*seeds) if seeds else set()
    # over the common seeds every candidate weighs the same in every level
    shared = [t for group in groups.values() for t in group if t.settings.get("seed") in common]
    level = _seed_levels(shared, metric) if len(groups) > 1 else {}
    found = []
    for values, group in groups.items():
        kept = [trial for trial in group if not common or trial.settings.get("seed") in common]
        scores = [float(trial.metrics[metric]) for trial in kept]
        settings = {key: value for key, value in zip(keys, values, strict=True) if value}
        n_components = int(kept[0].metrics["n_components"])
        mean = math.fsum(scores) / len(scores)
        moved = [
            score - level.get(t.settings.get("seed"), 0.0) for score, t in zip(scores, kept, strict=True)
        ]
        centre = math.fsum(moved) / len(moved)  # of all candidates the same distance from their means
        lowest, highest = (mean + edge - centre for edge in (min(moved), max(moved)))
        n_seeds = len({trial.settings.get("seed") for trial in kept})
        found.append(Candidate(settings, n_components, mean, lowest, highest, n_seeds))
    return found


def _seed_levels(trials: Sequence[Trial], metric: str) -> dict[str | None, float]:
    """Mean of the metric over the trials of each seed."""
    scores: dict[str | None, list[float]] = {}
    for trial in trials:
        scores.setdefault(trial.settings.get("seed"), []).append(float(trial.metrics[metric]))
    return {seed: math.fsum(values) / len(values) for seed, values in scores.items()}


def draw(compared: Sequence[Candidate], metric: str) -> Figure:
    """The metric over K, mean and range over seeds; over the trials in their order where K is the same."""
    means = np.array([c.mean for c in compared])
    numbers = [c.n_components for c in compared]
    if len(compared) > 1 and len(set(numbers)) == 1:
        best = np.maximum.accumulate(means)
        series = {"this setting": means.tolist(), "best so far": best.tolist()}
        figure = objective_trace(range(len(means)), series)
        figure.axes[0].set_xlabel("setting, in the order of trials")
    else:
        seeds = {c.n_seeds for c in compared}
        ranges = np.array([[c.mean - c.lowest, c.highest - c.mean] for c in compared]).T  # (2, candidates)
        figure = held_out_curve(numbers, means, None if seeds == {1} else ranges)
        if seeds != {1}:
            title = figure.axes[0].get_title(loc="left")
            n = f"{min(seeds)}" if len(seeds) == 1 else f"up to {max(seeds)}"
            figure.axes[0].set_title(
                f"{title}; mean over {n} seeds, range without their levels", loc="left", fontsize="medium"
            )
    if metric != HELD_OUT:
        figure.axes[0].set_ylabel(metric)
    return figure


def summarise(folder: Path, metric: str) -> list[Trial]:
    """Write sweep.csv and sweep.png into the folder of a sweep, and say which settings are best.

    There is no picture where no trial has the metric.
    """
    trials = read_trials(folder)
    if not trials:
        return trials
    tabulate(trials, metric).to_csv(folder / TABLE, index=False)
    written, where = [TABLE], os.path.relpath(folder)
    if compared := candidates(trials, metric):
        draw(compared, metric).savefig(folder / PICTURE)
        written.append(PICTURE)
        best = max(compared, key=lambda candidate: candidate.mean)
        settings = " ".join(f"{key}={value}" for key, value in best.settings.items()) or "the one setting"
        seeds = f", mean of {best.n_seeds} seeds" if best.n_seeds > 1 else ""
        print(f"best by {metric}: {settings} ({best.mean:.8g}{seeds})")
    print(f"{len(trials)} trials: {' and '.join(written)} in {where}")
    return trials


def exit_on_failure(trials: Sequence[Trial]) -> None:
    """End the process with one line where trials failed: status 2 for bad input alone, else 1."""
    failed = [trial for trial in trials if trial.error is not None]
    if failed:
        first = failed[0]
        print(
            f"error: {len(failed)} of {len(trials)} trials failed, trial {first.name}: {first.error}",
            file=sys.stderr,
        )
        sys.exit(2 if all(trial.bad_input for trial in failed) else 1)


class SweepSummary(Callback):
    """Hydra's callback behind the table and the figure of every ``-m``."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        exit_on_failure(summarise(Path(config.hydra.sweep.dir), config.optimized_metric))


# A search


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
        for value in _edges(override):  # a choice that is not there is said before any work
            compose(hydra.job.config_name, [*task, f"{override.key_or_group}={value}"])

    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    own = [*hydra.overrides.hydra, "hydra.mode=MULTIRUN", f"hydra.sweep.dir='{quoted}'"]
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


def _edges(override: Override) -> list[str]:
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Table and figure of a sweep that was stopped, or whose launcher was."""
    parser = argparse.ArgumentParser(prog="python -m nbmix.app.sweep", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="of the sweep, such as multirun/DATE/TIME")
    parser.add_argument("--metric", default=HELD_OUT, help="of metrics.json (default: %(default)s)")
    given = parser.parse_args(arguments)
    with one_line_errors():
        if not (trials := summarise(given.folder, given.metric)):
            raise InputError(f"{given.folder}: holds no trials; give the folder of a sweep")
        exit_on_failure(trials)


if __name__ == "__main__":
    main()

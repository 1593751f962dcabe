"""The table and the figure of a sweep's trials.

Hydra runs the trials, in this process or by its joblib and submitit launchers. Each has a run folder below
that of the sweep, which in the end also holds sweep.csv and sweep.png. For a sweep that was stopped

    python -m nbmix.app.sweep multirun/DATE/TIME

writes them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from hydra.experimental.callback import Callback
from matplotlib.figure import Figure
from omegaconf import DictConfig

from nbmix.app.command import one_line_errors
from nbmix.app.trial import Trial, read_trials
from nbmix.errors import InputError
from nbmix.evaluation.plots import held_out_curve, objective_trace

TABLE, PICTURE = "sweep.csv", "sweep.png"

HELD_OUT = "heldout_log_likelihood"

SHOWN = (
    *("n_components", HELD_OUT, "log_likelihood", "elbo", "ari", "nmi", "accuracy"),
    *("n_iterations", "converged", "seconds"),
)


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
                f"{title}; mean over {n} seeds\nbars: range, each seed's mean removed",
                loc="left",
                fontsize="medium",
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

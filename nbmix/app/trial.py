"""A trial of a sweep or a search: a run that may fail, and what it left in its folder."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from nbmix.app.command import TRACEBACK, is_bad_input, one_line
from nbmix.app.run import run

log = logging.getLogger(__name__)

FAILURE = "failure.json"  # its one line, and whether the input was to blame


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
        settings = " ".join(HydraConfig.get().overrides.task) if HydraConfig.initialized() else "its settings"
        log.error("failed with %s: %s", settings, reason, exc_info=os.environ.get(TRACEBACK) == "1")
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

"""Folders of sweeps, as trials leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HELD_OUT = "heldout_log_likelihood"


def leave(
    folder: Path,
    name: str,
    overrides: list[str],
    held_out: float | None = None,
    *,
    n_components: int | None = None,
    error: str | None = None,
    **metrics: float,
) -> None:
    """A folder as a trial leaves it."""
    (folder / name / ".hydra").mkdir(parents=True)
    (folder / name / ".hydra/overrides.yaml").write_text(json.dumps(overrides))
    if error is not None:
        (folder / name / "failure.json").write_text(json.dumps({"error": error, "bad_input": True}))
    elif held_out is not None:
        found: dict[str, Any] = {HELD_OUT: held_out, "n_components": n_components} | metrics
        (folder / name / "metrics.json").write_text(json.dumps(found))


def small_sweep(folder: Path) -> Path:
    """K = 2 and 3 with three seeds each, of which one just ended, and one trial that failed."""
    values = {(2, 0): -10.0, (2, 1): -12.0, (2, 2): -5.0, (3, 0): -9.0, (3, 1): -11.5}
    for number, (k, seed) in enumerate((k, seed) for k in (2, 3) for seed in (0, 1, 2)):
        overrides = [f"model.n_components={k}", f"seed={seed}", "data=sim"]
        leave(folder, str(number), overrides, values.get((k, seed)), n_components=k, seconds=1.5)
    leave(folder, "10", ["model.n_components=9", "seed=0", "data=sim"], error="model.n_components=9: no")
    return folder

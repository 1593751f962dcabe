"""Fits that were kept, in checkpoints and AnnData: their model, arguments, and nothing of their cells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nbmix.data.checkpoint import SECTION, Checkpoint, load_checkpoint, write_checkpoint
from nbmix.data.kept_fit import KEPT, of_fields
from nbmix.data.module import CountsDataModule
from nbmix.errors import InputError
from nbmix.models.base import MixtureModule

OWN_SECTION = "estimator"  # of a checkpoint


class Progress(NamedTuple):
    """How a fit went.

    Attributes:
        objective: (iterations,) nats per cell.
        n_iterations: iterations or epochs.
        converged: None where a fit has no such notion.
    """

    objective: list[float]
    n_iterations: int
    converged: bool | None

    @classmethod
    def of(cls, model: MixtureModule) -> Progress:
        return cls(model.objective, model.n_iterations, model.converged)


class SavedFit(NamedTuple):
    """What a file holds: a fitted model, how its fit went, and plain values of whoever saved it."""

    fitted: Checkpoint
    progress: Progress
    own: dict[str, Any]


def checkpoint_of(model: MixtureModule, data: CountsDataModule) -> Checkpoint:
    """A copy of a model that was fitted to ``data``, without what would let the fit go on."""
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    return model.as_checkpoint(data, state)


def save_fit(path: Path, saved: SavedFit) -> None:
    """Write a checkpoint that ``train.py task=predict``, ``start=checkpoint`` and ``load_fit`` read."""
    fitted, progress, own = saved
    content = {
        "state_dict": fitted.state,
        SECTION: fitted.section,
        fitted.model: progress._asdict(),
        OWN_SECTION: own,
    }
    write_checkpoint(content, path)


def load_fit(path: Path) -> SavedFit:
    """Read a checkpoint of ``save_fit``, or of ``train.py``, which has no values of its maker.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint of nbmix.
    """
    fitted = load_checkpoint(path, "path")
    content = torch.load(path, map_location="cpu", weights_only=True)
    found = content.get(fitted.model, {})
    progress = Progress(found.get("objective", []), found.get("n_iterations", 0), found.get("converged"))
    return SavedFit(fitted, progress, content.get(OWN_SECTION, {}))


def fit_in(uns: Mapping[str, Any], key: str, where: str) -> SavedFit:
    """The fit that ``nbmix.cluster`` or ``train.py`` has left in ``uns`` of an AnnData.

    Raises:
        InputError: there is none, or it is damaged.
    """
    found = uns.get(key)
    kept = found.get(KEPT) if isinstance(found, Mapping) else None
    if found is None or not isinstance(kept, Mapping):
        raise InputError(
            f"{where}: uns[{key!r}] holds no fit for new cells; give what nbmix.cluster, or train.py with "
            "model=em or amortized, has written, or a checkpoint"
        )
    fitted, arguments = of_fields(kept, f"{where}: uns[{key!r}][{KEPT!r}]")
    objective = [float(value) for value in np.ravel(found.get("objective", []))]
    converged = found.get("converged")
    progress = Progress(
        objective, int(found.get("n_iterations", 0)), None if converged is None else bool(converged)
    )
    return SavedFit(fitted, progress, {"arguments": arguments})

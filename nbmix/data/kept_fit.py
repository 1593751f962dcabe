"""A fit in arrays and texts that ``AnnData.uns`` and its file can hold, for cells that come later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nbmix.data.checkpoint import UNREADABLE, Checkpoint, checked_checkpoint
from nbmix.errors import InputError

KEPT = "fit"  # entry of uns["nbmix"]

OF_COPIES = "mixture."  # tensors with a copy of the components for each fold, and one of all cells


def as_fields(checkpoint: Checkpoint, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What new cells need of a fit: of the mixture the copy that is fitted to all cells.

    Args:
        checkpoint: of the fit.
        arguments: of ``nbmix.NBMixture``, plain values: what made it, and where new cells have their counts.
    """
    section = checkpoint.section
    names = section.pop("gene_names")
    state = {
        name: (tensor[-1:] if name.startswith(OF_COPIES) else tensor).detach().cpu().numpy()
        for name, tensor in checkpoint.state.items()
    }
    empty = {name: list(values.shape) for name, values in state.items() if not values.size}
    return {
        "gene_names": np.array(names, dtype=object),
        "model": json.dumps(section | {"empty": empty}),  # files have no room for them
        "arguments": json.dumps(dict(arguments)),
        "state": {name: np.array(values) for name, values in state.items() if values.size},
    }


def of_fields(fields: Any, where: str) -> tuple[Checkpoint, dict[str, Any]]:
    """The fit, and the arguments, of ``as_fields``; the copies of folds are that of all cells.

    Raises:
        InputError: it is damaged, or none.
    """
    try:
        section = json.loads(fields["model"])
        settings = section["settings"]
        n_copies = 1 if settings.get("folds", 1) == 1 else settings["folds"] + 1
        state = dict(fields["state"]) | {name: np.zeros(shape) for name, shape in section["empty"].items()}
        checkpoint = Checkpoint(
            section["model"],
            settings,
            np.asarray(fields["gene_names"]).astype(str),
            section["median_size_factor"],
            section["cells"],
            {name: _tensor(name, values, n_copies) for name, values in state.items()},
            section["choice"],
            section["groups"],
            origin_names=tuple(section.get("batches", ())),
        )
        return checked_checkpoint(checkpoint), json.loads(fields["arguments"])
    except UNREADABLE:
        raise InputError(f"{where}: holds no fit that can be used, or a damaged one; fit again") from None


def _tensor(name: str, values: Any, n_copies: int) -> torch.Tensor:
    tensor = torch.tensor(np.asarray(values))
    is_of_copies = name.startswith(OF_COPIES) and tensor.numel() > 0
    return tensor.expand(n_copies, *tensor.shape[1:]) if is_of_copies else tensor

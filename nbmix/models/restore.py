"""Models by the name that a checkpoint has for them, and whether a fit can go on from one."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import numpy as np

import nbmix.models
from nbmix.data.checkpoint import Checkpoint
from nbmix.data.module import CountsDataModule
from nbmix.errors import InputError
from nbmix.models.base import MixtureModule


def model_classes() -> dict[str, type[Any]]:
    """Models by their ``kind``: of the modules in ``nbmix.models``, and of others that have been imported."""
    for module in pkgutil.iter_modules(nbmix.models.__path__):
        importlib.import_module(f"{nbmix.models.__name__}.{module.name}")
    classes = MixtureModule.__subclasses__()
    for model in classes:  # which grows on the way
        classes += model.__subclasses__()
    return {model.kind: model for model in classes if "kind" in vars(model)}


def model_class(kind: str) -> type[Any]:
    """The class of a model.

    Raises:
        LookupError: there is none of that ``kind``.
    """
    return model_classes()[kind]


def restore(checkpoint: Checkpoint) -> MixtureModule:
    """The module that a checkpoint was saved from, with its parameters.

    Raises:
        InputError: there is no such model, or its settings and parameters do not fit together.
    """
    try:
        module: MixtureModule = model_class(checkpoint.model)(checkpoint.gene_names, **checkpoint.settings)
        module.know_origins(checkpoint.origin_names)
        module.load_state_dict(checkpoint.state)
        module.take_joined(checkpoint.groups)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise InputError(
            "ckpt_path: its settings and parameters do not fit together; it is damaged, or of another "
            "version of nbmix"
        ) from error
    return module


def check_resumable(checkpoint: Checkpoint, model: MixtureModule, data: CountsDataModule, where: str) -> None:
    """Raise ``InputError`` unless ``model`` can go on from ``checkpoint`` with ``data``.

    With another split, cells that were fitted would count as held out.
    """
    advice = "to go on, give the model and data of that fit"
    if checkpoint.model != model.kind:
        raise InputError(f"{where}: is of model={checkpoint.model}; {advice}")
    if not np.array_equal(checkpoint.gene_names, model.gene_names):
        raise InputError(
            f"{where}: was fitted to {len(checkpoint.gene_names)} genes that are not the "
            f"{len(model.gene_names)} of the data; {advice}"
        )
    if checkpoint.origin_names != model.origin_names:
        theirs, ours = (", ".join(n) or "none" for n in (checkpoint.origin_names, model.origin_names))
        raise InputError(
            f"{where}: was fitted with batches {theirs}; the data has {ours} (data.batch_key); {advice}"
        )
    other = [
        f"model.{name}={value}"
        for name, value in checkpoint.settings.items()
        if name not in model.free_to_change and model.plain.get(name) != value
    ]
    if other:
        raise InputError(f"{where}: was fitted with {' '.join(other)}; {advice}")
    if checkpoint.cells != data.fingerprint:
        raise InputError(
            f"{where}: was fitted to other cells, or to another split of them; {advice} and its seed"
        )

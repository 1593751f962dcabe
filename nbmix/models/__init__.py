"""The modes of inference, as LightningModules."""

import numpy as np

from nbmix.checkpoint import Checkpoint, load_checkpoint
from nbmix.errors import InputError
from nbmix.models.amortized import AmortizedMixture
from nbmix.models.base import MixtureModule, Prediction
from nbmix.models.mixture_em import MixtureEM

MODELS: dict[str, type[MixtureEM] | type[AmortizedMixture]] = {
    model.kind: model for model in (MixtureEM, AmortizedMixture)
}


def restore(checkpoint: Checkpoint) -> MixtureModule:
    """The module that a checkpoint was saved from, with its parameters."""
    module = MODELS[checkpoint.model](checkpoint.gene_names, **checkpoint.settings)
    module.load_state_dict(checkpoint.state)
    return module


def check_resumable(checkpoint: Checkpoint, model: MixtureModule, where: str) -> None:
    """Raise ``InputError`` unless ``model`` can go on from ``checkpoint``."""
    advice = "to go on, give the model and data of that fit"
    if checkpoint.model != model.kind:
        raise InputError(f"{where}: is of model={checkpoint.model}; {advice}")
    if not np.array_equal(checkpoint.gene_names, model.gene_names):
        raise InputError(
            f"{where}: was fitted to {len(checkpoint.gene_names)} genes that are not the "
            f"{len(model.gene_names)} of the data; {advice}"
        )
    here = model.state_dict()
    if any(name not in here or here[name].shape != value.shape for name, value in checkpoint.state.items()):
        other = [f"model.{k}={v}" for k, v in checkpoint.settings.items() if model.plain[k] != v]
        raise InputError(f"{where}: was fitted with {' '.join(other)}; {advice}")


__all__ = [
    "MODELS",
    "AmortizedMixture",
    "Checkpoint",
    "MixtureEM",
    "MixtureModule",
    "Prediction",
    "check_resumable",
    "load_checkpoint",
    "restore",
]

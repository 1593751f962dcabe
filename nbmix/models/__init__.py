"""The modes of inference, as LightningModules."""

from nbmix.models.amortized import AmortizedMixture
from nbmix.models.base import MixtureModule, Prediction
from nbmix.models.checkpoint import Checkpoint, load_checkpoint
from nbmix.models.mixture_em import MixtureEM

MODELS: dict[str, type[MixtureEM] | type[AmortizedMixture]] = {
    model.kind: model for model in (MixtureEM, AmortizedMixture)
}


def restore(checkpoint: Checkpoint) -> MixtureModule:
    """The module that a checkpoint was saved from, with its parameters."""
    module = MODELS[checkpoint.model](checkpoint.gene_names, **checkpoint.settings)
    module.load_state_dict(checkpoint.state)
    return module


__all__ = [
    "MODELS",
    "AmortizedMixture",
    "Checkpoint",
    "MixtureEM",
    "MixtureModule",
    "Prediction",
    "load_checkpoint",
    "restore",
]

"""Models by the name that a checkpoint has for them, and whether a fit can go on from one."""

from __future__ import annotations

import numpy as np

from nbmix.data.checkpoint import Checkpoint, load_checkpoint
from nbmix.data.module import CountsDataModule
from nbmix.errors import InputError
from nbmix.models.amortized import AmortizedMixture
from nbmix.models.base import MixtureModule, Prediction
from nbmix.models.gmvae import GMVAE
from nbmix.models.mixture_em import MixtureEM
from nbmix.models.vaec import VAEC

MODELS: dict[str, type[MixtureEM] | type[AmortizedMixture] | type[VAEC] | type[GMVAE]] = {
    model.kind: model for model in (MixtureEM, AmortizedMixture, VAEC, GMVAE)
}


def restore(checkpoint: Checkpoint) -> MixtureModule:
    """The module that a checkpoint was saved from, with its parameters.

    Raises:
        InputError: there is no such model, or its settings and parameters do not fit together.
    """
    try:
        module = MODELS[checkpoint.model](checkpoint.gene_names, **checkpoint.settings)
        module.load_state_dict(checkpoint.state)
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(
            "ckpt_path: its settings and parameters do not fit together; it is damaged, or of another "
            "version of nbmix"
        ) from error
    return module


# settings that say how far or how fast a fit goes, not what it is
FREE_TO_CHANGE = (
    "tolerance",
    "patience",
    "lr",
    "components_lr",
    "encoder_epochs",
    "start_epochs",
    "kl_epochs",
    "n_draws",
)


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
    other = [
        f"model.{name}={value}"
        for name, value in checkpoint.settings.items()
        if name not in FREE_TO_CHANGE and model.plain.get(name) != value
    ]
    if other:
        raise InputError(f"{where}: was fitted with {' '.join(other)}; {advice}")
    if checkpoint.cells != data.fingerprint:
        raise InputError(
            f"{where}: was fitted to other cells, or to another split of them; {advice} and its seed"
        )


__all__ = [
    "GMVAE",
    "MODELS",
    "VAEC",
    "AmortizedMixture",
    "Checkpoint",
    "MixtureEM",
    "MixtureModule",
    "Prediction",
    "check_resumable",
    "load_checkpoint",
    "restore",
]

"""The fit, of the command and of Python: choose K where it is open, make the model, begin it, train it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch

from nbmix.core.memory import give_back
from nbmix.core.settings import MixtureSettings
from nbmix.data.checkpoint import load_checkpoint
from nbmix.data.module import CountsDataModule
from nbmix.errors import InputError
from nbmix.models.base import MixtureModule
from nbmix.models.restore import check_resumable
from nbmix.starts.base import Start, check_components
from nbmix.starts.choice import Choice, Range, choose_n_components
from nbmix.starts.random import RandomStart


class ModelSpec(NamedTuple):
    """The model to fit, before its genes are known.

    Attributes:
        make: gene names (genes,) and K -> the model.
        n_components: K; or "auto", or a range such as "2-10", to have it chosen.
        weights: of the components, see ``MixtureSettings``; the search for K takes the same.
    """

    make: Callable[[np.ndarray, int], MixtureModule]
    n_components: int | str
    weights: str = "learned"


class Fitted(NamedTuple):
    """A fitted model, the cells of its fit, and the choice of K where it was left open."""

    data: CountsDataModule
    model: MixtureModule
    choice: Choice | None


def fit(
    spec: ModelSpec,
    start: Start,
    data: CountsDataModule,
    trainer: pl.Trainer,
    *,
    seed: int,
    ckpt_path: str | None = None,
    when_ready: Callable[[], None] = lambda: None,
) -> Fitted:
    """Fit a model to the training cells of ``data``.

    The start draws from a generator of ``seed``; encoders and minibatches from torch's own, which is for the
    caller to seed.

    Args:
        spec: the model.
        start: where it begins, unless it goes on.
        data: the cells; they are read here.
        trainer: says how far and where.
        seed: of the search for K and of the start.
        ckpt_path: a checkpoint of this fit, to go on from.
        when_ready: called before the first epoch, once all input is known to be good.

    Raises:
        InputError: data or settings that do not fit together, or a checkpoint that is not of this fit.
    """
    allowed = Range.parse(spec.n_components)
    data.setup()
    checkpoint = None if ckpt_path is None else load_checkpoint(ckpt_path)
    cells, generator = data.training_data, np.random.default_rng(seed)
    n_components: Any = spec.n_components
    choice = None
    if allowed is not None and checkpoint is not None:
        n_components = checkpoint.settings.get("n_components")
        choice = None if checkpoint.choice is None else Choice.of(checkpoint.choice)
    elif allowed is not None:
        search = start if isinstance(start, RandomStart) else None
        one = MixtureSettings(1, weights=spec.weights)
        choice = choose_n_components(cells, one, allowed, generator, search)
        n_components = choice.recommended
    model = spec.make(data.data.gene_names, n_components)
    check_components(cells, model.mixture.settings)
    model.choice = None if choice is None else choice.plain
    if checkpoint is None:
        found = choice.start if choice is not None and isinstance(start, RandomStart) else None
        model.begin(found or start(cells, model.mixture.settings, generator), data)
    else:
        where = f"ckpt_path={ckpt_path}"
        check_resumable(checkpoint, model, data, where)
        if not checkpoint.sealed:
            raise InputError(f"{where}: has no checksum; only what train.py saves can be gone on with")
    del cells  # a copy of most counts, if they are in memory
    give_back()
    when_ready()
    _train(trainer, model, data, ckpt_path)
    return Fitted(data, model, choice)


def _train(trainer: pl.Trainer, model: MixtureModule, data: CountsDataModule, ckpt_path: str | None) -> None:
    """``trainer.fit``; what a damaged checkpoint makes of it is said in one line."""
    try:
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if ckpt_path is None or model.has_begun or isinstance(error, InputError | torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"ckpt_path={ckpt_path}: is damaged, or of another version of nbmix ({reason:.100})"
        ) from error

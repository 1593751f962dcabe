"""The fit, of the command and of Python: make the model, begin it, train it, join its components."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch

from nbmix.core.declared import check_settings, declared
from nbmix.core.memory import give_back
from nbmix.core.settings import MixtureSettings, n_to_fit, n_to_join
from nbmix.data.checkpoint import Checkpoint, load_checkpoint, update_checkpoint
from nbmix.data.counts import CountData
from nbmix.data.module import CountsDataModule
from nbmix.data.origins import check_origins
from nbmix.errors import InputError
from nbmix.models.base import MixtureModule, Prediction
from nbmix.models.restore import check_resumable
from nbmix.progress import say
from nbmix.starts.base import Start, check_components, finds_components, n_brought
from nbmix.starts.choice import Choice, Range, choose_n_components, too_few_cells
from nbmix.starts.random import RandomStart
from nbmix.starts.search import CELLS_A_COMPONENT, SEARCHING
from nbmix.training.joining import join_components
from nbmix.training.predict import predict


class ModelSpec(NamedTuple):
    """The model to fit, before its genes and its size are known.

    Attributes:
        kind: of model.
        settings: of it; ``n_components`` may be "auto", or a range such as "2-10", to have it chosen.
        make: gene names (genes,) and the settings that say how many components it has -> the model.
    """

    kind: type[MixtureModule]
    settings: Mapping[str, Any]
    make: Callable[[np.ndarray, dict[str, Any]], MixtureModule]

    def setting(self, name: str) -> Any:
        """The value of a setting, or its default; None where the model has no such setting."""
        of_kind = declared(self.kind).get(name)
        return None if of_kind is None else self.settings.get(name, of_kind.default)

    @property
    def may_join(self) -> bool:
        """Whether components are joined to groups, if the start allows it."""
        return self.kind.can_join(self.settings) and self.setting("components_per_group") not in (None, 1)

    def joins(self, start: Start) -> bool:
        """Whether as many components are fitted as it takes to join them to groups, with that start."""
        return self.may_join and finds_components(start)

    def model(self, gene_names: np.ndarray, size: Size) -> MixtureModule:
        """The model of that size."""
        numbers: dict[str, Any] = {"n_components": size.n_groups}
        if self.setting("components_per_group") is not None:
            numbers["components_per_group"] = size.components_per_group
        return self.make(gene_names, numbers)


class Size(NamedTuple):
    """How large a model is.

    Attributes:
        n_groups: K.
        components_per_group: on average.
        choice: of K, by an elbow.
        is_joined: components are joined to groups, of which number 0 is the largest; else each is a group.
        may_be_fewer: see ``MixtureSettings``.
    """

    n_groups: int
    components_per_group: float = 1.0
    choice: Choice | None = None
    is_joined: bool = False
    may_be_fewer: bool = False


class Fitted(NamedTuple):
    """A model, its data, and what it says of all cells.

    Attributes:
        data: the cells.
        model: fitted, its components joined to groups.
        cells: what it says of all cells of ``data``.
    """

    data: CountsDataModule
    model: MixtureModule
    cells: Prediction


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
    """Fit a model to the training cells of ``data``, and join its components to groups.

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
    allowed = Range.parse(spec.setting("n_components"))
    say("reading cells")
    data.setup()
    check_origins(data.data)
    spec.kind.check_origins(data.data.origin_names)
    checkpoint = None if ckpt_path is None else load_checkpoint(ckpt_path)
    cells, generator = data.training_data, np.random.default_rng(seed)
    say(SEARCHING)
    if checkpoint is None:
        size = size_of(spec, start, cells, generator)
    else:
        size = size_of_checkpoint(spec, start, checkpoint)
    model = spec.model(data.data.gene_names, size)
    model.know_origins(data.data.origin_names)
    check_components(cells, model.mixture.settings)
    choice = size.choice
    if checkpoint is None:
        found = choice.start if choice is not None and isinstance(start, RandomStart) else None
        if found is None:
            settings = replace(model.mixture.settings, may_be_fewer=size.may_be_fewer)
            found = start(cells, settings, generator)
        if found.n_components < model.mixture.settings.n_components:
            size = size._replace(components_per_group=found.n_components / size.n_groups)
            model = spec.model(data.data.gene_names, size)
            model.know_origins(data.data.origin_names)
        model.begin(found, data)
    else:
        where = f"ckpt_path={ckpt_path}"
        check_resumable(checkpoint, model, data, where)
        if not checkpoint.sealed:
            raise InputError(f"{where}: has no checksum; only what train.py saves can be gone on with")
    model.choice = None if choice is None else choice.plain
    del cells  # a copy of most counts, if they are in memory
    give_back()
    when_ready()
    _train(trainer, model, data, ckpt_path)
    say("assigning cells")
    said = predict(trainer, model, data)
    give_back()
    say("joining components")
    join_components(data, model, said, allowed, to_groups=size.is_joined)
    if trainer.is_global_zero:
        _keep_groups(trainer, model, data)
    return Fitted(data, model, said)


def size_of(spec: ModelSpec, start: Start, cells: CountData, generator: np.random.Generator) -> Size:
    """The size of a model that begins anew.

    "auto" components a group are one each where their joins cannot be known: without folds, with weights
    given for each cell, and where a start has components of its own.

    Raises:
        InputError: components cannot be joined, or there are too few cells to choose among numbers of groups.
    """
    wanted, per_group = spec.setting("n_components"), spec.setting("components_per_group")
    allowed = Range.parse(wanted)
    given = {"n_components": wanted} if allowed is None else {}
    if per_group is not None:
        given["components_per_group"] = per_group
    check_settings("model", given, declared(spec.kind))
    if per_group not in (None, "auto", 1) and not spec.joins(start):
        raise InputError(
            f"model.components_per_group={per_group}: this fit cannot tell which components belong together; "
            "set 1; or model.folds of 2 or more, weights that are not given, a start that finds components"
        )
    is_joined = spec.joins(start)
    if allowed is None and not is_joined and spec.may_join and n_brought(start) > wanted:
        return Size(wanted, n_brought(start) / wanted, is_joined=True)
    if allowed is not None and not is_joined:
        one = MixtureSettings(1, weights=spec.setting("weights") or "learned")
        search = start if isinstance(start, RandomStart) else None
        choice = choose_n_components(cells, one, allowed, generator, search)
        return Size(choice.recommended, choice=choice)
    n_groups = wanted if allowed is None else allowed.most
    if not is_joined:
        return Size(n_groups)
    most = cells.n_cells // CELLS_A_COMPONENT  # a component of fewer shows nothing
    if allowed is not None:
        if most < max(2, allowed.least):
            raise too_few_cells(cells.n_cells, allowed)
        n_groups = min(n_groups, most)
    if per_group == "auto":
        fitted = max(n_groups, min(n_to_join(n_groups if allowed is None else allowed.most), most))
    else:
        fitted = n_to_fit(n_groups, per_group)
        if fitted > cells.n_cells:
            raise InputError(
                f"model.components_per_group={per_group}: makes {fitted} components for {n_groups} groups, "
                f"and there are only {cells.n_cells} cells to fit; give a smaller number, or fewer groups"
            )
    may_be_fewer = per_group == "auto" and allowed is None
    return Size(n_groups, fitted / n_groups, is_joined=True, may_be_fewer=may_be_fewer)


def size_of_checkpoint(spec: ModelSpec, start: Start, checkpoint: Checkpoint) -> Size:
    """The size of a model that goes on: that of the checkpoint where the settings leave it open."""
    n_groups, per_group = spec.setting("n_components"), spec.setting("components_per_group")
    choice = None
    if Range.parse(n_groups) is not None:
        n_groups = checkpoint.settings.get("n_components")
        per_group = "auto"
        choice = None if checkpoint.choice is None else Choice.of(checkpoint.choice)
    if per_group in (None, "auto"):
        per_group = checkpoint.settings.get("components_per_group", 1.0)
    return Size(n_groups, per_group, choice, is_joined=spec.joins(start) or per_group > 1)


def _keep_groups(trainer: pl.Trainer, model: MixtureModule, data: CountsDataModule) -> None:
    """Write the groups into the checkpoints of a fit that has ended."""
    if model.joins is None:
        return
    checkpoint = model.as_checkpoint(data, model.state_dict(), data.fingerprint)
    for callback in trainer.checkpoint_callbacks:
        path = getattr(callback, "path", None)
        if path is not None and path.is_file():
            update_checkpoint(path, checkpoint)


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

"""Settings of a command, checked before any work by what the classes and functions declare that take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

from nbmix.core.declared import (
    LARGEST_SEED,
    Declared,
    Setting,
    check_settings,
    declared,
    shown,
)
from nbmix.errors import InputError
from nbmix.evaluation.embedding import MOST_UMAP_CELLS, MaxUmapCells
from nbmix.starts.choice import Range

OBJECTS = ("trainer", "data", "model", "start", "logger")

GROUPS = (*OBJECTS, "callbacks", "evaluation")

SUBGROUPS = ("model.m_step", "start.inner")  # where there are any


@dataclass
class RunSettings:
    """Settings at the top of conf/config.yaml."""

    output_dir: Annotated[str, Setting("The folder of the run. hydra.run.dir=FOLDER names it.")]
    task: Annotated[
        str,
        Setting(
            "With fit a model is fitted. With predict the checkpoint is applied to the cells of data.",
            words=("fit", "predict"),
        ),
    ] = "fit"
    seed: Annotated[
        int,
        Setting(
            "The seed of the held-out cells, the folds, the start, the networks and the batches.",
            least=0,
            most=LARGEST_SEED,
        ),
    ] = 0
    ckpt_path: Annotated[
        str | None,
        Setting("The checkpoint to go on from, or to predict with. last is the one in hydra.run.dir."),
    ] = None
    n_groups: Annotated[
        int | str | None,
        Setting(
            "With task=predict, another number of groups, from the joins of the "
            "checkpoint. auto takes as many as have gaps between them. With null the "
            "groups are those of the fit.",
            least=1,
            words=("auto",),
        ),
    ] = None
    overwrite: Annotated[
        bool, Setting("With true the run writes into the folder even if it holds results of other settings.")
    ] = False
    optimized_metric: Annotated[str, Setting("The number in metrics.json that a sweep maximises.")] = (
        "heldout_log_likelihood"
    )


@dataclass
class EvaluationSettings:
    """Settings of what is made of a fit."""

    pictures: Annotated[
        Sequence[str],
        Setting(
            "Functions that draw the pictures of the report. Each takes the Results of a "
            "run and returns a figure or None."
        ),
    ]
    more_pictures: Annotated[
        Sequence[str],
        Setting(
            "Functions that draw further pictures, after those of evaluation.pictures. "
            "Each takes the Results of a run and returns a figure or None."
        ),
    ] = ()
    scores: Annotated[
        Sequence[str],
        Setting(
            "Functions that add numbers to metrics.json. Each takes the Results of a run and returns a dict."
        ),
    ] = ()
    max_umap_cells: MaxUmapCells = MOST_UMAP_CELLS


@dataclass
class SearchSettings:
    """Settings of a search by Optuna."""

    space: Annotated[
        Sequence[str],
        Setting(
            "The settings to search, each with choice(a,b), range(from,to), "
            "interval(from,to) or tag(log,interval(from,to))."
        ),
    ]
    n_trials: Annotated[int, Setting("The number of fits.", least=1)] = 20
    n_jobs: Annotated[
        int,
        Setting(
            "The number of trials at a time. More than 1 is for a launcher that runs them in parallel.",
            least=1,
        ),
    ] = 1


WITHOUT_TARGET = {
    "": RunSettings,
    "evaluation": EvaluationSettings,
    "search": SearchSettings,
}  # groups of other settings


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for the first setting whose value cannot be used.

    Args:
        config: plain values in nested dicts, as a config has them; settings that are not there are left out.
    """
    for group in (*GROUPS, *SUBGROUPS):
        found, value = _value(config, group)
        if not isinstance(value, Mapping) and (found or group in GROUPS):
            raise InputError(f"{group}={shown(value)}: is a group of settings; name one that is in conf/")
        if group in OBJECTS and not isinstance(value.get("_target_"), str):
            raise InputError(f"{group}={shown(value)}: has no _target_; name one of conf/{group}/")
    for name, callback in config["callbacks"].items():
        if not isinstance(callback, Mapping):
            raise InputError(
                f"callbacks.{name}={shown(callback)}: must be settings; ~callbacks.{name} drops it"
            )
    for group, values in _groups(config):
        given = {name: value for name, value in values.items() if value != "???"}  # which Hydra names itself
        if group == "model" and Range.parse(given.get("n_components")) is not None:
            del given["n_components"]  # to be chosen
        check_settings(group, given, settings_of(group, values))


def settings_of(group: str, values: Mapping[str, Any]) -> dict[str, Declared]:
    """What is declared of the settings of a group; of what others wrote, nothing is.

    Raises:
        InputError: the group names a class or function of nbmix that is not there.
    """
    target = str(values.get("_target_", ""))
    if not target.startswith("nbmix."):
        return declared(WITHOUT_TARGET[group]) if group in WITHOUT_TARGET else {}
    module, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        found = None
    if not callable(found):
        raise InputError(f"{group}._target_={target}: there is no such class or function; see conf/")
    return declared(found)


def _groups(values: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A group of settings and all groups in it, with their names."""
    yield group, values
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _groups(value, f"{group}.{name}" if group else str(name))


def _value(config: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return False, None
        value = value[name]
    return True, value

"""Arguments as scikit-learn has them, made into what a fit takes: a model, a start, a seed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from nbmix.errors import InputError, did_you_mean
from nbmix.models.base import MixtureModule
from nbmix.models.restore import model_classes
from nbmix.starts.base import Start
from nbmix.starts.named import named_starts


class ModelArguments(NamedTuple):
    """A model's class, and the settings to make it with."""

    kind: type[MixtureModule]
    settings: dict[str, Any]


def models_in_python() -> dict[str, type[MixtureModule]]:
    """Models that can be named in Python, in the order of their names."""
    return {kind: model for kind, model in sorted(model_classes().items()) if model.in_python}


def model_of(name: str, common: Mapping[str, Any], own: Mapping[str, Any] | None) -> ModelArguments:
    """The model of that name.

    Args:
        name: of the model.
        common: settings of any model, of which it takes those that it has.
        own: settings of this model.

    Raises:
        InputError: there is no such model, or it has no such setting.
    """
    models = models_in_python()
    if name not in models:
        raise InputError(f"model={name}: choose one of {', '.join(models)}{did_you_mean(name, models)}")
    kind, own = models[name], own or {}
    known = set(inspect.signature(kind).parameters) - {"gene_names"}
    if unknown := sorted(own.keys() - known):
        raise InputError(
            f"model_settings: model={name} has no {unknown[0]!r}; its settings are {', '.join(sorted(known))}"
            f"{did_you_mean(unknown[0], known)}"
        )
    settings = {key: plain(value) for key, value in {**common, **own}.items() if key in known}
    return ModelArguments(kind, settings)


def start_of(start: str | Start) -> Start:
    """The start of that name, or ``start`` itself.

    Raises:
        InputError: there is no start of that name.
    """
    if not isinstance(start, str):
        return start
    known = named_starts()
    if start not in known:
        near = did_you_mean(start, known)
        raise InputError(
            f"start={start}: choose one of {', '.join(known)}, or an object of nbmix.starts{near}"
        )
    return known[start]()


def seed_of(random_state: int | np.random.RandomState | None) -> int:
    """A seed: the number itself, or one drawn from the generator."""
    if random_state is None:
        return int(np.random.default_rng().integers(2**31))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31))
    if not isinstance(plain(random_state), int) or random_state < 0:
        raise InputError(f"random_state={random_state}: must be a whole number from 0 on, or None")
    return int(random_state)


def given(value: Any, default: Any) -> Any:
    """``value``, or the default where it is None."""
    return default if value is None else plain(value)


def plain(value: Any) -> Any:
    """A NumPy number, such as a grid search gives, as one of Python's."""
    return value.item() if isinstance(value, np.generic) else value

"""Functions that a setting names."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

from omegaconf import ListConfig

from nbmix.errors import InputError


def functions_named(key: str, names: Any) -> list[Callable[..., Any]]:
    """The functions that a list in the config names, as in ``nbmix.output.pictures.objective_trace``.

    Args:
        key: of the setting.
        names: its value.

    Raises:
        InputError: it is no list of names, or one of them is not there or no function.
    """
    if not isinstance(names, ListConfig | list):
        shown = "null" if names is None else names
        raise InputError(f"{key}={shown}: must be a list of functions, as in [module.function]")
    return [_function(key, name) for name in names]


def _function(key: str, name: Any) -> Callable[..., Any]:
    try:
        found = resolve_name(name)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{key}: {name!r} cannot be found: {reason}; give module.function") from error
    if not (callable(found) and hasattr(found, "__name__")):
        raise InputError(f"{key}: {name!r} is no function")
    return found

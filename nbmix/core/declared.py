"""Settings: each is declared once, in the signature of the class or function that uses it.

    @checked("start")
    @dataclass(frozen=True)
    class KMeansStart:
        n_pcs: Annotated[int, Setting("principal components that k-means sees", least=1)] = 20

The type says of what kind a value is, ``Setting`` its meaning and bounds, the signature its default. From
these come the checks of every call and of the command line, the values and comments in conf/, and
docs/settings.md.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from nbmix.errors import InputError, did_you_mean, refuse_unknown

REQUIRED = inspect.Parameter.empty  # the default of a setting that has none

LARGEST_SEED = 2**32 - 1  # that NumPy's older generators take

KINDS: dict[Any, tuple[type, str]] = {  # type in a signature -> type of its values, and what they are
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text (write a number that is one as '\"1\"')"),
    os.PathLike: (os.PathLike, ""),
    Sequence: (Sequence, "a list, as in [a,b]"),
    NoneType: (NoneType, "null"),
}

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Setting:
    """What a setting means, and the bounds of its values.

    Attributes:
        meaning: one short sentence for users, or two.
        least, most: the smallest and the largest number allowed.
        above, below: numbers that are just not allowed.
        words: the only texts allowed, where there are any.
    """

    meaning: str
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    words: tuple[str, ...] = ()


class Declared(NamedTuple):
    """A setting in a signature: its default, or REQUIRED; the types of its values; meaning and bounds."""

    default: Any
    types: tuple[Any, ...]
    setting: Setting


def checked(group: str, *others: Callable[..., Any]) -> Callable[[T], T]:
    """Decorate a class or function: every call raises ``InputError`` for a setting that cannot be used.

    Args:
        group: what the names of its settings begin with, as in conf/.
        others: classes and functions that further keyword arguments are passed on to.
    """

    def decorate(decorated: T) -> T:
        target: Any = decorated
        is_class = inspect.isclass(target)
        call = target.__init__ if is_class else target
        names = list(inspect.signature(call).parameters)
        passes_on = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(call).parameters.values())

        @functools.wraps(call)
        def check_and_call(*positional: Any, **named: Any) -> Any:
            if not passes_on:
                refuse_unknown(target.__name__, named, names)
            given = dict(zip(names, positional, strict=False)) | named
            check_settings(group, given, declared(target))
            return call(*positional, **named)

        checked_call: Any = check_and_call
        checked_call.others = others
        if not is_class:
            return checked_call
        target.__init__ = checked_call
        return decorated

    return decorate


def declared(target: Callable[..., Any]) -> dict[str, Declared]:
    """The settings that a class or function takes, by name, and those that it passes on."""
    return _declared(target)


@functools.cache
def _declared(target: Any) -> dict[str, Declared]:
    call = target.__init__ if inspect.isclass(target) else target
    found: dict[str, Declared] = {}
    for other in getattr(call, "others", ()):
        found |= declared(other)
    hints = get_type_hints(call, include_extras=True)
    for name, parameter in inspect.signature(call).parameters.items():
        for record in getattr(hints.get(name), "__metadata__", ()):
            if isinstance(record, Setting):
                found[name] = Declared(parameter.default, _types(get_args(hints[name])[0]), record)
    return found


def settings_among(values: Mapping[str, Any], target: Callable[..., Any]) -> dict[str, Any]:
    """Those of ``values``, such as a constructor's ``locals()``, that ``target`` declares; in its order."""
    return {name: values[name] for name in declared(target)}


def check_settings(group: str, values: Mapping[str, Any], settings: Mapping[str, Declared]) -> None:
    """Raise ``InputError`` for the first of ``values`` that its setting does not take."""
    for name, one in settings.items():
        if name in values:
            check_value(f"{group}.{name}" if group else name, values[name], one)


def check_value(key: str, value: Any, one: Declared) -> None:
    """Raise ``InputError`` unless a setting takes ``value``; ``key`` is its name in the message."""
    of_a_kind = any(_is_a(value, kind, one.setting.words) for kind in one.types)
    if reason := _why_out_of_bounds(value, one.setting) if of_a_kind else _kinds_in_words(one):
        near = did_you_mean(value, one.setting.words) if isinstance(value, str) else ""
        raise InputError(f"{key}={shown(value)}: {reason}{near}")


def shown(value: Any) -> str:
    """A value as it is on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _types(hint: Any) -> tuple[Any, ...]:
    """The types that a hint names: int | None -> int, NoneType."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(get_origin(part) or part for part in parts)


def _is_a(value: Any, kind: Any, words: tuple[str, ...]) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, str):
        return kind is str and (not words or value in words)
    return isinstance(value, KINDS[kind][0])


def _kinds_in_words(one: Declared) -> str:
    words = one.setting.words
    if words and set(one.types) <= {str, NoneType}:
        return f"choose {' or '.join(words)}" if len(words) == 2 else f"choose one of {', '.join(words)}"
    kinds = [" or ".join(words) if kind is str and words else KINDS[kind][1] for kind in one.types]
    return f"must be {' or '.join(kind for kind in kinds if kind)}"


def _why_out_of_bounds(value: Any, setting: Setting) -> str | None:
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    number = float(value)
    if not math.isfinite(number):
        return "must be finite"
    if number < setting.least:
        return f"must be {setting.least:.15g} or more"
    if number > setting.most:
        return f"must be at most {setting.most:.15g}"
    if number <= setting.above:
        return f"must be above {setting.above:.15g}"
    return f"must be below {setting.below:.15g}" if number >= setting.below else None

"""The one exception that is meant for people, and others in one line."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class InputError(ValueError):
    """A file, field or setting that cannot be used.

    The message is one line: what is wrong with which file, field or setting, and what to do.
    The command line prints it and exits with status 2; no traceback. Names out of a file cannot break
    the line.
    """

    def __init__(self, message: str) -> None:
        words = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in words))


def in_one_line(error: Exception) -> str:
    """Kind and message of an exception.

    >>> in_one_line(KeyError("depth"))
    "KeyError: 'depth'"
    """
    return " ".join(f"{type(error).__name__}: {error}".split())


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """The nearest of some words, as the end of a message; nothing where none is near.

    >>> did_you_mean("n_component", ["n_components", "folds"], "model.")
    '; did you mean model.n_components?'
    """
    near = difflib.get_close_matches(word, list(known), 1, 0.7)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def refuse_unknown(call: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a TypeError that names the nearest argument, where a call is given one that there is not."""
    known = list(known)
    for name in given:
        if name not in known:
            near = did_you_mean(name, known)
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}{near}")


def naming_the_nearest(function: F) -> F:
    """Decorate a function without ``**``: see ``refuse_unknown``."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*positional: Any, **named: Any) -> Any:
        refuse_unknown(function.__qualname__.removesuffix(".__init__"), named, known)
        return function(*positional, **named)

    return call  # type: ignore[return-value]  # of the same signature

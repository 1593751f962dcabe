"""What is going on, said to whoever listens: to nobody, unless a display or a log does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple, Protocol


class Step(NamedTuple):
    """Where the work stands.

    Attributes:
        phase: what is done, as in "drawing".
        done, total: how much of it, in units of its own; None where it cannot be said.
        state: more words.
        has_ended: the phase is over, before what it could have taken.
    """

    phase: str
    done: float = 0.0
    total: float | None = None
    state: str = ""
    has_ended: bool = False


class Listener(Protocol):
    """Told of steps, from any thread."""

    def __call__(self, step: Step) -> None: ...


_listeners: list[Listener] = []


def say(
    phase: str, done: float = 0.0, total: float | None = None, *, state: str = "", has_ended: bool = False
) -> None:
    """Say where the work stands; the first word of another phase ends the one before."""
    if _listeners:
        _listeners[-1](Step(phase, done, total, state, has_ended))


def is_heard() -> bool:
    """Whether anybody listens."""
    return bool(_listeners)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have a listener told what goes on, in place of the one before."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class Count:
    """Says how many steps of a phase are done, from any thread."""

    def __init__(self, phase: str, total: float) -> None:
        self._phase, self._total, self._done, self._lock = phase, total, 0, Lock()
        say(phase, 0, total)

    def __call__(self) -> None:
        """One more."""
        with self._lock:
            self._done += 1
            say(self._phase, self._done, self._total)

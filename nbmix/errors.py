"""The one exception that is meant for people, and others in one line."""

from __future__ import annotations


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

"""Errors on the command line: one line and an exit status, unless a traceback is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nbmix.errors import InputError

TRACEBACK = "HYDRA_FULL_ERROR"


@contextmanager
def one_line_errors(whole_process: bool = False) -> Iterator[None]:
    """Turn an exception into one line on stderr: exit status 2 for bad input, 1 for anything else.

    ``whole_process`` is for the outermost use, around Hydra's own reading of the command line. With
    HYDRA_FULL_ERROR=1 in the environment exceptions pass with their traceback.
    """
    wanted = os.environ.get(TRACEBACK) == "1" and not os.environ.get(_HELD)
    if wanted:
        yield
        return
    if whole_process:
        # Hydra prints several lines and exits, unless it is told to raise; undone before the task runs,
        # so that processes started from it do not inherit it
        os.environ[TRACEBACK] = os.environ[_HELD] = "1"
    else:
        os.environ.pop(TRACEBACK, None)
        os.environ.pop(_HELD, None)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)


_HELD = "NBMIX_HOLDS_ERRORS"


def one_line(error: Exception) -> str:
    """The message of an exception without line breaks; unexpected ones are told how to show more."""
    if isinstance(error, InputError):
        return str(error)
    if type(error).__module__.startswith(("hydra.", "omegaconf.")):
        cause = error.__cause__ if isinstance(error.__cause__, InputError) else error
        return " ".join(str(cause).split()) + " (see conf/ for what there is)"
    message = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {message} (set {TRACEBACK}=1 to see where)"

"""Errors on the command line: one line and an exit status, unless a traceback is asked for."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nbmix.errors import InputError

TRACEBACK = "HYDRA_FULL_ERROR"
_HELD = "NBMIX_HOLDS_ERRORS"


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
        sys.exit(2 if is_bad_input(error) else 1)


def is_bad_input(error: BaseException) -> bool:
    """Whether an exception says that a file, field or setting cannot be used."""
    said = _said(error)
    return isinstance(said, InputError) or _of_config(said)


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks; unexpected ones are told how to show more."""
    error = _said(error)
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    if _of_config(error):
        message = " ".join(str(error).split())
        # Hydra adds its search path and OmegaConf the types of its nodes: no help to mend a setting
        message = re.split(
            r" Config search path:| full_key:| object_type=| To append to your config", message
        )[0]
        message = re.sub(
            r"^(Could not override 'data\.\w+')\.$",
            r"\1 with this choice of data; for a file of your own add data=h5ad, or data=tenx",
            message,
        )
        return f"{message.rstrip('.')} (see conf/ for what there is)"
    message = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {message} (set {TRACEBACK}=1 to see where)"


def _said(error: BaseException) -> BaseException:
    """What went wrong inside an object that Hydra was making, in place of Hydra's report of it."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__
    return error


def _of_config(error: BaseException) -> bool:
    return type(error).__module__.startswith(("hydra.", "omegaconf."))

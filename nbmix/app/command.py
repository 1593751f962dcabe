"""Errors on the command line: one line and an exit status, unless a traceback is asked for."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType

from omegaconf import DictConfig

from nbmix.data.whole_file import why_unwritable
from nbmix.errors import InputError, did_you_mean

TRACEBACK = "HYDRA_FULL_ERROR"

_HELD = "NBMIX_HOLDS_ERRORS"

_OF_LOGGING = "Unable to configure handler"

_OF_ARGUMENTS = (TypeError, ValueError, ImportError, AttributeError, LookupError)  # while an object is made


class Stopped(BaseException):
    """Somebody wants the run to end: Ctrl-C, or SIGTERM of a batch system.

    It is no KeyboardInterrupt, which Lightning would take for itself.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.advice = ""  # how to go on


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise ``Stopped`` on SIGINT and SIGTERM; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def one_line_errors(whole_process: bool = False) -> Iterator[None]:
    """Turn an exception into one line on stderr: exit status 2 for bad input, 1 for anything else.

    ``whole_process`` is for the outermost use, around Hydra's own reading of the command line. With
    HYDRA_FULL_ERROR=1 in the environment exceptions pass with their traceback. A run that is stopped ends
    with 128 and the number of the signal, as shells have it.
    """
    if whole_process:
        for stream in (sys.stdout, sys.stderr):  # a letter that the terminal has not must not end a run
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    wanted = os.environ.get(TRACEBACK) == "1" and not os.environ.get(_HELD)
    if whole_process and not wanted:
        # Hydra prints several lines and exits, unless it is told to raise; undone before the task runs,
        # so that processes started from it do not inherit it
        os.environ[TRACEBACK] = os.environ[_HELD] = "1"
        logging.raiseExceptions = False  # no traceback where a log file cannot be written
    elif not wanted:
        os.environ.pop(TRACEBACK, None)
        os.environ.pop(_HELD, None)
    try:
        yield
    except Stopped as stopped:
        from nbmix.training.trainer import is_first_rank  # here, since it brings Lightning

        if not is_first_rank():
            sys.exit(0)  # the first one says it; another status would make Lightning kill it before
        print(f"stopped{stopped.advice}", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if wanted:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2 if is_bad_input(error) else 1)


def is_bad_input(error: BaseException) -> bool:
    """Whether an exception says that a file, field or setting cannot be used."""
    said = _said(error)
    return (
        isinstance(said, InputError)
        or _of_config(said)
        or why_unwritable(said) is not None
        or (said is not error and isinstance(said, _OF_ARGUMENTS))
    )


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks; unexpected ones are told how to show more."""
    outer, error = error, _said(error)
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    if outer is not error and isinstance(error, _OF_ARGUMENTS):
        key = re.search(r"full_key: (\S+)", str(outer))
        message = " ".join(str(error).split())
        return f"{key[1] if key else 'config'}: {message} (see conf/ for what there is)"
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
        message = re.sub(
            r"^Error parsing override '(.*)' missing EQUAL.*", r"\1: is no setting; write \1=VALUE", message
        )
        return f"{message.rstrip('.')} (see conf/ for what there is){_near(error)}"
    if (reason := why_unwritable(error)) is not None:
        return f"a file cannot be written ({reason}); choose another folder by hydra.run.dir"
    message = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {message} (set {TRACEBACK}=1 to see where)"


def _said(error: BaseException) -> BaseException:
    """What went wrong while Hydra made an object, or logging its file, in place of the report of it."""
    while error.__cause__ is not None and (
        type(error).__name__ == "InstantiationException" or str(error).startswith(_OF_LOGGING)
    ):
        error = error.__cause__
    return error


def _near(error: BaseException) -> str:
    """The setting or choice that may have been meant, where one was given that there is not."""
    choices = r"Could not find '[^']*?([^/']+)'\s+Available options in '([^']*)':(.*)"
    if found := re.search(choices, str(error), re.DOTALL):
        word, group, options = found.groups()
        return did_you_mean(word, options.partition("Config search path")[0].split(), f"{group}=")
    cause = error.__cause__
    parent, key = getattr(cause, "parent_node", None), str(getattr(cause, "full_key", ""))
    if not isinstance(parent, Mapping | DictConfig):
        return ""
    prefix, _, name = key.rpartition(".")
    return did_you_mean(name, map(str, parent), f"{prefix}." if prefix else "")


def _of_config(error: BaseException) -> bool:
    return type(error).__module__.startswith(("hydra.", "omegaconf."))

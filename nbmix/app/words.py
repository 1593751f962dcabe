"""Words of a command, made into what Hydra's grammar takes.

Names of files, columns and labels hold what that grammar has a meaning for, such as ``=``, parentheses,
commas and letters beyond ASCII. Where one text alone can be meant it is quoted here; else one line says how.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from nbmix.errors import InputError

_OF_HYDRA = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")

_SETTING = re.compile(r"(\+{0,2}[\w./@-]+)=(.*)", re.DOTALL)  # key and value

_PLAIN = re.compile(r"[\w./-]+", re.ASCII)

_SEVERAL = re.compile(r"-m|--multirun|\+*(hydra\.mode|sweep)=.*")  # words of a command that may be of a sweep


def readable(words: Sequence[str]) -> list[str]:
    """The words of a command as Hydra reads them.

    >>> readable(["data=h5ad", "data.path=epoch=3 (new).h5ad", "model.n_components=3"])
    ['data=h5ad', "data.path='epoch=3 (new).h5ad'", 'model.n_components=3']

    Raises:
        InputError: a word that can be meant in more than one way, or in none.
    """
    is_sweep = any(_SEVERAL.fullmatch(word) for word in words)
    return [_readable(word, is_sweep) if _SETTING.fullmatch(word) else word for word in words]


def hydra_text(text: str) -> str:
    """A text as it is written in a value for Hydra: quoted, unless it needs no quotes.

    >>> hydra_text("a.h5ad"), hydra_text("it's.h5ad")
    ('a.h5ad', "'it\\\\'s.h5ad'")
    """
    parsed = _parsed(f"x={text}")
    if parsed is not None and parsed.value() == text:
        return text
    return QuotedString(text=text, quote=Quote.single).with_quotes()


@functools.cache
def free_texts() -> dict[str, bool]:
    """Settings that take any text, and whether they take a list of them."""
    # here, since they bring torch, which help and --cfg do without
    from nbmix.app.settings import RunSettings
    from nbmix.core.declared import declared
    from nbmix.data.module import from_h5ad, from_tenx, from_zheng
    from nbmix.starts.given import CheckpointStart, MeansStart, ResponsibilitiesStart

    found = dict.fromkeys(_OF_HYDRA, False)
    targets: dict[str, Sequence[Callable[..., Any]]] = {
        "": (RunSettings,),
        "data.": (from_h5ad, from_tenx, from_zheng),
        "start.": (CheckpointStart, MeansStart, ResponsibilitiesStart),
    }
    for group, takers in targets.items():
        for name, one in (pair for taker in takers for pair in declared(taker).items()):
            if not one.setting.words and {str, os.PathLike} & set(one.types):
                found[f"{group}{name}"] = Sequence in one.types
    return found


def _readable(word: str, is_sweep: bool) -> str:
    matched = _SETTING.fullmatch(word)
    assert matched is not None
    key, value = matched.groups()
    name = key.lstrip("+")
    if any("\udc80" <= letter <= "\udcff" for letter in word):
        raise InputError(f"{key}={value}: has letters that the locale does not; set PYTHONUTF8=1")
    if name.rpartition(".")[2].endswith(("path", "dir")) and not os.path.exists(value):
        value = os.path.expanduser(value)
    parsed = _parsed(f"{key}={value}")
    if parsed is not None and _PLAIN.fullmatch(value) and isinstance(parsed.value(), str):
        return f"{key}={value}"
    if name not in free_texts():
        if parsed is None:
            raise InputError(f"{word}: cannot be read; {_advice(key, value)}")
        if parsed.is_sweep_override() and not is_sweep:
            raise InputError(f"{word}: several values are a sweep, which needs -m; {_advice(key, value)}")
        return word
    if parsed is not None and (isinstance(parsed.value(), str | list | None) or is_sweep):
        return f"{key}={value}"
    if free_texts()[name] and value.startswith("[") and value.endswith("]"):
        items = [hydra_text(item.strip().strip("'\"")) for item in value[1:-1].split(",")]
        return f"{key}=[{','.join(items)}]"
    if is_sweep and "," in value:
        raise InputError(f"{word}: cannot be read; {_advice(key, *value.split(','))}")
    return f"{key}={QuotedString(text=value, quote=Quote.single).with_quotes()}"


def _advice(key: str, *values: str) -> str:
    quoted = ",".join(QuotedString(text=value, quote=Quote.double).with_quotes() for value in values)
    return f"as {'one text' if len(values) == 1 else 'texts'} it is {shlex.quote(f'{key}={quoted}')}"


def _parsed(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None

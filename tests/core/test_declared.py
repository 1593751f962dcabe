"""A setting is declared once: its default, kind, meaning and bounds; every call is checked by it."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

from nbmix.core.declared import REQUIRED, Setting, checked, declared, settings_among
from nbmix.errors import InputError

Share = Annotated[float, Setting("share of the cells", least=0, below=1)]


@checked("start")
@dataclass(frozen=True)
class Start:
    n_runs: Annotated[int, Setting("runs", least=1, most=9)] = 4
    share: Share = 0.5
    rate: Annotated[float, Setting("rate", above=0)] = 1e-3
    name: Annotated[str | None, Setting("name")] = None
    use: Annotated[str, Setting("use", words=("this", "that"))] = "this"
    kind: Annotated[str, Setting("kind", words=("a", "b", "c"))] = "a"
    cells: Annotated[float | str, Setting("cells", least=0, words=("auto",))] = "auto"
    is_on: Annotated[bool, Setting("on or off")] = False
    labels: Annotated[Sequence[str] | None, Setting("labels")] = None
    inner: Any = None


@checked("data")
def read(path: Annotated[str | os.PathLike[str], Setting("the file")], n: int = 3) -> int:
    return n


@checked("data", read)
def make(*, share: Share = 0.1, **others: Any) -> tuple[float, int]:
    return share, read(**others)


@checked("model")
class Base:
    def __init__(self, n_genes: int, *, n_hidden: Annotated[int, Setting("units", least=1)] = 8) -> None:
        self.shape = (n_genes, n_hidden)


@checked("model", Base)
class Model(Base):
    def __init__(self, n_genes: int, *, lr: Annotated[float, Setting("rate", above=0)] = 0.1, **others: Any):
        super().__init__(n_genes, **others)
        self.lr = lr


def test_what_is_declared():
    settings = declared(Start)
    assert list(settings) == ["n_runs", "share", "rate", "name", "use", "kind", "cells", "is_on", "labels"]
    assert settings["n_runs"].default == 4
    assert settings["n_runs"].setting.meaning == "runs"
    assert settings["share"].setting is declared(make)["share"].setting
    assert declared(read)["path"].default is REQUIRED


def test_what_is_passed_on_is_declared_too():
    assert declared(make).keys() == {"share", "path"}
    assert {name: one.default for name, one in declared(Model).items()} == {"lr": 0.1, "n_hidden": 8}


def test_settings_among_other_values():
    values = {"self": None, "n_hidden": 3, "lr": 0.2, "n_genes": 4}
    assert settings_among(values, Model) == {"lr": 0.2, "n_hidden": 3}
    assert settings_among(values, Base) == {"n_hidden": 3}


def test_calls_go_through_unchanged():
    assert make(path="x", n=5) == (0.1, 5)
    model = Model(3, n_hidden=2)
    assert (model.shape, model.lr) == ((3, 2), 0.1)
    assert str(inspect.signature(Model)).startswith("(n_genes: ")
    assert replace(Start(2), share=0.25) == Start(2, 0.25)


@pytest.mark.parametrize(
    "setting",
    [
        {"n_runs": 1}, {"n_runs": 9}, {"n_runs": np.int64(3)}, {"share": 0}, {"share": np.float32(0.5)},
        {"name": None}, {"name": "a"}, {"use": "that"}, {"cells": 0}, {"cells": 2.5}, {"cells": "auto"},
        {"is_on": True}, {"labels": ["a"]}, {"labels": ()}, {"inner": -1},
    ],
)  # fmt: skip
def test_values_that_are_taken(setting):
    (name,) = setting
    assert getattr(Start(**setting), name) is setting[name]


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"n_runs": 0}, "start.n_runs=0: must be 1 or more"),
        ({"n_runs": 10}, "start.n_runs=10: must be at most 9"),
        ({"n_runs": 2.0}, "start.n_runs=2.0: must be a whole number"),
        ({"n_runs": True}, "start.n_runs=true: must be a whole number"),
        ({"n_runs": None}, "start.n_runs=null: must be a whole number"),
        ({"share": 1}, "start.share=1: must be below 1"),
        ({"share": -0.1}, "start.share=-0.1: must be 0 or more"),
        ({"share": "half"}, "start.share=half: must be a number"),
        ({"share": math.nan}, "start.share=nan: must be finite"),
        ({"rate": 0}, "start.rate=0: must be above 0"),
        ({"rate": math.inf}, "start.rate=inf: must be finite"),
        ({"name": 3}, "start.name=3: must be a text (write a number that is one as '\"1\"') or null"),
        ({"use": "it"}, "start.use=it: choose this or that"),
        ({"kind": 1}, "start.kind=1: choose one of a, b, c"),
        ({"cells": "some"}, "start.cells=some: must be a number or auto"),
        ({"cells": -1}, "start.cells=-1: must be 0 or more"),
        ({"is_on": 1}, "start.is_on=1: must be true or false"),
        ({"labels": "a"}, "start.labels=a: must be a list, as in [a,b] or null"),
    ],
)
def test_values_that_are_refused(setting, words):
    with pytest.raises(InputError) as refused:
        Start(**setting)
    assert str(refused.value) == words


def test_positions_names_and_what_is_passed_on_are_checked():
    read(Path("x"))
    for call in (lambda: read(3), lambda: read(path=3), lambda: make(path=3)):
        with pytest.raises(InputError, match=r"^data\.path=3: must be a text"):
            call()
    with pytest.raises(InputError, match=r"^model\.n_hidden=0: must be 1 or more$"):
        Model(3, n_hidden=0)


def test_an_argument_that_is_not_there_is_an_error_as_ever():
    with pytest.raises(TypeError, match="n_layers"):
        Model(3, n_layers=2)

"""A search by Optuna: its space, its trials, what it refuses."""

from __future__ import annotations

import sys
from typing import ClassVar

import pandas as pd
import pytest
from hydra.errors import HydraException

from nbmix.app.optuna_search import parse_space, search, suggest
from nbmix.errors import InputError
from tests.helpers.apart import train
from tests.helpers.running import configure


class Asked:
    """Takes the place of an Optuna trial: what was asked for, answered with the upper end."""

    calls: ClassVar[list] = []

    def suggest_float(self, name, low, high, *, log):
        self.calls.append((name, low, high, log))
        return high

    def suggest_int(self, name, low, high, *, step):
        self.calls.append((name, low, high, step))
        return high

    def suggest_categorical(self, name, choices):
        self.calls.append((name, *choices))
        return choices[-1]


def test_the_space_in_words_of_hydra(monkeypatch):
    monkeypatch.setattr(Asked, "calls", [])
    space = parse_space(
        [
            "model.n_components=range(2,11,2)",
            "start=choice(kmeans,random)",
            "model.lr=tag(log,interval(1e-4,1e-2))",
            "model.pseudo_cells=choice(auto,0,20)",
            "data.validation_share=interval(0.1,0.2)",
            "model.tolerance=range(0.5,2,0.5)",
        ]
    )
    assert [suggest(Asked(), line) for line in space] == ["10", "random", "0.01", "20", "0.2", "1.5"]
    assert Asked.calls == [
        ("model.n_components", 2, 10, 2),
        ("start", "kmeans", "random"),
        ("model.lr", 1e-4, 1e-2, True),
        ("model.pseudo_cells", "auto", "0", "20"),
        ("data.validation_share", 0.1, 0.2, False),
        ("model.tolerance", "0.5", "1.0", "1.5"),
    ]


@pytest.mark.parametrize(
    "lines, words",
    [
        ([], "search.space is empty"),
        (["seed=3"], "seed=3 names one value"),
        (["seed=range(1,3)", "seed=choice(1,2)"], "seed is there twice"),
    ],
)
def test_a_space_that_is_none(lines, words):
    with pytest.raises(InputError, match=words):
        parse_space(lines)


def test_a_space_that_cannot_be_read():
    with pytest.raises(HydraException):
        parse_space(["seed=range(1"])


def test_optuna_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"Optuna is not installed: pip install 'nbmix\[sweeps\]'"):
        search(configure("sweep=optuna"))


@pytest.mark.slow
def test_a_search(tmp_path):
    pytest.importorskip("optuna")
    done = train(
        "data.n_cells=60", "data.n_genes=80", "data.n_components=2", "start=kmeans", "trainer.max_epochs=2",
        "logger=csv", "sweep=optuna", "search.n_trials=3",
        'search.space=["model.n_components=choice(2,100)"]', f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    table = pd.read_csv(tmp_path / "sweep.csv")
    assert table["trial"].tolist() == [0, 1, 2]
    failed = table["error"].notna()
    assert (failed == (table.get("model.n_components", failed * 98 + 2) == 100)).all()
    assert done.returncode == (2 if failed.any() else 0), done.stderr

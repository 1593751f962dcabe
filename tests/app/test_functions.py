"""Functions by their names in a setting: a new picture or score is one function and one name."""

from __future__ import annotations

import json

import pytest

from nbmix.app.functions import functions_named
from nbmix.errors import InputError
from nbmix.output.pictures import objective_trace, reliability
from tests.helpers.running import TINY, run_here

OWN = '''
from matplotlib.figure import Figure


def depths(results):
    """Depths.

    Size factors of the cells,
    sorted.
    """
    figure = Figure()
    figure.add_subplot().plot(sorted(results.data.data.size_factors))
    return figure


def most_cells(results):
    return {"most_cells": max(int((results.assignments == k).sum()) for k in range(2))}
'''


def test_functions_are_found_in_their_order():
    names = ["nbmix.output.pictures.reliability", "nbmix.output.pictures.objective_trace"]
    assert functions_named("evaluation.pictures", names) == [reliability, objective_trace]
    assert functions_named("evaluation.pictures", []) == []


@pytest.mark.parametrize(
    "names, words",
    [
        ("nbmix.output.pictures.reliability", "=nbmix.output.pictures.reliability: must be a list"),
        (None, "=null: must be a list of functions"),
        (["nbmix.output.pictures.nothing"], ": 'nbmix.output.pictures.nothing' cannot be found: "),
        (["no_such_module.f"], ": 'no_such_module.f' cannot be found: No module named"),
        ([""], ": '' cannot be found: "),
        ([None], ": None cannot be found: "),
        ([{"a": 1}], ": {'a': 1} cannot be found: "),
        (["nbmix.output.pictures.plots"], "is no function"),
    ],
    ids=str,
)
def test_names_of_nothing(names, words):
    with pytest.raises(InputError) as refused:
        functions_named("evaluation.pictures", names)
    line = str(refused.value)
    assert line.startswith("evaluation.pictures")
    assert words in line
    assert "\n" not in line


def test_a_picture_and_a_score_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "run"
    metrics = run_here(
        folder,
        *(*TINY, "trainer.max_epochs=2"),
        "evaluation.pictures=[nbmix.output.pictures.component_sizes]",
        "evaluation.more_pictures=[own.depths]",
        "evaluation.scores=[own.most_cells]",
    )
    assert 30 <= metrics["most_cells"] <= 60
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {file.name for file in (folder / "figures").iterdir()} == {"depths.png", "component_sizes.png"}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.index("<h3>Group sizes</h3>") < page.index("<h3>Depths</h3>")
    assert "Size factors of the cells, sorted." in page


def test_a_wrong_name_is_found_before_the_fit(tmp_path):
    with pytest.raises(InputError, match=r"own\.nothing"):
        run_here(tmp_path, *TINY, "evaluation.pictures=[own.nothing]")
    assert not (tmp_path / "checkpoints").exists()

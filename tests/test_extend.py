"""What docs/extend.md says is done as it says; for its model see tests/models/test_own_model.py, too."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

import nbmix
from tests.helpers.pages import EXTEND, blocks, write_files
from tests.helpers.running import NO_PICTURES, run_train, small_data

COMMANDS = [block.strip() for block in blocks(EXTEND, "sh")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_files(EXTEND, folder)
    return folder


@pytest.fixture
def modules(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)


def test_there_is_a_command_for_every_kind_of_thing():
    assert len(COMMANDS) == 3


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, folder, tmp_path):
    path, *words = shlex.split(command)
    assert (path, words[:2]) == ("PYTHONPATH=.", ["python", "train.py"])
    words = [str(folder / word) if word == "my_conf" else word for word in words[2:]]
    sizes = ("data.n_cells=60", "data.n_genes=80", "trainer.max_epochs=2", "logger=csv")
    pictures = () if "evaluation.pictures" in command else (NO_PICTURES,)
    done = run_train(*words, *sizes, *pictures, f"hydra.run.dir={tmp_path}", PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["model"] == ("gradient" if "model=gradient" in command else "em")
    assert ("largest_share" in metrics) == ("largest_share" in command)
    drawn = {file.stem for file in (tmp_path / "figures").glob("*.png")}
    assert drawn == ({"depth_of_groups"} if "depth_of_groups" in command else set())
    assert ("Depth of the groups" in (tmp_path / "report.html").read_text()) == bool(drawn)


def test_the_start_is_for_python_too(modules):
    from my_starts import FurthestStart

    data = small_data(n_cells=120)
    found = nbmix.NBMixture(2, start=FurthestStart(n_pcs=10)).fit_predict(data.counts)
    assert adjusted_rand_score(data.labels, found) == 1


def test_the_baseline_is_one_in_the_package_too(modules):
    from my_baseline import WARD

    from nbmix.evaluation.baselines.base import Baseline

    data = small_data(n_cells=120)
    assert isinstance(WARD, Baseline)
    assert WARD.missing == []
    found = WARD.run(data, 2, 0).found
    assert np.unique(found).tolist() == [0, 1]
    assert adjusted_rand_score(data.labels, found) > 0.9

"""What docs/extend.md says is done as it says; for its model see tests/models/test_own_model.py, too."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

import nbmix
from tests.helpers.apart import train
from tests.helpers.pages import EXTEND, blocks, write_files
from tests.helpers.running import ROOT, run_train, small_data

COMMANDS = [block.replace("\\\n", " ").strip() for block in blocks(EXTEND, "sh")]
IN_THE_PACKAGE = {
    "my_starts.py": "nbmix/starts/furthest.py",
    "my_models.py": "nbmix/models/gradient.py",
    "my_baseline.py": "nbmix/evaluation/baselines/ward.py",
    "my_conf/start/furthest.yaml": "conf/start/furthest.yaml",
    "my_conf/model/gradient.yaml": "conf/model/gradient.yaml",
}
OF_WHAT_THERE_IS = ("tests/test_docs.py", "tests/starts/test_named.py", "tests/training/test_arguments.py")


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
    done = train(*words, *sizes, f"hydra.run.dir={tmp_path}", PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["model"] == ("gradient" if "model=gradient" in command else "em")
    assert ("largest_share" in metrics) == ("largest_share" in command)
    drawn = {file.stem for file in (tmp_path / "figures").glob("*.png")}
    assert drawn == ({"depth_of_groups"} if "depth_of_groups" in command else set())
    assert ("Depth of the groups" in (tmp_path / "report.html").read_text()) == bool(drawn)


def test_a_setting_that_cannot_be_used_ends_in_one_line(folder, tmp_path):
    words = ("--config-dir", str(folder / "my_conf"), "start=furthest", "start.n_pcs=abc")
    done = run_train(*words, f"hydra.run.dir={tmp_path}", PYTHONPATH=str(folder))
    assert done.returncode == 2
    assert done.stderr == "error: start.n_pcs=abc: must be a whole number\n"


@pytest.mark.slow
def test_in_the_package_settings_are_made_and_tests_of_what_is_there_hold(folder, tmp_path):
    for name in ("nbmix", "conf", "docs", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, tmp_path)
    for own, place in IN_THE_PACKAGE.items():
        text = (folder / own).read_text().replace("my_starts", "nbmix.starts.furthest")
        (tmp_path / place).write_text(text.replace("my_models", "nbmix.models.gradient"))
    before = {file: file.read_text() for file in (tmp_path / "conf").rglob("*.yaml")}
    python_in(tmp_path, "docs/make_settings.py")
    assert {file: file.read_text() for file in before} == before
    page = (tmp_path / "docs" / "settings.md").read_text()
    assert "### `start=furthest`" in page and "### `model=gradient`" in page
    python_in(tmp_path, "-m", "pytest", "-q", "-k", "conf or key or settings or named", *OF_WHAT_THERE_IS)


def python_in(folder, *words):
    """Python in a copy of the project."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


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

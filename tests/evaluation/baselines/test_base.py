"""Baselines are found where they stand, and run alike."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest

from nbmix.errors import InputError
from nbmix.evaluation.baselines.base import Baseline, find_baselines, require
from nbmix.evaluation.baselines.topics import topic_weights
from tests.helpers.running import small_data

NEW = """
from nbmix.evaluation.baselines.base import Baseline, Outcome

EMPTY = Baseline("by-size", "cells in order of their size factors",
                 lambda data, k, seed: Outcome(data.size_factors.argsort().argsort() * k // data.n_cells))
"""


def by_name() -> dict[str, Baseline]:
    return {one.name: one for one in find_baselines()}


def test_all_are_there_once_and_say_what_they_are():
    found = find_baselines()
    assert {
        *("leiden", "leiden-k", "kmeans", "gmm", "topics", "scvi", "logistic-counts", "logistic-size")
    } <= by_name().keys()
    assert len(by_name()) == len(found)
    assert all(one.about for one in found)


def test_a_new_file_is_a_new_baseline(tmp_path, monkeypatch):
    package = tmp_path / "own_baselines"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "by_size.py").write_text(NEW)
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = find_baselines(importlib.import_module("own_baselines"))
    assert (found.name, found.about) == ("by-size", "cells in order of their size factors")
    data = small_data()
    outcome = found.run(data, 3, 0)
    assert np.bincount(outcome.found).tolist() == [20, 20, 20]
    assert data.size_factors[outcome.found == 0].max() < data.size_factors[outcome.found == 1].min()
    for name in ("own_baselines", "own_baselines.by_size"):
        del sys.modules[name]


def test_a_baseline_runs_its_method():
    data = small_data()
    outcome = by_name()["topics"].run(data, 2, 3)
    np.testing.assert_array_equal(outcome.found, topic_weights(data, 2, 3))


def test_names_of_labels():
    data = small_data(n_cells=100)
    outcome = by_name()["logistic-counts"].run(data, 2, 0)
    assert by_name()["logistic-counts"].supervised
    assert set(outcome.found) == set(data.labels)
    assert outcome.remark == "held out, 10 folds"


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scvi", None)
    assert by_name()["scvi"].missing == ["scvi"]
    assert by_name()["topics"].missing == []
    with pytest.raises(InputError, match=r"scvi is not installed.*pip install 'nbmix\[scvi\]'"):
        require("scvi", extra="scvi")

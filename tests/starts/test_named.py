"""Starts by name, as conf/ has them."""

from __future__ import annotations

import pytest
from hydra.utils import instantiate

from nbmix.starts.named import named_starts
from tests.helpers.running import ROOT, configure

NAMES = ["dirichlet", "first_batch", "kmeans", "labels", "random", "subsample", "topics"]
OF_FILES = {"checkpoint", "means", "responsibilities"}  # they need one


def test_all_but_those_that_need_a_file():
    assert list(named_starts()) == NAMES
    assert {file.stem for file in (ROOT / "conf/start").glob("*.yaml")} == {*NAMES} | OF_FILES


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_those_of_conf(name):
    assert named_starts()[name]() == instantiate(configure(f"start={name}").start)

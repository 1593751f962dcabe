"""Starts by name, as conf/ has them."""

from __future__ import annotations

import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from nbmix.starts.named import named_starts
from tests.helpers.running import ROOT, configure

CONF = {file.stem: OmegaConf.load(file) for file in sorted((ROOT / "conf/start").glob("*.yaml"))}
OF_FILES = {name for name, start in CONF.items() if any(OmegaConf.is_missing(start, key) for key in start)}


def test_all_of_conf_but_those_that_need_a_file():
    assert {"checkpoint", "means", "responsibilities"} <= OF_FILES
    named = {name: get_class(start._target_) for name, start in CONF.items() if name not in OF_FILES}
    assert list(named_starts().items()) == list(named.items())
    assert {"dirichlet", "first_batch", "kmeans", "labels", "random", "subsample", "topics"} <= set(named)


@pytest.mark.parametrize("name", named_starts())
def test_settings_are_those_of_conf(name):
    assert named_starts()[name]() == instantiate(configure(f"start={name}").start)

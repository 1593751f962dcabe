"""Every choice of every config group composes, and what it names can be made."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
from hydra.errors import ConfigCompositionException
from hydra.utils import get_class, get_method, instantiate
from omegaconf import OmegaConf

from nbmix.core.m_step import GradientMStep, NewtonMStep
from nbmix.starts.named import named_starts
from tests.helpers.running import ROOT, configure

BASES = {("data", "zheng")}  # part of other choices
GLOBAL = {"m_step", "sweep", "experiment"}  # groups that have tests of their own
CHOICES = sorted(
    (file.parent.name, file.stem)
    for file in (ROOT / "conf").glob("*/*.yaml")
    if (file.parent.name, file.stem) not in BASES and file.parent.name not in GLOBAL
)


def test_there_are_choices_in_every_group():
    assert {group for group, _ in CHOICES} == {"callbacks", "data", "logger", "model", "start", "trainer"}


@pytest.mark.parametrize("group, name", CHOICES, ids=str)
def test_choice_composes_and_fits_what_it_names(group, name, tmp_path):
    cfg = configure(f"{group}={name}", folder=tmp_path)
    chosen = cfg[group]
    if OmegaConf.is_missing(chosen, "path"):
        chosen.path = "file"
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    if group == "callbacks":
        assert len([instantiate(callback) for callback in chosen.values()]) == len(chosen)
    elif (group, name) == ("logger", "wandb"):  # would start a run
        inspect.signature(get_method(chosen._target_)).bind(
            **{k: v for k, v in chosen.items() if k != "_target_"}
        )
    else:
        extra = {"gene_names": np.array(["a", "b"])} if group == "model" else {}
        made = instantiate(chosen, **extra)
        assert made is not None and not OmegaConf.is_config(made)


@pytest.mark.parametrize("name, kind", [("newton", NewtonMStep), ("gradient", GradientMStep)])
def test_m_step_is_chosen_by_its_own_group(name, kind):
    cfg = configure(f"m_step@model.m_step={name}")
    model = instantiate(cfg.model, gene_names=np.array(["a"]))
    assert isinstance(model.mixture.settings.m_step, kind)


@pytest.mark.parametrize("model", [name for group, name in CHOICES if group == "model"])
def test_the_command_and_python_have_the_same_defaults(model):
    cfg = configure(f"model={model}")
    defaults = get_class(cfg.model._target_).defaults
    assert get_class(cfg.start._target_) is named_starts()[defaults.start]
    assert (cfg.trainer.max_epochs, cfg.data.batch_size) == (defaults.max_epochs, defaults.batch_size)


@pytest.mark.parametrize("start", ["random", "kmeans", "labels", "topics"])
def test_amortized_takes_the_start_it_is_given(start):
    assert configure("model=amortized", f"start={start}").start == configure(f"start={start}").start


@pytest.mark.parametrize("data", ["mix4", "h5ad"])
def test_amortized_sets_the_batch_size_of_every_data_set(data):
    assert configure("model=amortized", f"data={data}").data.batch_size == "auto"


def test_a_key_that_is_not_there_is_refused():
    with pytest.raises(ConfigCompositionException, match=r"model\.foo"):
        configure("model.foo=1")


def test_help_names_what_can_be_chosen():
    """Every choice of a group, but for files that only others are made of, and nothing else."""
    template = OmegaConf.load(ROOT / "conf" / "config.yaml").hydra.help.template
    named = dict(re.findall(r"^  ([\w@.]+) {2,}(\S.*)$", template, re.MULTILINE))
    there = {"m_step@model.m_step": "m_step"}
    for group, choices in named.items():
        files = {file.stem for file in (ROOT / "conf" / there.get(group, group)).glob("*.yaml")}
        assert set(choices.split(", ")) == files - {"zheng"}

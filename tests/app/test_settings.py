"""Values of a wrong kind are refused by the name of their setting; those in conf/ are of the right one."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from nbmix.app.settings import KINDS, check_settings, check_value, number, whole
from nbmix.errors import InputError
from tests.helpers.running import ROOT, configure

MODELS = sorted(file.stem for file in (ROOT / "conf/model").glob("*.yaml"))


@pytest.fixture(scope="module")
def configs():
    """The config of every model, as plain values."""
    return {m: OmegaConf.to_container(configure(f"model={m}"), resolve=True) for m in MODELS}


def put(config, key, value):
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    config[name] = value


@pytest.mark.parametrize("model", MODELS)
def test_defaults_are_of_their_kind(model, configs):
    check_settings(configs[model])


@pytest.mark.parametrize("start", sorted(file.stem for file in (ROOT / "conf/start").glob("*.yaml")))
def test_starts_are_of_their_kind(start):
    check_settings(OmegaConf.to_container(configure(f"start={start}"), resolve=True))


@pytest.mark.parametrize("data", ["h5ad", "tenx", "mix4"])
def test_data_are_of_their_kind(data):
    check_settings(OmegaConf.to_container(configure(f"data={data}"), resolve=True))


@pytest.mark.parametrize(
    "model, key, value, words",
    [
        ("em", "seed", "x", "seed=x: must be a whole number"),
        ("em", "seed", -1, "seed=-1: must be 0 or more"),
        ("em", "seed", 2**32, "seed=4294967296: must be at most 4294967295"),
        ("em", "seed", True, "seed=true: must be a whole number"),
        ("em", "trainer.max_epochs", -1, "trainer.max_epochs=-1: must be 1 or more"),
        ("em", "trainer.max_epochs", 2.5, "trainer.max_epochs=2.5: must be a whole number"),
        ("em", "trainer.gpus", None, "trainer.gpus=null: must be a whole number"),
        ("em", "data.batch_size", 0, "data.batch_size=0: must be 1 or more"),
        ("em", "data.validation_share", 1, "data.validation_share=1: must be below 1"),
        ("em", "data.validation_share", "half", "data.validation_share=half: must be a number"),
        ("em", "data.path", 3, "data.path=3: must be a text"),
        ("em", "model.tolerance", 0, "model.tolerance=0: must be above 0"),
        ("em", "model.m_step.max_steps", [1], "model.m_step.max_steps=[1]: must be a whole number"),
        ("amortized", "model.lr", float("nan"), "model.lr=nan: must be finite"),
        ("amortized", "model.lr", float("inf"), "model.lr=inf: must be finite"),
        ("amortized", "model.train_components", 1, "model.train_components=1: must be true or false"),
        ("amortized", "start.inner.n_starts", "a", "start.inner.n_starts=a: must be a whole number"),
        ("vaec", "model.n_latent", 0, "model.n_latent=0: must be 1 or more"),
        ("em", "model", None, "model=null: is a group of settings"),
        ("em", "start", {"a": 1}, "start={'a': 1}: has no _target_; name one of conf/start/"),
        ("em", "callbacks.last", 1, "callbacks.last=1: must be settings"),
        ("em", "model.m_step", "newton", "model.m_step=newton: is a group of settings"),
    ],
)
def test_a_value_of_a_wrong_kind(model, key, value, words, configs):
    config = OmegaConf.to_container(OmegaConf.create(configs[model]))
    put(config, key, value)
    with pytest.raises(InputError) as refused:
        check_settings(config)
    assert str(refused.value).startswith(words)
    assert "\n" not in str(refused.value)


def test_edges_are_allowed():
    for value, kind in ((0, whole(0)), (1, whole(0, 1)), (0.5, number(0.5)), (2, number(0, 2))):
        check_value("a", value, kind)


def test_every_setting_of_a_known_name_is_checked(configs):
    """A setting that is new in conf/ has to be given its kind, or a reason why not."""
    elsewhere = {  # by the objects that take them
        *("model.n_components", "model.pseudo_cells"),  # a number or a word
        *("logger.name", "logger.version", "trainer.default_root_dir"),
        *("evaluation.pictures", "evaluation.scores"),  # names of functions
    }
    for config in configs.values():
        for group in ("trainer", "data", "model", "start", "evaluation"):
            for name, value in config[group].items():
                if name != "_target_" and not isinstance(value, dict):
                    assert {f"{group}.{name}"} & (KINDS.keys() | elsewhere), name

"""A value that cannot be used is refused by the name of its setting; those in conf/ can be used."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from nbmix.app.settings import check_config
from nbmix.errors import InputError
from tests.helpers.running import ROOT, configure

MODELS = sorted(file.stem for file in (ROOT / "conf/model").glob("*.yaml"))


@pytest.fixture(scope="module")
def configs():
    """The config of every model, and of a file, as plain values."""
    chosen = {**{model: f"model={model}" for model in MODELS}, "h5ad": "data=h5ad"}
    return {name: OmegaConf.to_container(configure(of), resolve=True) for name, of in chosen.items()}


def put(config, key, value):
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    config[name] = value


@pytest.mark.parametrize("model", MODELS)
def test_defaults_are_of_their_kind(model, configs):
    check_config(configs[model])


@pytest.mark.parametrize("start", sorted(file.stem for file in (ROOT / "conf/start").glob("*.yaml")))
def test_starts_are_of_their_kind(start):
    check_config(OmegaConf.to_container(configure(f"start={start}"), resolve=True))


@pytest.mark.parametrize("data", ["h5ad", "tenx", "mix4"])
def test_data_are_of_their_kind(data):
    check_config(OmegaConf.to_container(configure(f"data={data}"), resolve=True))


@pytest.mark.parametrize(
    "choice, key, value, words",
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
        ("h5ad", "data.path", 3, "data.path=3: must be a text"),
        ("em", "model.tolerance", 0, "model.tolerance=0: must be above 0"),
        ("em", "model.m_step.max_steps", [1], "model.m_step.max_steps=[1]: must be a whole number"),
        ("amortized", "model.lr", float("nan"), "model.lr=nan: must be finite"),
        ("amortized", "model.lr", float("inf"), "model.lr=inf: must be finite"),
        ("amortized", "model.train_components", 1, "model.train_components=1: must be true or false"),
        ("amortized", "start.inner.n_starts", "a", "start.inner.n_starts=a: must be a whole number"),
        ("vaec", "model.n_latent", 0, "model.n_latent=0: must be 1 or more"),
        (
            "em",
            "model.n_components",
            "some",
            "model.n_components=some: give a whole number, auto, or a range",
        ),
        ("em", "model.n_components", 0, "model.n_components=0: must be 1 or more"),
        ("em", "model.pseudo_cells", "some", "model.pseudo_cells=some: must be a number or auto"),
        ("em", "model.weights", "equal", "model.weights=equal: choose one of uniform, learned, given"),
        ("em", "start.folds", 1, "start.folds=1: must be 2 or more"),
        ("em", "start.surplus", 11, "start.surplus=11: must be at most 10"),
        ("em", "task", "show", "task=show: choose fit or predict"),
        ("em", "evaluation.max_umap_cells", -1, "evaluation.max_umap_cells=-1: must be 0 or more"),
        ("em", "callbacks.best.dirpath", 1, "callbacks.best.dirpath=1: must be a text"),
        ("em", "model", None, "model=null: is a group of settings"),
        ("em", "start", {"a": 1}, "start={'a': 1}: has no _target_; name one of conf/start/"),
        (
            "em",
            "start._target_",
            "nbmix.starts.random.No",
            "start._target_=nbmix.starts.random.No: there is no",
        ),
        ("em", "model._target_", "nbmix.no.No", "model._target_=nbmix.no.No: there is no such class"),
        (
            "em",
            "data._target_",
            "nbmix.data.module",
            "data._target_=nbmix.data.module: there is no such class",
        ),
        ("em", "callbacks.last", 1, "callbacks.last=1: must be settings"),
        ("em", "model.m_step", "newton", "model.m_step=newton: is a group of settings"),
    ],
)
def test_a_value_that_cannot_be_used(choice, key, value, words, configs):
    config = OmegaConf.to_container(OmegaConf.create(configs[choice]))
    put(config, key, value)
    with pytest.raises(InputError) as refused:
        check_config(config)
    assert str(refused.value).startswith(words)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", ["auto", "2-10"])
def test_a_number_of_components_may_be_left_open(value, configs):
    config = OmegaConf.to_container(OmegaConf.create(configs["em"]))
    put(config, "model.n_components", value)
    check_config(config)


def test_settings_of_a_search():
    config = OmegaConf.to_container(configure("sweep=optuna", "hydra.run.dir=x"), resolve=True)
    put(config, "search.n_jobs", 0)
    with pytest.raises(InputError, match=r"^search.n_jobs=0: must be 1 or more$"):
        check_config(config)


def test_settings_of_other_packages_are_left_to_them():
    config = OmegaConf.to_container(configure("logger=tensorboard"), resolve=True)
    put(config, "logger.version", 7)
    check_config(config)

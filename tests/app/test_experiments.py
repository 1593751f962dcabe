"""Experiments, sweeps and launchers compose with every value that they name."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import OmegaConf

from nbmix.app.optuna_search import edges, parse_space
from tests.helpers.running import ROOT, configure

SWEEPS = sorted(file.stem for file in (ROOT / "conf/sweep").glob("*.yaml"))
EXPERIMENTS = sorted(file.stem for file in (ROOT / "conf/experiment").glob("*.yaml"))


def with_hydra(*overrides):
    """The config with Hydra's own part."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


def together(values):
    """Overrides in which every value of every setting occurs, in as few configs as that takes."""
    for turn in range(max(map(len, values.values()))):
        yield [f"{key}={listed[min(turn, len(listed) - 1)]}" for key, listed in values.items()]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes(name):
    whole = OmegaConf.to_container(configure(f"experiment={name}"), resolve=True, throw_on_missing=True)
    assert whole["task"] == "fit"
    assert {"data", "model", "start", "trainer"} <= whole.keys()


def test_experiments_choose_their_groups():
    cfg = configure("experiment=mix4_subsample", "data.path=x.h5ad", "model.n_hidden=64")
    assert cfg.model._target_.endswith("AmortizedMixture")
    assert (cfg.model.n_components, cfg.model.n_hidden, cfg.trainer.max_epochs) == (4, 64, 10)
    assert (cfg.data.mixture, cfg.data.batch_size, cfg.start.n_cells) == ("mix4", 64, 1000)


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_composes_with_every_value(name):
    model = ("model=amortized",) if "amortized" in name else ()
    cfg = with_hydra(f"sweep={name}", *model)
    if "search" in cfg:
        values = {line.key_or_group: edges(line) for line in parse_space(cfg.search.space)}
    else:
        assert cfg.hydra.mode == RunMode.MULTIRUN
        values = {key: str(listed).split(",") for key, listed in cfg.hydra.sweeper.params.items()}
    for overrides in together(values):
        configure(f"sweep={name}", *model, *overrides)


def test_a_value_that_does_not_compose_is_noticed():
    with pytest.raises(ConfigCompositionException):
        configure("model.n_hidden=64")  # which EM has not


def test_the_sweep_file_of_wandb():
    content = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/wandb_sweep.yaml"))
    assert content["method"] in ("grid", "random", "bayes")
    assert content["metric"] == {"name": configure().optimized_metric, "goal": "maximize"}
    assert (ROOT / content["program"]).is_file()
    assert content["command"][-1] == "${args_no_hyphens}"  # Hydra's key=value, not --key=value
    own = [word for word in content["command"] if "=" in word]
    assert "logger=wandb" in own
    # the metric compares numbers of groups where each is one component
    assert content["parameters"]["model.components_per_group"] == {"value": 1}
    values = {}
    for key, parameter in content["parameters"].items():
        if "distribution" in parameter:
            assert parameter["distribution"] == "int_uniform"
            values[key] = [parameter["min"], parameter["max"]]
        else:
            values[key] = parameter.get("values") or [parameter["value"]]
    for overrides in together(values):
        configure(*own, *overrides)


@pytest.mark.parametrize(
    "launcher, plugin",
    [
        ("joblib", "hydra_joblib_launcher"),
        ("submitit_local", "hydra_submitit_launcher"),
        ("submitit_slurm", "hydra_submitit_launcher"),
    ],
)
def test_launcher_composes(launcher, plugin):
    pytest.importorskip(f"hydra_plugins.{plugin}")
    cfg = with_hydra("sweep=components", f"hydra/launcher={launcher}")
    assert plugin in cfg.hydra.launcher._target_

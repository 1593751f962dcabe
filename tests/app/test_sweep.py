"""Sweeps: trials that fail, the table, the comparison over seeds, the search, and every config of them."""

from __future__ import annotations

import json
import math
import sys
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from nbmix.app import sweep
from nbmix.app.sweep import candidates, draw, exit_on_failure, parse_space, read_trials, suggest, tabulate
from nbmix.errors import InputError
from tests.helpers.apart import train
from tests.helpers.running import ROOT, TINY, configure

SWEEPS = sorted(file.stem for file in (ROOT / "conf/sweep").glob("*.yaml"))
EXPERIMENTS = sorted(file.stem for file in (ROOT / "conf/experiment").glob("*.yaml"))
HELD_OUT = "heldout_log_likelihood"


def with_hydra(*overrides):
    """The config with Hydra's own part."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


def together(values):
    """Overrides in which every value of every setting occurs, in as few configs as that takes."""
    for turn in range(max(map(len, values.values()))):
        yield [f"{key}={listed[min(turn, len(listed) - 1)]}" for key, listed in values.items()]


def leave(folder, name, overrides, held_out=None, *, n_components=None, error=None, **metrics):
    """A folder as a trial leaves it."""
    (folder / name / ".hydra").mkdir(parents=True)
    (folder / name / ".hydra/overrides.yaml").write_text(json.dumps(overrides))
    if error is not None:
        (folder / name / "failure.json").write_text(json.dumps({"error": error, "bad_input": True}))
    elif held_out is not None:
        found = {HELD_OUT: held_out, "n_components": n_components} | metrics
        (folder / name / "metrics.json").write_text(json.dumps(found))


@pytest.fixture
def folder(tmp_path):
    """K = 2 and 3 with three seeds each, of which one failed and one just ended."""
    values = {(2, 0): -10.0, (2, 1): -12.0, (2, 2): -5.0, (3, 0): -9.0, (3, 1): -11.5}
    for number, (k, seed) in enumerate((k, seed) for k in (2, 3) for seed in (0, 1, 2)):
        overrides = [f"model.n_components={k}", f"seed={seed}", "data=sim"]
        leave(tmp_path, str(number), overrides, values.get((k, seed)), n_components=k, seconds=1.5)
    leave(tmp_path, "10", ["model.n_components=9", "seed=0", "data=sim"], error="model.n_components=9: no")
    return tmp_path


# Trials


def test_a_trial_that_fails_leaves_one_line(tmp_path, monkeypatch):
    cfg = configure(*TINY, folder=tmp_path)

    def fail(cfg):
        raise InputError("model.n_components=99: too\nmany")

    monkeypatch.setattr(sweep, "run", fail)
    assert math.isnan(sweep.run_trial(cfg))
    assert json.loads((tmp_path / "failure.json").read_text()) == {
        "error": "model.n_components=99: too many",
        "bad_input": True,
    }
    monkeypatch.setattr(sweep, "run", lambda cfg: {HELD_OUT: -3})
    assert sweep.run_trial(cfg) == -3
    assert not (tmp_path / "failure.json").exists()


def test_what_was_stopped_stays_stopped(tmp_path, monkeypatch):
    def stop(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_trial(configure(*TINY, folder=tmp_path))


def test_trials_in_the_order_of_their_numbers(folder):
    leave(folder, ".", ["sweep=optuna"], -1.0)  # the folder of a search is no trial of it
    trials = read_trials(folder)
    assert [trial.name for trial in trials] == ["0", "1", "2", "3", "4", "5", "10"]
    assert [trial.error for trial in trials[5:]] == [
        "ended without results: stopped, or out of memory",
        "model.n_components=9: no",
    ]


# The table and the figure


def test_table(folder):
    table = tabulate(read_trials(folder), HELD_OUT)
    assert list(table) == [
        *("trial", "model.n_components", "seed", HELD_OUT, "n_components", "seconds", "error")
    ]
    assert table["n_components"].dtype == pd.Int64Dtype()
    assert table["error"].ne("").tolist() == [False] * 5 + [True] * 2
    assert table[HELD_OUT].notna().tolist() == [True] * 5 + [False] * 2


def test_settings_are_compared_over_the_seeds_that_all_have(folder):
    two, three = candidates(read_trials(folder), HELD_OUT)  # seed 2 is left out: K = 3 failed there
    assert (two.settings, two.n_components, two.n_seeds) == ({"model.n_components": "2"}, 2, 2)
    # seed 0 lies 1.125 above the mean of both, seed 1 as much below, which says nothing about K
    assert (two.mean, two.lowest, two.highest) == (-11.0, -11.125, -10.875)
    assert (three.mean, three.lowest, three.highest) == (-10.25, -10.375, -10.125)


def test_a_range_where_no_other_setting_tells_the_level_of_a_seed(tmp_path):
    for seed, value in enumerate((-1.0, -4.0)):
        leave(tmp_path, str(seed), [f"seed={seed}"], value, n_components=4)
    (found,) = candidates(read_trials(tmp_path), HELD_OUT)
    assert (found.mean, found.lowest, found.highest) == (-2.5, -4.0, -1.0)


def test_each_over_its_own_seeds_where_none_is_common(tmp_path):
    leave(tmp_path, "0", ["start=kmeans", "seed=0"], -1.0, n_components=4)
    leave(tmp_path, "1", ["start=random", "seed=1"], -2.0, n_components=4)
    assert [c.mean for c in candidates(read_trials(tmp_path), HELD_OUT)] == [-1.0, -2.0]


def test_the_same_trial_twice_is_one_seed(tmp_path):
    for name in "01":
        leave(tmp_path, name, ["start=kmeans"], -1.0, n_components=4)
    (found,) = candidates(read_trials(tmp_path), HELD_OUT)
    assert (found.settings, found.mean, found.n_seeds) == ({}, -1.0, 1)


def test_mean_and_range_over_the_number_of_components(folder):
    (axes,) = draw(candidates(read_trials(folder), HELD_OUT), HELD_OUT).axes
    line = axes.lines[0]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([2, 3], [-11.0, -10.25])
    bars = axes.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[-11.125, -10.875], [-10.375, -10.125]])
    assert axes.get_title(loc="left") == "best: 3 components; mean over 2 seeds, range without their levels"


def test_other_settings_in_the_order_of_trials(tmp_path):
    for number, value in enumerate((-3.0, -5.0, -1.0)):
        leave(tmp_path, str(number), [f"model.lr={number}"], n_components=4, held_out=value, ari=value + 3)
    trials = read_trials(tmp_path)
    (axes,) = draw(candidates(trials, HELD_OUT), HELD_OUT).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[-3.0, -5.0, -1.0], [-3.0, -3.0, -1.0]]
    (axes,) = draw(candidates(trials, "ari"), "ari").axes
    assert axes.get_ylabel() == "ari"


def test_summary(folder, capsys):
    assert len(sweep.summarise(folder, HELD_OUT)) == 7
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"best by {HELD_OUT}: model.n_components=3 (-10.25, mean of 2 seeds)"
    assert said[1].startswith("7 trials: sweep.csv and sweep.png in ")
    assert len(pd.read_csv(folder / "sweep.csv")) == 7
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_the_metric(folder, capsys):
    sweep.summarise(folder, "ami")
    assert "7 trials: sweep.csv in " in capsys.readouterr().out
    assert not (folder / "sweep.png").exists()


def test_exit_status(folder, capsys):
    trials = read_trials(folder)
    with pytest.raises(SystemExit) as stop:
        exit_on_failure(trials)
    assert stop.value.code == 1  # one was not bad input
    assert capsys.readouterr().err.startswith("error: 2 of 7 trials failed, trial 5: ended without results")
    with pytest.raises(SystemExit) as stop:
        exit_on_failure(trials[-1:])
    assert stop.value.code == 2
    exit_on_failure(trials[:5])
    assert capsys.readouterr().err == "error: 1 of 1 trials failed, trial 10: model.n_components=9: no\n"


def test_table_of_a_sweep_that_was_stopped(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main([str(folder)])
    assert stop.value.code == 1
    assert (folder / "sweep.csv").is_file()
    with pytest.raises(SystemExit) as stop:
        sweep.main([str(folder / "0")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("holds no trials; give the folder of a sweep")


@pytest.mark.slow
def test_a_trial_that_fails_does_not_stop_the_rest(tmp_path):
    done = train(
        *TINY, "sweep=components", "model.n_components=100,1,2", "seed=0", "trainer.max_epochs=2",
        "logger=csv", f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: 1 of 3 trials failed, trial 0: model.n_components=100"
    )
    table = pd.read_csv(tmp_path / "sweep.csv")
    assert table["error"].notna().tolist() == [True, False, False]
    assert table["n_components"].tolist()[1:] == [1, 2]
    assert "best by heldout_log_likelihood: model.n_components=2 (" in done.stdout


# A search


class Asked:
    """Takes the place of an Optuna trial: what was asked for, answered with the upper end."""

    calls: ClassVar[list] = []

    def suggest_float(self, name, low, high, *, log):
        self.calls.append((name, low, high, log))
        return high

    def suggest_int(self, name, low, high, *, step):
        self.calls.append((name, low, high, step))
        return high

    def suggest_categorical(self, name, choices):
        self.calls.append((name, *choices))
        return choices[-1]


def test_the_space_in_words_of_hydra(monkeypatch):
    monkeypatch.setattr(Asked, "calls", [])
    space = parse_space(
        [
            "model.n_components=range(2,11,2)",
            "start=choice(kmeans,random)",
            "model.lr=tag(log,interval(1e-4,1e-2))",
            "model.pseudo_cells=choice(auto,0,20)",
            "data.validation_share=interval(0.1,0.2)",
            "model.tolerance=range(0.5,2,0.5)",
        ]
    )
    assert [suggest(Asked(), line) for line in space] == ["10", "random", "0.01", "20", "0.2", "1.5"]
    assert Asked.calls == [
        ("model.n_components", 2, 10, 2),
        ("start", "kmeans", "random"),
        ("model.lr", 1e-4, 1e-2, True),
        ("model.pseudo_cells", "auto", "0", "20"),
        ("data.validation_share", 0.1, 0.2, False),
        ("model.tolerance", "0.5", "1.0", "1.5"),
    ]


@pytest.mark.parametrize(
    "lines, words",
    [
        ([], "search.space is empty"),
        (["seed=3"], "seed=3 names one value"),
        (["seed=range(1,3)", "seed=choice(1,2)"], "seed is there twice"),
    ],
)
def test_a_space_that_is_none(lines, words):
    with pytest.raises(InputError, match=words):
        parse_space(lines)


def test_a_space_that_cannot_be_read():
    with pytest.raises(HydraException):
        parse_space(["seed=range(1"])


def test_optuna_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"Optuna is not installed: pip install 'nbmix\[sweeps\]'"):
        sweep._optuna()


@pytest.mark.slow
def test_a_search(tmp_path):
    pytest.importorskip("optuna")
    done = train(
        "data.n_cells=60", "data.n_genes=80", "data.n_components=2", "start=kmeans", "trainer.max_epochs=2",
        "logger=csv", "sweep=optuna", "search.n_trials=3",
        'search.space=["model.n_components=choice(2,100)"]', f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    table = pd.read_csv(tmp_path / "sweep.csv")
    assert table["trial"].tolist() == [0, 1, 2]
    failed = table["error"].notna()
    assert (failed == (table.get("model.n_components", failed * 98 + 2) == 100)).all()
    assert done.returncode == (2 if failed.any() else 0), done.stderr


def test_a_search_is_not_swept(tmp_path, monkeypatch):
    cfg = with_hydra("sweep=optuna", "hydra.mode=MULTIRUN")
    monkeypatch.setattr(sweep.HydraConfig, "get", lambda: cfg.hydra)
    with pytest.raises(InputError, match="leave out -m"):
        sweep.objective(cfg)


# Configs


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes(name):
    OmegaConf.to_container(configure(f"experiment={name}"), resolve=True, throw_on_missing=True)


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
        values = {line.key_or_group: sweep._edges(line) for line in parse_space(cfg.search.space)}
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

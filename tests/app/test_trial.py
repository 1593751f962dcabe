"""Trials that may fail, and what they leave."""

from __future__ import annotations

import json
import math
import signal

import pandas as pd
import pytest

from nbmix.app.command import Stopped
from nbmix.app.trial import read_trials, run_trial
from tests.helpers.apart import train
from tests.helpers.faults import at
from tests.helpers.running import NO_PICTURES, TINY, configure
from tests.helpers.trials import HELD_OUT, leave, small_sweep


def trial(folder, *settings):
    return run_trial(
        configure(*TINY, NO_PICTURES, "logger=csv", "trainer.max_epochs=2", *settings, folder=folder)
    )


def test_a_trial_that_fails_leaves_one_line(tmp_path):
    assert math.isnan(trial(tmp_path, "model.n_components=99"))
    assert json.loads((tmp_path / "failure.json").read_text()) == {
        "error": "model.n_components=99: there are only 54 cells to fit; choose fewer components",
        "bad_input": True,
    }
    reached = trial(tmp_path)
    assert reached == json.loads((tmp_path / "metrics.json").read_text())[HELD_OUT]
    assert not (tmp_path / "failure.json").exists()


def test_a_trial_without_the_metric_has_no_value(tmp_path, caplog):
    assert math.isnan(trial(tmp_path, "optimized_metric=elbo"))
    assert "optimized_metric=elbo: metrics.json has none to rank this trial" in caplog.text


def test_what_was_stopped_stays_stopped(tmp_path):
    with pytest.raises(Stopped):
        trial(tmp_path, *at(1, signal.SIGINT))
    assert not (tmp_path / "failure.json").exists()


def test_trials_in_the_order_of_their_numbers(tmp_path):
    folder = small_sweep(tmp_path)
    leave(folder, ".", ["sweep=optuna"], -1.0)  # the folder of a search is no trial of it
    trials = read_trials(folder)
    assert [trial.name for trial in trials] == ["0", "1", "2", "3", "4", "5", "10"]
    assert [trial.error for trial in trials[5:]] == [
        "ended without results: stopped, or out of memory",
        "model.n_components=9: no",
    ]


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

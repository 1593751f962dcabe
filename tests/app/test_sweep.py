"""The table and the figure of a sweep: the comparison over seeds, and trials that failed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nbmix.app.sweep import candidates, draw, exit_on_failure, main, summarise, tabulate
from nbmix.app.trial import read_trials
from tests.helpers.trials import HELD_OUT, leave, small_sweep


@pytest.fixture
def folder(tmp_path):
    return small_sweep(tmp_path)


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
    title = "best: 3 components; mean over 2 seeds\nbars: range, each seed's mean removed"
    assert axes.get_title(loc="left") == title


def test_other_settings_in_the_order_of_trials(tmp_path):
    for number, value in enumerate((-3.0, -5.0, -1.0)):
        leave(tmp_path, str(number), [f"model.lr={number}"], n_components=4, held_out=value, ari=value + 3)
    trials = read_trials(tmp_path)
    (axes,) = draw(candidates(trials, HELD_OUT), HELD_OUT).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[-3.0, -5.0, -1.0], [-3.0, -3.0, -1.0]]
    (axes,) = draw(candidates(trials, "ari"), "ari").axes
    assert axes.get_ylabel() == "ari"


def test_summary(folder, capsys):
    assert len(summarise(folder, HELD_OUT)) == 7
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"best by {HELD_OUT}: model.n_components=3 (-10.25, mean of 2 seeds)"
    assert said[1].startswith("7 trials: sweep.csv and sweep.png in ")
    assert len(pd.read_csv(folder / "sweep.csv")) == 7
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_the_metric(folder, capsys):
    summarise(folder, "ami")
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
        main([str(folder)])
    assert stop.value.code == 1
    assert (folder / "sweep.csv").is_file()
    with pytest.raises(SystemExit) as stop:
        main([str(folder / "0")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("holds no trials; give the folder of a sweep")

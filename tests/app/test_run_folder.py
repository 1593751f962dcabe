"""Folders of other runs are refused before anything is written to them."""

from __future__ import annotations

import pickle

import pytest
from omegaconf import OmegaConf, open_dict

from nbmix.app.run_folder import KeepResults, held, refuse_other_results
from nbmix.errors import InputError
from tests.helpers.running import configure


def finished(folder, *settings):
    """A folder with the results of a run, as Hydra and nbmix leave it; where its settings are."""
    (folder / ".hydra").mkdir()
    OmegaConf.save(configure(*settings, folder=folder), folder / ".hydra/config.yaml")
    (folder / "metrics.json").write_text("{}")
    return folder / ".hydra/config.yaml"


def contents(folder):
    """What is still there where nothing is refused: a look changes nothing."""
    return sorted(path.name for path in folder.rglob("*"))


def test_the_same_settings_may_run_again(tmp_path):
    earlier = finished(tmp_path, "seed=1")
    refuse_other_results(tmp_path, configure("seed=1", folder=tmp_path), earlier)
    assert contents(tmp_path) == [".hydra", "config.yaml", "metrics.json"]


def test_a_class_that_has_moved_is_no_other_setting(tmp_path):
    earlier = finished(tmp_path)
    there = OmegaConf.load(earlier)
    there.trainer._target_ = "nbmix.trainer.build_trainer"
    OmegaConf.save(there, earlier)
    refuse_other_results(tmp_path, configure(folder=tmp_path), earlier)
    there.trainer._target_ = "others.build_trainer"
    OmegaConf.save(there, earlier)
    with pytest.raises(InputError, match=r"\(trainer._target_=others\."):
        refuse_other_results(tmp_path, configure(folder=tmp_path), earlier)


def test_a_setting_that_the_earlier_run_did_not_have(tmp_path):
    earlier = finished(tmp_path)
    there = OmegaConf.load(earlier)
    del there.evaluation.scores
    OmegaConf.save(there, earlier)
    with pytest.raises(InputError, match=r"other settings \(evaluation.scores was unset\)"):
        refuse_other_results(tmp_path, configure(folder=tmp_path), earlier)


@pytest.mark.parametrize("settings", [("seed=2",), ("model=amortized",), ("task=predict",)], ids=str)
def test_other_settings_are_refused(settings, tmp_path):
    earlier = finished(tmp_path, "seed=1")
    with pytest.raises(InputError, match=r"results of a run with other settings \(.*overwrite=true"):
        refuse_other_results(tmp_path, configure(*settings, folder=tmp_path), earlier)


@pytest.mark.parametrize("more", ["overwrite=true", "ckpt_path=last", "ckpt_path={}/checkpoints/last.ckpt"])
def test_other_settings_that_are_meant(more, tmp_path):
    earlier = finished(tmp_path, "seed=1")
    refuse_other_results(tmp_path, configure("seed=2", more.format(tmp_path), folder=tmp_path), earlier)
    assert contents(tmp_path) == [".hydra", "config.yaml", "metrics.json"]


def test_new_cells_are_not_written_over_the_fit_that_they_are_given_to(tmp_path):
    earlier = finished(tmp_path)
    settings = ("task=predict", f"ckpt_path={tmp_path}/checkpoints/last.ckpt")
    with pytest.raises(InputError, match=r"other settings \(task=fit\)"):
        refuse_other_results(tmp_path, configure(*settings, folder=tmp_path), earlier)


def test_what_is_not_finished_may_be_begun_anew(tmp_path):
    earlier = finished(tmp_path, "seed=1")
    (tmp_path / "metrics.json").unlink()
    refuse_other_results(tmp_path, configure("seed=2", folder=tmp_path), earlier)
    assert contents(tmp_path) == [".hydra", "config.yaml"]


def test_results_without_settings_are_kept(tmp_path):
    finished(tmp_path).unlink()
    with pytest.raises(InputError, match="other settings; choose another folder"):
        refuse_other_results(tmp_path, configure(folder=tmp_path), tmp_path / ".hydra/config.yaml")


def hydra_config(folder, *settings):
    config = configure(*settings, folder=folder)
    with open_dict(config):
        config.hydra = {"run": {"dir": str(folder)}, "sweep": {"dir": str(folder)}, "mode": "RUN"}
    return config


def test_hydra_leaves_the_folder_of_a_run_at_work_alone(tmp_path, capsys):
    callback = KeepResults()
    with held(tmp_path), pytest.raises(SystemExit) as left:
        callback.on_run_start(hydra_config(tmp_path))
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: hydra.run.dir={tmp_path}: another run is at work")


def test_a_sweep_holds_its_folder(tmp_path):
    callback = KeepResults()
    callback.on_multirun_start(hydra_config(tmp_path))
    with pytest.raises(InputError, match="another run is at work"), held(tmp_path):
        pass
    callback.on_multirun_end(hydra_config(tmp_path))
    with held(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_launchers_may_send_it_to_other_processes(tmp_path):
    callback = KeepResults()
    callback.on_multirun_start(hydra_config(tmp_path))
    assert isinstance(pickle.loads(pickle.dumps(callback)), KeepResults)
    callback.on_multirun_end(hydra_config(tmp_path))

"""Fits that are killed, stopped, out of space, or started twice in one folder; bits that repeat."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch

from nbmix.app.command import Stopped, is_bad_input, one_line
from nbmix.app.run_folder import held
from nbmix.data.checkpoint import load_checkpoint
from nbmix.errors import InputError
from tests.helpers.apart import apart, train
from tests.helpers.faults import at, differences, hold, no_room, run_until_written
from tests.helpers.running import NO_PICTURES, TINY, run_here

LAST = "checkpoints/last.ckpt"
FITS = {  # three batches an epoch
    "em": (*TINY, NO_PICTURES, "data.batch_size=20", "model.folds=3", "trainer.max_epochs=5"),
    "amortized": (
        *(*TINY, NO_PICTURES, "data.batch_size=20", "model=amortized", "model.encoder_epochs=1"),
        *("trainer.max_epochs=4", "start=kmeans"),
    ),
}
MODELS = pytest.mark.parametrize("model", FITS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """model -> folder of a fit to which nothing happens."""
    folders = {}
    for model, settings in FITS.items():
        folders[model] = tmp_path_factory.mktemp(model)
        run_here(folders[model], *settings)
    return folders


def epoch_of(folder: Path) -> int:
    return torch.load(folder / LAST, weights_only=True)["epoch"]


@MODELS
@pytest.mark.parametrize("batch", [1, 7], ids=["first epoch", "third epoch"])
def test_a_killed_fit_ends_with_the_same_bits(model, batch, whole, tmp_path):
    status = apart(run_here, tmp_path, *FITS[model], *at(batch))
    assert status == -signal.SIGKILL
    assert epoch_of(tmp_path) == max(0, batch // 3 - 1)
    run_here(tmp_path, *FITS[model], "ckpt_path=last")
    assert differences(whole[model], tmp_path) == []


def test_killed_before_there_is_a_checkpoint(whole, tmp_path, caplog):
    caplog.set_level("INFO")
    run_here(tmp_path, *FITS["em"], "ckpt_path=last")
    assert "ckpt_path=last: " in caplog.text and "is not there yet; the fit begins anew" in caplog.text
    assert differences(whole["em"], tmp_path) == []


@pytest.mark.parametrize("call", [5, 8])
def test_killed_while_files_are_put_in_place(call, whole, tmp_path):
    """Of best.ckpt and last.ckpt, the new content or the new name waits for the disk."""
    assert apart(run_until_written, call, tmp_path, *FITS["em"], *at(100)) == -signal.SIGKILL
    run_here(tmp_path, *FITS["em"], "ckpt_path=last")
    assert not list(tmp_path.rglob("*.part"))
    assert differences(whole["em"], tmp_path) == []


@MODELS
def test_the_same_seed_gives_the_same_bits(model, whole, tmp_path):
    run_here(tmp_path, *FITS[model])
    assert differences(whole[model], tmp_path) == []


def refused(folder, *settings):
    with pytest.raises(InputError) as error:
        run_here(folder, *settings)
    assert is_bad_input(error.value)
    line = one_line(error.value)
    assert "\n" not in line
    return line


def test_no_room_leaves_the_last_checkpoint_whole(whole, tmp_path):
    """The system ends a write of the third epoch in the midst, as where the disk is full."""
    size = (whole["em"] / LAST).stat().st_size
    done = train(*FITS["em"], "logger=csv", *no_room(7, size // 2), f"hydra.run.dir={tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 2, done.stderr  # one of progress
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: hydra.run.dir={tmp_path}: no file may grow so; make room, or"), line
    assert load_checkpoint(tmp_path / LAST).sealed
    assert epoch_of(tmp_path) == 1
    run_here(tmp_path, *FITS["em"], "ckpt_path=last")
    assert differences(whole["em"], tmp_path) == []


def test_a_full_disk_while_results_are_written(tmp_path, monkeypatch):
    def fill(self, path, **settings):
        Path(path).write_bytes(b"half")
        raise OSError("Can't write data (file write failed: errno = 28, error message = 'No space left')")

    with monkeypatch.context() as full:
        full.setattr("anndata.AnnData.write_h5ad", fill)
        assert "the disk is full; make room" in refused(tmp_path, *FITS["em"])
    assert not {"metrics.json", "result.h5ad", "result.h5ad.part"} & {p.name for p in tmp_path.iterdir()}
    run_here(tmp_path, *FITS["em"], "ckpt_path=last")
    assert (tmp_path / "metrics.json").is_file()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(tmp_path / "file" / "run", *FITS["em"])
    assert f"hydra.run.dir={tmp_path}/file/run: Not a directory" in line


def test_a_stopped_fit_is_saved(whole, tmp_path):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped) as stopped:
        run_here(tmp_path, *FITS["amortized"], *at(4, signal.SIGINT))
    assert stopped.value.number == signal.SIGINT
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert epoch_of(tmp_path) == 0
    run_here(tmp_path, *FITS["amortized"], "ckpt_path=last")
    assert differences(whole["amortized"], tmp_path) == []


def test_a_stopped_run_says_how_to_go_on(tmp_path):
    settings = (*FITS["em"], "logger=csv", f"hydra.run.dir={tmp_path}")
    done = train(*settings, *at(4, signal.SIGTERM))
    assert done.returncode == 128 + signal.SIGTERM
    *_, said = done.stderr.splitlines()
    assert said.startswith("stopped; the fit is saved, go on with: "), done.stderr
    assert "Traceback" not in done.stderr
    python, script, *words = shlex.split(said.partition("go on with: ")[2])
    assert (python, script) == (Path(sys.executable).name, "train.py")
    assert words[-1] == "ckpt_path=last"
    assert set(FITS["em"]) < set(words)


def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    with held(tmp_path):
        assert "another run is at work in this folder" in refused(tmp_path, *FITS["em"])
    assert not (tmp_path / ".lock").exists()


def test_a_lock_dies_with_its_process(tmp_path):
    assert apart(hold, tmp_path) == -signal.SIGKILL
    with held(tmp_path):
        assert (tmp_path / ".lock").exists()

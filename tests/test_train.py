"""``python train.py`` as a user types it, each run in a process of its own."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest

from tests.running import TINY, run_here, run_train


def in_order(folder):
    """Whether the cells of result.h5ad are those of the data, in its order."""
    return ad.read_h5ad(folder / "result.h5ad").obs_names.tolist() == [f"cell{i}" for i in range(60)]


def our_lines(done, *, log_lines=0):
    """Two lines of our own on stdout beside the log, and one of progress on stderr; nothing else."""
    printed = [line for line in done.stdout.splitlines() if "][nbmix." not in line]
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) - len(printed) == log_lines, done.stdout
    assert printed[0].startswith("n_cells "), done.stdout
    assert printed[-1].startswith("results in "), done.stdout
    assert len(printed) in (2, 3), done.stdout  # "not converged" stands between them
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("fit "), done.stderr


def test_without_arguments(tmp_path):
    done = run_train(f"hydra.run.dir={tmp_path}")
    our_lines(done, log_lines=1)
    assert {p.name for p in tmp_path.iterdir()} == {
        *("metrics.json", "result.h5ad", "markers.csv", "report.html"),
        *("checkpoints", "figures", "tensorboard", "train.log", ".hydra"),
    }
    assert list((tmp_path / "tensorboard").glob("events.*"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["accuracy"] == 1  # as the source's simulation
    assert metrics["converged"] is True


def test_amortized_with_wandb_offline(tmp_path):
    done = run_train(
        *TINY, "model=amortized", "trainer.max_epochs=2", "logger=wandb", "logger.offline=true",
        f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    our_lines(done, log_lines=1)
    assert f"wandb sync {tmp_path}/wandb/offline-run-" in done.stdout
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (
            ("model=foo",),
            2,
            "Could not find 'model/foo' Available options in 'model': amortized em gmvae vaec (see conf/",
        ),
        (("start=means",), 2, "Missing mandatory value: start.path"),
        (("data=h5ad", "data.path=/no/such.h5ad"), 2, "data.path=/no/such.h5ad: no such file"),
        (("-m", "seed=0,1", "trainer.processes=2"), 2, "torchrun, or the submitit launcher"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(arguments, status, words, tmp_path):
    done = run_train(*arguments, f"hydra.run.dir={tmp_path}", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


def test_traceback_on_demand(tmp_path):
    done = run_train("task=show", f"hydra.run.dir={tmp_path}", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "nbmix.errors.InputError: task=show: choose fit or predict"


def test_predict_says_nothing_wrong_about_new_cells(tmp_path):
    run_here(tmp_path / "fit", *TINY, "trainer.max_epochs=2")
    done = run_train(
        *TINY, "task=predict", f"ckpt_path={tmp_path}/fit/checkpoints/last.ckpt", "data.n_cells=30",
        f"hydra.run.dir={tmp_path}/new",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads((tmp_path / "new" / "metrics.json").read_text())["n_cells"] == 30


@pytest.mark.slow
def test_a_sweep_runs_every_trial(tmp_path):
    done = run_train("-m", *TINY, "seed=0,1", "trainer.max_epochs=2", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / trial / "metrics.json").is_file() for trial in "01")
    assert done.stdout.count("results in ") == 2


@pytest.mark.slow
@pytest.mark.parametrize("model", ["em", "amortized"])
def test_two_processes_say_what_one_says(model, tmp_path):
    settings = (*TINY, f"model={model}", "trainer.max_epochs=4", "logger=csv", "data.batch_size=25")
    runs = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = run_train(*settings, f"trainer.processes={processes}", f"hydra.run.dir={folder}")
        our_lines(done)
        assert in_order(folder)
        runs[processes] = (
            json.loads((folder / "metrics.json").read_text()),
            ad.read_h5ad(folder / "result.h5ad").obsm["X_nbmix"],
        )
    (one, q_one), (two, q_two) = runs[1], runs[2]
    assert list(tmp_path.rglob("metrics.json")) and len(list(tmp_path.rglob("metrics.json"))) == 2
    assert two["n_cells"] == one["n_cells"] == 60
    if model == "em":
        for name in ("log_likelihood", "heldout_log_likelihood", "crossfit_log_likelihood"):
            assert two[name] == pytest.approx(one[name], rel=1e-6), name
        np.testing.assert_allclose(q_one, q_two, atol=1e-6)
    else:  # other minibatches, so another path to about the same place
        assert two["ari"] == one["ari"] == 1


@pytest.mark.slow
def test_three_processes_of_which_some_have_no_cells(tmp_path):
    """Seven cells in two folds, and one that is held out: fewer than a batch, and uneven shares."""
    settings = (
        *("data.n_cells=8", "data.n_genes=30", "data.n_components=2", "model.n_components=2"),
        *("data.validation_share=0.125", "model.folds=2", "start=labels", "trainer.max_epochs=3"),
        "model.dtype=float64",  # so that ranks alone can make a difference
    )
    one = run_here(tmp_path / "one", *settings)
    done = run_train(*settings, "logger=csv", "trainer.processes=3", f"hydra.run.dir={tmp_path}/three")
    assert done.returncode == 0, done.stderr
    three = json.loads((tmp_path / "three" / "metrics.json").read_text())
    for name in ("log_likelihood", "heldout_log_likelihood", "crossfit_log_likelihood"):
        assert three[name] == pytest.approx(one[name], rel=1e-6), name
    q, theirs = (ad.read_h5ad(tmp_path / run / "result.h5ad").obsm["X_nbmix"] for run in ("one", "three"))
    np.testing.assert_allclose(q, theirs, atol=1e-6)

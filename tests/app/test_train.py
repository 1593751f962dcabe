"""``python train.py`` as a user types it, or torchrun or SLURM for them; each run in a process of its own."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from lightning_fabric.plugins.environments.lightning import find_free_network_port

from tests.helpers.apart import train, train_together
from tests.helpers.files import write_tenx_folder
from tests.helpers.running import NO_PICTURES, ROOT, TINY, run_here, run_train, small_data

MODELS = sorted(file.stem for file in (ROOT / "conf" / "model").glob("*.yaml"))


def our_lines(done, *, log_lines=0):
    """A few lines of our own on stdout beside the log, and one of progress on stderr; nothing else."""
    printed = [line for line in done.stdout.splitlines() if "][nbmix." not in line]
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) - len(printed) == log_lines, done.stdout
    assert printed[0].startswith("n_cells "), done.stdout
    assert printed[-1].startswith("results in "), done.stdout
    assert len(printed) in (2, 3, 4), done.stdout  # how many groups, and "not converged", stand between them
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("fit "), done.stderr


def test_without_arguments(tmp_path):
    done = run_train(f"hydra.run.dir={tmp_path}")
    our_lines(done, log_lines=1)
    assert {p.name for p in tmp_path.iterdir()} == {
        *("metrics.json", "result.h5ad", "markers.csv", "joins.csv", "separations.csv", "report.html"),
        *("checkpoints", "figures", "tensorboard", "train.log", ".hydra"),
    }
    assert list((tmp_path / "tensorboard").glob("events.*"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["accuracy"] == 1  # as the source's simulation
    assert metrics["converged"] is True


def test_the_folder_of_cell_ranger(tmp_path):
    """The first command of the README; its types of features are strings."""
    write_tenx_folder(tmp_path / "matrix", x=small_data().counts.astype(int))
    folders = (f"data.path={tmp_path}/matrix", f"hydra.run.dir={tmp_path}/run")
    our_lines(train("data=tenx", "model.n_components=1-2", "logger=csv", *folders), log_lines=1)
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_odd_names_in_another_locale(tmp_path):
    """A path that is no word of Hydra's, labels and genes that the locale cannot spell, and formulas."""
    data, labels = small_data(), np.array(["T\u00e9 $x_{$", "_\u6570\u636e"])
    obs = {"cell_type": labels[np.unique(data.labels, return_inverse=True)[1]]}
    adata = ad.AnnData(data.counts, obs=pd.DataFrame(obs, index=data.cell_names))
    adata.var_names = [f"\u00e9{name}" for name in data.gene_names]
    adata.write_h5ad(tmp_path / "epoch=1, sample (1).h5ad")
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_train(
        *(
            "data=h5ad",
            f"data.path={tmp_path}/epoch=1, sample (1).h5ad",
            "model.n_components=2",
            "start=kmeans",
        ),
        *("evaluation.max_umap_cells=0", "trainer.max_epochs=2", f"hydra.run.dir={tmp_path}/run"),
        **locale,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/report.html").is_file()
    assert (tmp_path / "run/figures/component_label_table.png").is_file()


def test_amortized_with_wandb_offline(tmp_path):
    done = train(
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
            f"Could not find 'model/foo' Available options in 'model': {' '.join(MODELS)} (see conf/",
        ),
        (("start=means",), 2, "Missing mandatory value: start.path"),
        (("data=h5ad", "data.path=/no/such.h5ad"), 2, "data.path=/no/such.h5ad: no such file"),
        (("-m", "seed=0,1", "trainer.processes=2"), 2, "torchrun, or the submitit launcher"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(arguments, status, words, tmp_path):
    done = train(*arguments, f"hydra.run.dir={tmp_path}", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


def test_traceback_on_demand(tmp_path):
    done = train("task=show", f"hydra.run.dir={tmp_path}", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "nbmix.errors.InputError: task=show: choose fit or predict"


def test_predict_says_nothing_wrong_about_new_cells(tmp_path):
    run_here(tmp_path / "fit", *TINY, NO_PICTURES, "trainer.max_epochs=2")
    done = train(
        *TINY, "task=predict", f"ckpt_path={tmp_path}/fit/checkpoints/last.ckpt", "data.n_cells=30",
        f"hydra.run.dir={tmp_path}/new",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads((tmp_path / "new" / "metrics.json").read_text())["n_cells"] == 30


@pytest.mark.slow
def test_a_sweep_runs_every_trial(tmp_path):
    """Each collects its garbage; what has been imported before the first one is none."""
    own = "import gc\ndef own(results):\n    return {'on': gc.isenabled(), 'kept': gc.get_freeze_count()}\n"
    (tmp_path / "own.py").write_text(own)
    words = ("trainer.max_epochs=2", "evaluation.scores=[own.own]", f"hydra.sweep.dir={tmp_path}")
    done = train("-m", *TINY, "seed=0,1", *words, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in ") == 2
    first, second = (json.loads((tmp_path / trial / "metrics.json").read_text()) for trial in "01")
    assert first["on"] and second["on"]
    assert first["kept"] >= second["kept"] > 0


# Several processes


def of_torchrun(rank, n_ranks):
    """What torchrun says to a process of its own."""
    return {
        **{"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "GROUP_RANK": "0"},
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(n_ranks)),
    }


def of_slurm(rank, n_ranks):
    """What srun says to a process of its own, on one node."""
    return {
        **{"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "nbmix", "SLURM_NNODES": "1", "SLURM_NODEID": "0"},
        **dict.fromkeys(("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"), str(n_ranks)),
        **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), str(rank)),
    }


def together(launcher, n_ranks, *arguments, log_lines=0):
    """One fit by several processes that a launcher has started."""
    port = {"MASTER_PORT": str(find_free_network_port())}
    environments = [launcher(rank, n_ranks) | port for rank in range(n_ranks)]
    first, *others = train_together(environments, f"trainer.processes={n_ranks}", "logger=csv", *arguments)
    assert [(done.returncode, done.stdout, done.stderr) for done in others] == [(0, "", "")] * len(others)
    our_lines(first, log_lines=log_lines)


def same_fit(folder, other):
    """Numbers and probabilities to 1e-6, and cells in the order of the data."""
    one, two = (json.loads((run / "metrics.json").read_text()) for run in (folder, other))
    assert two["n_cells"] == one["n_cells"]
    names = ("log_likelihood", "heldout_log_likelihood", "crossfit_log_likelihood", "elbo")
    for name in [name for name in names if name in one]:
        assert two[name] == pytest.approx(one[name], rel=1e-6), name
    one, two = (ad.read_h5ad(run / "result.h5ad") for run in (folder, other))
    assert two.obs_names.tolist() == [f"cell{i}" for i in range(one.n_obs)]
    np.testing.assert_allclose(one.obsm["X_nbmix"], two.obsm["X_nbmix"], atol=1e-6)


EM = (*TINY, NO_PICTURES, "trainer.max_epochs=4", "data.batch_size=25")


@pytest.mark.slow
def test_two_processes_say_what_one_says(tmp_path):
    run_here(tmp_path / "one", *EM)
    our_lines(run_train(*EM, "logger=csv", "trainer.processes=2", f"hydra.run.dir={tmp_path}/two"))
    same_fit(tmp_path / "one", tmp_path / "two")
    assert len(list(tmp_path.rglob("metrics.json"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [of_torchrun, of_slurm])
def test_three_processes_of_which_some_have_no_cells(launcher, tmp_path):
    """Seven cells in two folds, and one that is held out: fewer than a batch, and uneven shares."""
    settings = (
        *("data.n_cells=8", "data.n_genes=30", "data.n_components=2", "model.n_components=2"),
        *("data.validation_share=0.125", "model.folds=2", "start=labels", "trainer.max_epochs=3"),
        *("model.dtype=float64", NO_PICTURES),  # so that ranks alone can make a difference
    )
    run_here(tmp_path / "one", *settings)
    together(launcher, 3, *settings, f"hydra.run.dir={tmp_path}/three")
    same_fit(tmp_path / "one", tmp_path / "three")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, n_ranks, n_cells, cells_a_step, log_lines",
    # of the second some steps have two cells, of the third all: the last process has none
    [(of_torchrun, 2, 60, 24, 0), (of_slurm, 3, 61, 3, 0), (of_torchrun, 3, 2, 3, 1)],
)
def test_amortized_by_several_processes(launcher, n_ranks, n_cells, cells_a_step, log_lines, tmp_path):
    """The fit of one process whose batches are those of all together, also where shares are uneven."""
    settings = (
        *TINY,
        "model=amortized",
        "model.dtype=float64",
        f"data.n_cells={n_cells}",
        "trainer.max_epochs=8",
    )
    one = run_here(tmp_path / "one", *settings, f"data.batch_size={cells_a_step}")
    each = f"data.batch_size={cells_a_step // n_ranks}"
    together(launcher, n_ranks, *settings, each, f"hydra.run.dir={tmp_path}/of", log_lines=log_lines)
    of_several = json.loads((tmp_path / "of" / "metrics.json").read_text())
    assert of_several.keys() == one.keys()
    for name in {"ari", "elbo", "log_likelihood", "heldout_log_likelihood"} & one.keys():
        assert of_several[name] == pytest.approx(one[name], rel=1e-6), name


@pytest.mark.slow
def test_deep_models_by_several_processes(tmp_path):
    """Uneven shares, some of them empty; a cell's noise is what one process draws for it."""
    settings = (*TINY, "model=vaec", "data.n_cells=61", "model.start_epochs=1", "trainer.max_epochs=3")
    one = run_here(tmp_path / "one", *settings, "data.batch_size=3")
    together(of_torchrun, 3, *settings, "data.batch_size=1", f"hydra.run.dir={tmp_path}/of")
    of_several = json.loads((tmp_path / "of" / "metrics.json").read_text())
    for name in ("elbo", "log_likelihood", "heldout_log_likelihood"):
        assert of_several[name] == pytest.approx(one[name], rel=1e-6), name

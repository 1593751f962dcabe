"""The model of docs/extend.md, by the contract of ``nbmix.models.base``: its class and its runs."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from nbmix.data.checkpoint import load_checkpoint
from nbmix.models.restore import restore
from tests.helpers.pages import EXTEND, write_files
from tests.helpers.running import NO_PICTURES, fit, run_here, small_data


@pytest.fixture(scope="module", autouse=True)
def own(tmp_path_factory):
    """The module of docs/extend.md that holds the model, and the folder of its config."""
    folder = tmp_path_factory.mktemp("own")
    write_files(EXTEND, folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)
        yield import_module("my_models"), folder / "my_conf"


def test_it_climbs_the_log_likelihood_and_finds_the_groups(own):
    data = small_data(n_cells=120)
    model = own[0].GradientMixture(data.gene_names, n_components=2)
    _, cells = fit(model, data, epochs=5, batch_size=20)
    torch.testing.assert_close(cells.elbo, cells.log_likelihood, rtol=1e-12, atol=0)
    assert model.objective == sorted(model.objective)
    assert adjusted_rand_score(data.labels, cells.responsibilities.argmax(1).numpy()) == 1


@pytest.fixture(scope="module")
def settings(own):
    """Of runs with a folder of one's own for conf/model."""
    sizes = ("data.n_cells=60", "data.n_genes=80", "data.n_components=2", "model.n_components=2")
    return f"hydra.searchpath=[file://{own[1]}]", "model=gradient", *sizes, NO_PICTURES


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """(checkpoint, metrics) of a run."""
    folder = tmp_path_factory.mktemp("run")
    metrics = run_here(folder, *settings, "trainer.max_epochs=4")
    return folder / "checkpoints" / "last.ckpt", metrics


def test_a_checkpoint_makes_it_again(finished, own):
    checkpoint = load_checkpoint(finished[0])
    module = restore(checkpoint)
    assert type(module) is own[0].GradientMixture
    assert module.plain == checkpoint.settings == {"n_components": 2, "lr": 1e-2}
    for name, value in module.state_dict().items():
        assert torch.equal(value, checkpoint.state[name]), name


def test_a_checkpoint_predicts(finished, settings, tmp_path):
    last, metrics = finished
    again = run_here(tmp_path, *settings, "task=predict", f"ckpt_path={last}")
    assert metrics["model"] == again["model"] == "gradient"
    assert again["log_likelihood"] == pytest.approx(metrics["log_likelihood"], rel=1e-6)


def test_a_fit_goes_on(finished, settings, tmp_path):
    run_here(tmp_path, *settings, "trainer.max_epochs=2")
    rest = run_here(tmp_path, *settings, "trainer.max_epochs=4", "ckpt_path=last")
    assert {**rest, "seconds": 0} == {**finished[1], "seconds": 0}

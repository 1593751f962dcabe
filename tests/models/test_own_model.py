"""A model of one's own by the contract of ``nbmix.models.base``: its class, its settings, its runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from nbmix.core.settings import MixtureSettings
from nbmix.data.checkpoint import load_checkpoint
from nbmix.models.minibatch import ElboTerms, MinibatchModule
from nbmix.models.restore import restore
from tests.helpers.running import fit, run_here, small_data


class GradientMixture(MinibatchModule):
    """Adam on the log likelihood itself: q is the exact posterior, where the ELBO equals ln p(x)."""

    kind = "gradient"
    free_to_change = frozenset({"lr"})

    def __init__(self, gene_names: np.ndarray, *, n_components: int, lr: float = 1e-2) -> None:
        settings = MixtureSettings(n_components, folds=1)
        super().__init__(gene_names, settings, {"n_components": n_components, "lr": lr})
        self.lr = lr

    def parameter_groups(self):
        return [{"params": list(self.parameters()), "lr": self.lr}]

    def terms(self, batch):
        log_likelihood, log_prior = self.log_likelihood(batch), self.log_prior(batch)
        log_q = torch.log_softmax(log_likelihood + log_prior, 1)
        return ElboTerms(log_q, log_likelihood, log_prior)

    @torch.no_grad()
    def predict_step(self, batch, batch_idx):
        return self.terms(batch).prediction(batch.rows)


CONFIG = """\
# @package _global_
defaults:
  - override /start: kmeans

model:
  _target_: tests.models.test_own_model.GradientMixture
  n_components: 4
  lr: 1.0e-2

data:
  batch_size: 20
"""


def test_it_climbs_the_log_likelihood_and_finds_the_groups():
    data = small_data(n_cells=120)
    model = GradientMixture(data.gene_names, n_components=2)
    _, cells = fit(model, data, epochs=5, batch_size=20)
    torch.testing.assert_close(cells.elbo, cells.log_likelihood, rtol=1e-12, atol=0)
    assert model.objective == sorted(model.objective)
    assert adjusted_rand_score(data.labels, cells.responsibilities.argmax(1).numpy()) == 1


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Of runs with a folder of one's own for conf/model."""
    conf = tmp_path_factory.mktemp("conf")
    (conf / "model").mkdir()
    (conf / "model" / "gradient.yaml").write_text(CONFIG)
    sizes = ("data.n_cells=60", "data.n_genes=80", "data.n_components=2", "model.n_components=2")
    return f"hydra.searchpath=[file://{conf}]", "model=gradient", *sizes, "evaluation.max_umap_cells=0"


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory, no_figures):
    """(checkpoint, metrics) of a run."""
    folder = tmp_path_factory.mktemp("run")
    metrics = run_here(folder, *settings, "trainer.max_epochs=4")
    return folder / "checkpoints" / "last.ckpt", metrics


def test_a_checkpoint_makes_it_again(finished):
    checkpoint = load_checkpoint(finished[0])
    module = restore(checkpoint)
    assert type(module) is GradientMixture
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

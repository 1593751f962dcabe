"""What models share that learn by minibatches: terms, prior, an epoch's numbers, the range of parameters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from nbmix.core.parameters import LOG_INV_DISP_RANGE
from nbmix.models.amortized import AmortizedMixture
from nbmix.models.minibatch import ElboTerms, prior_where_empty
from nbmix.models.vaec import VAEC
from tests.helpers.running import fit, small_data

MODELS = pytest.mark.parametrize("kind", [AmortizedMixture, VAEC], ids=lambda kind: kind.kind)


def model_for(kind, data, **settings):
    torch.manual_seed(0)
    first = "encoder_epochs" if issubclass(kind, AmortizedMixture) else "start_epochs"
    return kind(data.gene_names, **({"n_components": 2, "n_hidden": 8, first: 0} | settings))


def test_elbo_is_the_sum_of_its_parts_and_tight_at_the_posterior(generator):
    log_likelihood, log_prior, log_q = (
        torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    log_prior, log_q = (torch.log_softmax(t, 1) for t in (log_prior, log_q))
    terms = ElboTerms(log_q, log_likelihood, log_prior)
    torch.testing.assert_close(sum(terms.parts().values()), terms.elbo)
    said = terms.prediction(torch.arange(5))
    torch.testing.assert_close(said.log_likelihood, (log_likelihood + log_prior).logsumexp(1))
    assert (said.elbo < said.log_likelihood).all()
    torch.testing.assert_close(said.responsibilities, log_q.exp())
    tight = terms._replace(log_q=torch.log_softmax(terms.log_joint, 1))
    torch.testing.assert_close(tight.elbo, said.log_likelihood)


def test_a_cell_without_counts_gets_the_prior(problem):
    log_q = torch.zeros(40, 3, dtype=torch.float64, requires_grad=True)
    log_prior = torch.full((40, 3), -1.0, dtype=torch.float64)
    found = prior_where_empty(log_q, log_prior, problem.batch)
    empty = problem.counts.getnnz(1) == 0
    assert empty.any()
    assert (found[torch.from_numpy(empty)] == -1).all()
    assert (found[torch.from_numpy(~empty)] == 0).all()


@pytest.mark.parametrize("weights", ["learned", "uniform", "given"])
def test_prior(weights):
    data = replace(small_data(), prior=np.tile([1.0, 0.0], (60, 1)))
    model = model_for(AmortizedMixture, data, weights=weights)
    module, _ = fit(model, data, epochs=1, batch_size=20)
    batch = next(iter(module.predict_dataloader()))
    log_prior = model.log_prior(batch)
    assert log_prior.shape == (batch.n_cells, 2)
    assert torch.isfinite(log_prior).all()
    torch.testing.assert_close(log_prior.exp().sum(1), torch.ones(batch.n_cells, dtype=torch.float64))
    if weights == "given":
        assert (log_prior[:, 0] == 0).all()


class EpochEnds(pl.Callback):
    """The numbers that callbacks find when validation and the epoch end."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, module):
        self.seen.append(len(module.objective))

    def on_train_epoch_end(self, trainer, module):
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@MODELS
def test_an_epoch_s_numbers_are_means_over_its_cells_and_there_for_every_callback(kind):
    data, ends, elbos = small_data(), EpochEnds(), []

    class Watched(kind):
        def loss(self, terms, batch):
            elbos.extend(terms.elbo.detach().tolist())
            return super().loss(terms, batch)

    model = model_for(Watched, data)
    fit(model, data, epochs=2, callbacks=[ends], batch_size=20)
    assert len(elbos) == 2 * 54  # in batches of 20, 20 and 14
    expected = [np.mean(elbos[:54]), np.mean(elbos[54:])]
    np.testing.assert_allclose(model.objective, expected, rtol=1e-12)
    assert ends.seen[::2] == [1, 2]
    for epoch, (logged, elbo) in enumerate(zip(ends.seen[1::2], expected, strict=True), 1):
        assert logged["iteration"] == epoch
        assert logged["objective"] == logged["elbo"] == pytest.approx(elbo, rel=1e-6)


class AfterSteps(pl.Callback):
    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *_):
        self.states.append({name: value.clone() for name, value in module.state_dict().items()})


@MODELS
def test_parameters_are_in_their_range_after_every_step(kind):
    data, steps = small_data(), AfterSteps()
    rates = {"components_lr": 30.0} if kind is AmortizedMixture else {"lr": 3.0}
    fit(model_for(kind, data, **rates), data, epochs=1, callbacks=[steps], batch_size=20)
    assert len(steps.states) == 3
    name = "mixture.log_inv_disp" if kind is AmortizedMixture else "decoder.log_inv_disp"
    low, high = LOG_INV_DISP_RANGE
    for state in steps.states:
        assert float(state["mixture.log_weights"].exp().sum()) == pytest.approx(1, abs=1e-12)
        assert (state[name] >= low).all() and (state[name] <= high).all()
    assert ((state[name] == low) | (state[name] == high)).any()  # it had something to do


class Losses(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def test_a_cell_counts_as_much_in_a_batch_of_few():
    """Of an origin with few cells, whose batches are small."""
    origins = (np.arange(60) % 10 == 0).astype(np.int64)
    data, losses = replace(small_data(), origins=origins, origin_names=("a", "b")), Losses()
    model = model_for(AmortizedMixture, data)
    fit(model, data, epochs=1, callbacks=[losses], batch_size=20)
    n_training = 54
    average = n_training / len(losses.losses)
    assert sum(losses.losses) * average == pytest.approx(-model.objective[0] * n_training, rel=1e-6)

"""The ELBO, its bound, and what training may and may not move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.metrics import adjusted_rand_score

from nbmix.core.likelihood import component_log_likelihood
from nbmix.core.nodes import NODE_TOLERANCE
from nbmix.core.parameters import Components
from nbmix.errors import InputError
from nbmix.models.amortized import AmortizedMixture, phases
from nbmix.starts.base import StartState
from nbmix.starts.clusters import LabelsStart
from tests.helpers.origins import BatchedCells
from tests.helpers.running import fit, small_data


def model_for(data, **settings):
    torch.manual_seed(0)
    return AmortizedMixture(data.gene_names, **({"n_components": 2, "n_hidden": 16} | settings))


class Exact(torch.nn.Module):
    """An encoder that knows the posterior; reads the batch that ``terms`` was given."""

    def __init__(self, model, batch):
        super().__init__()
        # a probability that underflows to 0 would make its q ln q a NaN
        self.log_q = model.mixture.posterior(batch).responsibilities.log().clamp(min=-700)

    def forward(self, batch, levels):
        return self.log_q


@pytest.mark.parametrize("weights", ["learned", "uniform"])
def test_elbo_is_a_bound_that_the_exact_posterior_reaches(weights):
    data = small_data()
    begin = {"encoder_epochs": 0, "encoder_start": "random"}
    model = model_for(data, weights=weights, dtype="float64", **begin)
    module, cells = fit(model, data, epochs=2, batch_size=20)
    assert (cells.elbo < cells.log_likelihood).all()
    for batch in module.predict_dataloader():
        model.encoder = Exact(model, batch)
        with torch.no_grad():
            terms = model.terms(batch)
            exact = model.mixture.posterior(batch).log_likelihood
        # one interpolates once between nodes, the other twice
        torch.testing.assert_close(terms.elbo, exact, rtol=NODE_TOLERANCE, atol=0)
        torch.testing.assert_close(sum(terms.parts().values()), terms.elbo, rtol=1e-10, atol=0)


def test_prediction_is_what_the_encoder_says():
    data = small_data()
    model = model_for(data)
    module, cells = fit(model, data, epochs=2, batch_size=20)
    for batch in module.predict_dataloader():
        with torch.no_grad():
            assert torch.equal(
                cells.responsibilities[batch.rows], model.encoder(batch, module.basis.levels).double().exp()
            )
        exact = model.mixture.posterior(batch).log_likelihood
        torch.testing.assert_close(cells.log_likelihood[batch.rows], exact, rtol=1e-6, atol=0)


class AtStart(pl.Callback):
    """The mixture's parameters as the fit finds them."""

    def on_train_start(self, trainer, module):
        self.state = {name: value.clone() for name, value in module.mixture.state_dict().items()}


def test_encoder_learns_the_posterior_first_and_components_wait():
    data = small_data()
    for epochs, waits in ((3, True), (5, False)):
        model, start = model_for(data, encoder_epochs=3), AtStart()
        fit(model, data, epochs=epochs, callbacks=[start], batch_size=20)
        assert torch.equal(model.mixture.log_mean, start.state["log_mean"]) == waits


@pytest.mark.parametrize(
    "elbo, ended",
    [
        ([], (3, False)),
        ([-9, -8, -7], (3, False)),
        ([-9, -8, -7.9], (3, False)),  # as many as there may be
        ([-9, -8.9], (2, False)),  # gains no more by itself
        ([-9, -8.9, -8], (2, False)),
        ([-9, -8.9, -8, -7.99], (2, True)),
        ([-9, -8, -7, -7.1], (3, True)),
    ],
)
def test_held_out_cells_end_both_parts_of_a_fit(elbo, ended):
    assert phases(elbo, encoder_epochs=3, tolerance=0.05, patience=1) == ended


def test_a_fit_of_many_cells_ends_where_held_out_cells_gain_no_more():
    data = small_data(n_cells=36_500, n_genes=8)
    model = model_for(data)
    start = AtStart()
    fit(model, data, epochs=20, start=LabelsStart(), callbacks=[start], batch_size="auto")
    assert len(model.held_out_elbo) == model.n_iterations < 12  # epochs, two of which are a pass
    assert not torch.equal(model.mixture.log_mean, start.state["log_mean"])


@pytest.mark.parametrize("n_components", [2, 3, 7])
def test_frozen_components_stay_bit_identical(n_components):
    data = small_data()
    model = model_for(data, n_components=n_components, train_components=False, encoder_epochs=1)
    start = AtStart()
    fit(model, data, epochs=4, callbacks=[start], batch_size=20)
    for name, value in model.mixture.state_dict().items():
        assert torch.equal(value, start.state[name]), name


def test_uniform_weights_stay_uniform():
    data = small_data()
    model = model_for(data, weights="uniform", encoder_epochs=0)
    fit(model, data, epochs=3, batch_size=20)
    uniform = torch.full((2,), -np.log(2.0), dtype=torch.float64)
    torch.testing.assert_close(model.mixture.log_weights[0], uniform, rtol=1e-12, atol=0)


def test_labels_play_no_part():
    data = small_data()
    fits = []
    for labels in (data.labels, data.labels[::-1], None):
        model = model_for(data, encoder_epochs=1)
        fits.append((model, fit(model, replace(data, labels=labels), epochs=3, batch_size=20)[1]))
    (first, cells), *others = fits
    for model, other in others:
        assert model.objective == first.objective
        assert torch.equal(model.mixture.log_mean, first.mixture.log_mean)
        assert torch.equal(other.responsibilities, cells.responsibilities)


def test_finds_the_groups_of_a_simulation():
    data = small_data(n_cells=120)
    model = model_for(data)
    _, cells = fit(model, data, epochs=10, batch_size=20)
    assert adjusted_rand_score(data.labels, cells.responsibilities.argmax(1).numpy()) == 1
    assert len(model.objective) == model.n_iterations == 10


def test_one_component():
    data = small_data()
    _, cells = fit(model_for(data, n_components=1), data, epochs=2)
    torch.testing.assert_close(cells.elbo, cells.log_likelihood, rtol=1e-12, atol=0)


def test_a_given_prior_of_zero_is_survived():
    data = replace(small_data(), prior=np.tile([1.0, 0.0], (60, 1)))
    model = model_for(data, weights="given")
    _, cells = fit(model, data, epochs=2, batch_size=20)
    assert torch.isfinite(cells.elbo).all()


def test_empty_cells_and_a_component_without_cells():
    data = small_data()
    empty = data.counts.toarray()
    empty[:3] = 0
    changed = replace(
        data,
        counts=type(data.counts)(empty),
        size_factors=np.r_[np.zeros(3), data.size_factors[3:]],
        labels=np.array(["a", "b"] + ["a"] * 58),
    )
    model = model_for(changed)
    _, cells = fit(model, changed, epochs=2, start=LabelsStart(), batch_size=1, validation_share=0.0)
    assert torch.isfinite(cells.elbo).all()
    assert cells.log_likelihood[:3].abs().max() < 1e-12  # an empty cell is certain


@pytest.mark.parametrize("name, value", [("n_hidden", 0), ("encoder_epochs", -1), ("lr", 0.0)])
def test_bad_settings(name, value):
    with pytest.raises(InputError, match=rf"model\.{name}="):
        model_for(small_data(), **{name: value})


# Cells of several origins

BATCHED = BatchedCells(n=300, p=60, k=2, g=3, spread=0.7)


@pytest.fixture(scope="module")
def of_origins():
    """(model, data module, predictions) of a fit to them, begun at the kinds."""
    # an encoder that begins near the posterior of kinds so far apart need not learn of origins
    begin = {"encoder_epochs": 3, "encoder_start": "random"}
    model = model_for(BATCHED.data, dtype="float64", lr=1e-2, **begin)
    return model, *fit(model, BATCHED.data, epochs=8, start=LabelsStart(), batch_size=20)


def test_components_are_moved_by_the_offsets_of_the_origin(of_origins):
    model, module, _ = of_origins
    offsets = model.mixture.origins.offsets[0]
    assert offsets.abs().mean() > 0.2
    met = set()
    for batch in module.predict_dataloader():
        expected = component_log_likelihood(
            BATCHED.counts[batch.rows.numpy()],
            batch.size_factors,
            model.mixture.log_mean.data[0] + offsets[batch.origin],
            model.mixture.log_inv_disp.data[0],
        )
        with torch.no_grad():
            torch.testing.assert_close(model.terms(batch).log_likelihood, expected, rtol=1e-7, atol=0)
        met.add(batch.origin)
    assert met == {0, 1, 2}


def test_kinds_and_offsets_are_those_that_cells_were_drawn_by(of_origins):
    model, _, cells = of_origins
    assert adjusted_rand_score(BATCHED.kinds, cells.responsibilities.argmax(1).numpy()) > 0.97
    found, drawn = model.mixture.origins.offsets[0].numpy().ravel(), BATCHED.offsets.ravel()
    assert np.corrcoef(found, drawn)[0, 1] > 0.95
    assert (cells.log_likelihood - cells.elbo).mean() < 0.5  # the encoder has learned them, too
    n_training = np.bincount(BATCHED.origins[of_origins[1].training_rows])
    assert np.abs(n_training @ model.mixture.origins.offsets[0].numpy()).max() < 1e-8


def test_the_encoder_is_told_the_origin(of_origins):
    """Of another origin it would say something else of the same counts."""
    model, module, _ = of_origins
    with torch.no_grad():
        for batch in module.predict_dataloader():
            other = replace(batch, origins=(batch.origins + 1) % 3)
            assert not torch.allclose(model.log_q(batch), model.log_q(other), atol=0.1)


def test_cells_of_an_unknown_origin_get_the_exact_posterior(of_origins):
    model, module, _ = of_origins
    batch = replace(next(iter(module.predict_dataloader())), origins=None)
    said, exact = model.predict_step(batch, 0), model.mixture.posterior(batch)
    torch.testing.assert_close(said.responsibilities, exact.responsibilities, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(said.elbo, said.log_likelihood)


def test_names_that_say_nothing_change_next_to_nothing():
    data = small_data(n_cells=120)
    names = np.random.default_rng(0).integers(2, size=120)
    found = []
    for more in ({}, {"origins": names, "origin_names": ("a", "b")}):
        model = model_for(data, encoder_epochs=2, dtype="float64", lr=1e-2)
        _, cells = fit(model, replace(data, **more), epochs=6, batch_size=20)
        assert adjusted_rand_score(data.labels, cells.responsibilities.argmax(1).numpy()) == 1
        found.append(float(cells.log_likelihood.mean()))
    assert found[1] == pytest.approx(found[0], abs=0.2)


def test_offsets_are_found_where_the_start_has_none():
    """While the encoder alone learns, and components wait."""
    kinds = np.unique(BATCHED.data.labels, return_inverse=True)[1]
    counts, sizes = BATCHED.counts.toarray(), BATCHED.s

    def start(data, settings, generator):
        mean = np.stack([counts[kinds == k].sum(0) / sizes[kinds == k].sum() for k in range(2)])
        log_mean = torch.from_numpy(np.log(mean + 1e-4))
        return StartState(components=Components(log_mean, torch.ones_like(log_mean)))

    model = model_for(BATCHED.data, encoder_epochs=5)
    fit(model, BATCHED.data, epochs=5, start=start, batch_size=100)
    found = model.mixture.origins.offsets[0].numpy().ravel()
    assert np.corrcoef(found, BATCHED.offsets.ravel())[0, 1] > 0.9


def test_frozen_components_have_frozen_offsets():
    model, start = model_for(BATCHED.data, train_components=False, encoder_epochs=1), AtStart()
    fit(model, BATCHED.data, epochs=2, start=LabelsStart(), callbacks=[start], batch_size=100)
    for name, value in model.mixture.state_dict().items():
        assert torch.equal(value, start.state[name]), name
    assert model.mixture.origins.offsets.any()

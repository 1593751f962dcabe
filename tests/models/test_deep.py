"""What the two deep models share, against textbook forms, and what both do in a run."""

from __future__ import annotations

import json
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import pytorch_lightning as pl
import scipy.sparse as sp
import torch
from sklearn.metrics import adjusted_rand_score

from nbmix.core.batch import CellBatch
from nbmix.core.settings import MixtureSettings
from nbmix.data.checkpoint import load_checkpoint, write_checkpoint
from nbmix.errors import InputError
from nbmix.models.deep import SUMMARY_DRAWS
from nbmix.models.gmvae import GMVAE
from nbmix.models.restore import restore
from nbmix.models.vaec import VAEC
from nbmix.starts.clusters import LabelsStart
from nbmix.starts.given import CheckpointStart
from tests.helpers.origins import BatchedCells
from tests.helpers.problems import make_problem, reference_log_likelihood
from tests.helpers.running import NO_PICTURES, TINY, fit, run_here, small_data

BOTH = pytest.mark.parametrize("kind", [VAEC, GMVAE], ids=["vaec", "gmvae"])
SMALL = {"n_components": 2, "n_latent": 3, "n_hidden": 16, "n_draws": 2}


def model_for(kind, data, **settings):
    torch.manual_seed(0)
    return kind(data.gene_names, **(SMALL | settings))


def ready(kind, problem, **settings):
    """A float64 model that has met the problem's batch, with weights that do something."""
    torch.manual_seed(0)
    genes = np.array([f"g{j}" for j in range(problem.counts.shape[1])])
    model = kind(genes, **(SMALL | settings)).double()
    model.mixture.attach(problem.basis, 1.0)
    with torch.no_grad():
        model.decoder.out.weight.normal_()
        model.decoder.log_inv_disp.copy_(torch.linspace(-2, 4, len(genes)))
        model.decoder.log_unit.fill_(0.3)
    return model


@pytest.mark.parametrize("cells_at_once", [7, 1000])
def test_likelihood_is_the_negative_binomial_of_every_gene(problem, cells_at_once):
    model = ready(GMVAE, problem)
    z = torch.randn(problem.counts.shape[0], 3, dtype=torch.float64)
    log_size = torch.log(problem.batch.size_factors)
    with torch.no_grad():
        shared, cells = model.shared_log_likelihood(problem.batch, log_size)
        found = shared + model.decoder.log_likelihood(z, log_size, cells, cells_at_once)
        log_mean = model.decoder.log_mean(z)
    assert log_mean.exp().sum(1).numpy() == pytest.approx(np.exp(0.3))
    expected = [
        reference_log_likelihood(x[None], [s], mean[None], model.log_inv_disp.detach()[None])[0, 0]
        for x, s, mean in zip(problem.counts.toarray(), problem.size_factors, log_mean.numpy(), strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_size_factor_that_is_not_the_data_s(problem):
    model = ready(GMVAE, problem)
    other = np.where(np.arange(problem.counts.shape[0]) % 2, 3.0, 0.5) * problem.size_factors
    theirs = CellBatch.build(problem.counts, other, problem.basis)
    with torch.no_grad():
        mine, _ = model.shared_log_likelihood(problem.batch, torch.from_numpy(np.log(other)))
        expected, _ = model.shared_log_likelihood(theirs, torch.log(theirs.size_factors))
    torch.testing.assert_close(mine, expected)


@BOTH
def test_genes_that_the_data_lacks_take_no_part(kind, problem):
    """What is left of the likelihood is that of the other genes, at the means that they had."""
    model = ready(kind, problem)
    kept = np.r_[3:20]
    z = torch.randn(problem.counts.shape[0], 3, dtype=torch.float64)
    with torch.no_grad():
        log_mean, log_inv_disp = model.decoder.log_mean(z)[:, kept], model.log_inv_disp[kept].clone()
        model.restrict_genes(kept)
        assert torch.equal(model.decoder.log_mean(z), log_mean)
        few = make_problem()._replace(counts=problem.counts[:, kept].tocsr())
        model.mixture.attach(few.basis, 1.0)
        levels = type(few.basis.levels).of(few.counts)
        basis = few.basis._replace(levels=levels)
        model.mixture.attach(basis, 1.0)
        batch = CellBatch.build(few.counts, few.size_factors, basis)
        log_size = torch.log(batch.size_factors)
        shared, cells = model.shared_log_likelihood(batch, log_size)
        found = shared + model.decoder.log_likelihood(z, log_size, cells)
    expected = [
        reference_log_likelihood(x[None], [s], mean[None], log_inv_disp[None])[0, 0]
        for x, s, mean in zip(few.counts.toarray(), few.size_factors, log_mean.numpy(), strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@BOTH
def test_components_have_the_mean_and_variance_of_the_rates(kind, problem):
    model = ready(kind, problem)
    with torch.no_grad():
        model.decoder.out.weight.mul_(0.3)
    described = model.describe()
    torch.manual_seed(1)
    with torch.no_grad():
        for k, z in enumerate(model.sample_prior(20000, torch.Generator().manual_seed(1))):
            shape = model.log_inv_disp.exp()
            mean = model.decoder.log_mean(z).exp()
            rate = torch.distributions.Gamma(shape, shape / mean).sample()
            error = (mean.var(0) / SUMMARY_DRAWS + rate.var(0) / len(z)).sqrt()
            assert ((rate.mean(0) - described.log_mean[k].exp()).abs() < 4.5 * error).all()
            spread = (described.log_mean[k] * 2 - described.log_inv_disp[k]).exp()
            # a variance of heavy-tailed rates is known to some tenths
            assert torch.allclose(spread, rate.var(0), rtol=0.5)


@BOTH
def test_what_is_said_of_a_cell_does_not_depend_on_the_others(kind, problem):
    model = ready(kind, problem)
    every = model.predict(problem.batch, 3)
    two = CellBatch.build(problem.counts, problem.size_factors, problem.basis, pick=np.array([5, 9]))
    for name, value in model.predict(two, 3)._asdict().items():
        torch.testing.assert_close(value, getattr(every, name)[[5, 9]], equal_nan=True)


@BOTH
def test_log_likelihood_is_never_below_the_elbo(kind, problem):
    model = ready(kind, problem)
    for n_draws in (1, 5):
        found = model.predict(problem.batch, n_draws)
        assert (found.elbo <= found.log_likelihood + 1e-9).all()
    generator = torch.Generator().manual_seed(0)
    weights = [model.draw(problem.batch, generator, common=True).log_importance for _ in range(5)]
    expected = torch.cat(weights, 1).logsumexp(1) - np.log(5)
    torch.testing.assert_close(found.log_likelihood, expected)
    torch.testing.assert_close(found.responsibilities.sum(1), torch.ones(40, dtype=torch.float64))


@BOTH
def test_labels_play_no_part(kind):
    data = small_data()
    fits = []
    for labels in (data.labels, data.labels[::-1], None):
        model = model_for(kind, data, start_epochs=1)
        fits.append((model, fit(model, replace(data, labels=labels), epochs=3, batch_size=20)[1]))
    (first, cells), *others = fits
    for model, other in others:
        assert model.objective == first.objective
        for name, value in first.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        assert torch.equal(other.responsibilities, cells.responsibilities)


@BOTH
def test_finds_the_groups_of_a_simulation(kind):
    data = small_data(n_cells=120)
    model = model_for(kind, data, start_epochs=5, lr=5e-3)
    _, cells = fit(model, data, epochs=8, batch_size=20)
    assert adjusted_rand_score(data.labels, cells.responsibilities.argmax(1).numpy()) == 1
    assert len(model.objective) == model.n_iterations == 8
    assert model.objective[-1] > model.objective[0]


@BOTH
@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_components_come_in_the_order_of_the_start(kind, names):
    data = small_data()
    first = data.labels == data.labels[0]
    seen = replace(data, labels=np.where(first, *names))
    model = model_for(kind, seen, start_epochs=5, lr=5e-3)
    _, cells = fit(model, seen, epochs=8, start=LabelsStart(), batch_size=20)
    assert cells.responsibilities.argmax(1).tolist() == (seen.labels == "b").tolist()


@BOTH
def test_uniform_weights_stay_uniform_and_learned_ones_do_not(kind):
    data = small_data(n_cells=40)
    uniform = torch.full((2,), -np.log(2.0), dtype=torch.float64)
    for weights, same in (("uniform", True), ("learned", False)):
        model = model_for(kind, data, weights=weights)
        fit(model, data, epochs=2, batch_size=20)
        found = model.mixture.log_weights[0].detach()
        assert torch.allclose(found, uniform, rtol=1e-12, atol=0) == same
        assert float(found.exp().sum()) == pytest.approx(1, abs=1e-12)


@BOTH
@pytest.mark.parametrize("n_components", [1, 3])
def test_empty_cells_and_a_given_prior(kind, n_components):
    data = small_data()
    counts = data.counts.toarray()
    counts[:3] = 0
    prior = np.random.default_rng(0).dirichlet(np.ones(n_components), 60)
    prior[10:, 0] = 1.0
    prior[10:, 1:] = 0.0
    changed = replace(
        data,
        counts=sp.csr_matrix(counts),
        size_factors=np.r_[np.zeros(3), data.size_factors[3:]],
        prior=prior,
    )
    model = model_for(kind, changed, weights="given", n_components=n_components)
    _, cells = fit(model, changed, epochs=2, batch_size=7)
    assert torch.isfinite(cells.elbo).all()
    np.testing.assert_allclose(cells.responsibilities[:3], prior[:3], rtol=1e-12)
    assert all(torch.isfinite(p).all() for p in model.parameters())


class SeenByValidation(pl.Callback):
    """Means of the mixture's components at the beginning of the fit, and at every validation."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, module):
        self.start = module.mixture.log_mean.detach().clone()

    def on_validation_end(self, trainer, module):
        self.seen.append(module.mixture.log_mean.detach().clone())


@BOTH
def test_teaching_does_not_end_at_what_the_mixture_describes(kind):
    """While the start is taught its components stay; afterwards they are those of the model."""
    data = small_data()
    model, means = model_for(kind, data, start_epochs=3), SeenByValidation()
    fit(model, data, epochs=5, callbacks=[means], batch_size=20)
    assert [torch.equal(seen, means.start) for seen in means.seen] == [True, True, True, False, False]
    torch.testing.assert_close(model.mixture.log_mean.data[0], model.describe().log_mean)


@BOTH
def test_a_batch_without_cells_still_depends_on_every_parameter(kind, problem):
    """As data-parallel training wants."""
    model = ready(kind, problem)
    none = CellBatch.build(problem.counts, problem.size_factors, problem.basis, pick=np.array([], np.int64))
    model.draw(none, torch.Generator()).elbo.sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or p.grad.any()] == []


@BOTH
@pytest.mark.parametrize(
    "name, value",
    [
        ("n_latent", 0),
        ("n_hidden", 0),
        ("n_draws", 0),
        ("start_epochs", -1),
        ("kl_epochs", -1),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("weight_precision", -1.0),
        ("weights", "other"),
        ("n_components", 0),
    ],
)
def test_bad_settings(kind, name, value):
    with pytest.raises(InputError, match=rf"model\.{name}="):
        model_for(kind, small_data(), **{name: value})


# Cells of several origins

BATCHED = BatchedCells(n=240, p=60, k=2, g=2, spread=0.7)


def told(kind, problem):
    """A model that has been told of two origins, between which it makes a difference."""
    model = ready(kind, problem)
    model.know_origins(("a", "b"))
    model.double()
    for layer in (model.trunk.of_origin, model.decoder.of_origin):
        torch.nn.init.normal_(layer.weight)
    model.decoder.offsets.normal_()
    return model


def test_likelihood_in_an_origin_is_that_of_the_means_there(problem):
    of_second = torch.ones(problem.batch.n_cells, dtype=torch.int64)
    model, batch = told(GMVAE, problem), replace(problem.batch, origins=of_second)
    z, log_size = torch.randn(40, 3, dtype=torch.float64), torch.log(batch.size_factors)
    with torch.no_grad():
        shared, cells = model.shared_log_likelihood(batch, log_size)
        found = shared + model.decoder.log_likelihood(z, log_size, cells, 7)
        log_mean = model.decoder.log_mean(z, 1)
        assert not torch.allclose(log_mean, model.decoder.log_mean(z, 0))
    expected = [
        reference_log_likelihood(x[None], [s], mean[None], model.log_inv_disp.detach()[None])[0, 0]
        for x, s, mean in zip(problem.counts.toarray(), problem.size_factors, log_mean.numpy(), strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@BOTH
def test_the_mixture_describes_origins_by_offsets(kind, problem):
    model = told(kind, problem)
    with torch.no_grad():
        model.decoder.out.weight.mul_(0.1)
        model.mixture.log_weights.copy_(torch.tensor([[0.3, 0.7]]).log())
    model.describe_in_mixture()
    offsets, weights = model.mixture.origins.offsets[0], torch.tensor([0.3, 0.7], dtype=torch.float64)
    torch.testing.assert_close(offsets.sum(0), torch.zeros(len(offsets[0]), dtype=torch.float64))
    for origin in range(2):
        seen = model.describe(origin, SUMMARY_DRAWS // 2).log_mean
        described = model.mixture.components_of(0, origin).log_mean
        torch.testing.assert_close(weights @ described, weights @ seen)


@BOTH
def test_kinds_of_several_origins(kind):
    model = model_for(kind, BATCHED.data, start_epochs=4, lr=1e-2)
    _, cells = fit(model, BATCHED.data, epochs=6, start=LabelsStart(), batch_size=40)
    assert adjusted_rand_score(BATCHED.kinds, cells.responsibilities.argmax(1).numpy()) > 0.95
    found, drawn = model.mixture.origins.offsets[0].numpy().ravel(), BATCHED.offsets.ravel()
    assert np.corrcoef(found, drawn)[0, 1] > 0.9


SHORT = (
    *TINY,
    "model.n_hidden=16",
    "model.n_latent=3",
    "model.n_draws=2",
    "model.start_epochs=2",
    "model.kl_epochs=2",
    "data.batch_size=20",
    "evaluation.max_umap_cells=0",
)


@pytest.fixture(scope="module", params=["vaec", "gmvae"])
def finished(request, tmp_path_factory):
    """(folder, metrics, model) of a finished run."""
    folder = tmp_path_factory.mktemp(request.param)
    metrics = run_here(folder, f"model={request.param}", *SHORT, "trainer.max_epochs=4")
    return folder, metrics, request.param


def test_run_folder(finished):
    folder, metrics, model = finished
    expected = {"metrics.json", "result.h5ad", "checkpoints", "figures", "csv"}
    assert expected <= {p.name for p in folder.iterdir()}
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["model"] == model
    assert metrics["elbo"] <= metrics["log_likelihood"] < 0
    assert np.isfinite(metrics["heldout_log_likelihood"])
    result = ad.read_h5ad(folder / "result.h5ad")
    np.testing.assert_allclose(result.obsm["X_nbmix"].sum(1), 1)
    assert np.isfinite(result.varm["nbmix_log_mean"]).all()


def test_a_checkpoint_predicts_what_the_fit_said(finished, tmp_path):
    folder, metrics, model = finished
    last = folder / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["nbmix"]["model"] == model
    again = run_here(tmp_path, f"model={model}", *SHORT, NO_PICTURES, "task=predict", f"ckpt_path={last}")
    assert again["n_genes_missing"] == 0
    assert again["elbo"] == pytest.approx(metrics["elbo"], rel=1e-6)
    assert again["log_likelihood"] == pytest.approx(metrics["log_likelihood"], rel=1e-6)
    mine, theirs = (ad.read_h5ad(f / "result.h5ad") for f in (folder, tmp_path))
    np.testing.assert_allclose(mine.obsm["X_nbmix"], theirs.obsm["X_nbmix"], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(mine.varm["nbmix_log_mean"], theirs.varm["nbmix_log_mean"], rtol=1e-6)


def test_new_cells_with_other_genes(finished, tmp_path):
    folder, _, model = finished
    source = ad.read_h5ad(folder / "result.h5ad")
    new = ad.AnnData(source.X[10:40, 5:], obs=source.obs[[]].iloc[10:40], var=source.var.iloc[5:])
    new.write_h5ad(tmp_path / "new.h5ad")
    metrics = run_here(
        tmp_path / "run",
        f"model={model}",
        "task=predict",
        f"ckpt_path={folder}/checkpoints/last.ckpt",
        "data=h5ad",
        f"data.path={tmp_path}/new.h5ad",
        "evaluation.max_umap_cells=0",
    )
    assert metrics["n_genes_missing"] == 5
    assert metrics["n_cells"] == 30
    assert metrics["elbo"] <= metrics["log_likelihood"] < 0


def test_components_of_a_deep_fit_start_another_model(finished):
    folder, _, _ = finished
    last = folder / "checkpoints" / "last.ckpt"
    data = small_data()
    state = CheckpointStart(str(last))(data, MixtureSettings(2), np.random.default_rng(0))
    result = ad.read_h5ad(folder / "result.h5ad")
    np.testing.assert_allclose(state.components.log_mean.T, result.varm["nbmix_log_mean"], rtol=1e-6)


def test_checkpoint_makes_the_same_module(finished):
    folder, _, kind = finished
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    module = restore(checkpoint)
    assert module.kind == kind
    assert module.plain == checkpoint.settings


@pytest.fixture(scope="module")
def part(finished, tmp_path_factory):
    """The checkpoint of the same run, stopped while it is still being taught."""
    folder = tmp_path_factory.mktemp("part")
    run_here(folder, f"model={finished[2]}", *SHORT, NO_PICTURES, "trainer.max_epochs=1")
    return folder / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("version", ["0.1.0", "now"])
def test_going_on_gives_what_one_run_gives(finished, part, version, tmp_path):
    folder, metrics, kind = finished
    settings, last = (f"model={kind}", *SHORT, NO_PICTURES), part
    if version == "0.1.0":  # which had one name for the progress of both models
        content = torch.load(part, weights_only=True)
        content["deep"] = content.pop(kind)
        write_checkpoint(content, last := tmp_path / "old.ckpt")
    rest = run_here(tmp_path / "rest", *settings, "trainer.max_epochs=4", f"ckpt_path={last}")
    assert {**rest, "seconds": 0} == {**metrics, "seconds": 0}
    mine, theirs = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (folder, tmp_path / "rest")
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)

"""The same numbers on a GPU as on the CPU."""

import anndata as ad
import numpy as np
import pytest
import torch

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.likelihood import component_log_likelihood
from nbmix.core.minibatch import log_count_product, minibatch_log_likelihood
from nbmix.core.mixture import Mixture
from nbmix.core.settings import MixtureSettings
from nbmix.core.tables import batch_log_likelihood, likelihood_tables
from nbmix.data.batches import CellBatches, CellsOnDevice
from nbmix.data.simulate import simulated_count_data
from nbmix.evaluation.doubt import misfits
from nbmix.starts.base import one_hot, prepare
from tests.helpers.problems import make_problem
from tests.helpers.running import NO_PICTURES, TINY, run_here

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]


@pytest.fixture(scope="module")
def data():
    return simulated_count_data(300, 200, 3, seed=4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 0.02)])
def test_component_log_likelihood_and_its_gradient(data, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    log_mean = -9 + torch.randn(3, data.n_genes, dtype=torch.float64, generator=generator)
    log_inv_disp = torch.randn(3, data.n_genes, dtype=torch.float64, generator=generator)
    found, slopes = [], []
    for device in ("cpu", "cuda"):
        parameters = [t.to(device).requires_grad_() for t in (log_mean, log_inv_disp)]
        value = component_log_likelihood(data.counts, data.size_factors, *parameters, dtype=dtype)
        found.append(value.detach().cpu())
        slopes.append([g.cpu() for g in torch.autograd.grad(value[:, 0].sum(), parameters)])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=tolerance)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-5, atol=tolerance)


def test_em_iterations(data):
    q = one_hot(np.unique(data.labels, return_inverse=True)[1], 3)
    objectives = []
    for device in ("cpu", "cuda"):
        basis, batches = prepare(data, 3, np.random.default_rng(0))
        settings = MixtureSettings(3, 3, dtype="float64")
        mixture = Mixture(data.n_genes, settings).to(device)
        mixture.attach(basis, float(data.size_factors.sum()))
        for iteration in range(3):
            mixture.reset_statistics()
            total = 0.0
            for batch in (b.to(device) for b in batches):
                responsibilities = q.to(device)[batch.rows]
                if iteration:
                    responsibilities, log_likelihood = mixture.posterior(batch)
                    total += float(log_likelihood.sum())
                mixture.collect(batch, responsibilities)
            mixture.m_step(warm=iteration > 0, whole=True)
        objectives.append(total)
    assert objectives[1] == pytest.approx(objectives[0], rel=1e-9)


def test_misfits(data):
    found = []
    for device in ("cpu", "cuda"):
        basis, batches = prepare(data, 1, np.random.default_rng(0))
        mixture = Mixture(data.n_genes, MixtureSettings(3, 1, dtype="float64")).to(device)
        mixture.attach(basis, float(data.size_factors.sum()))
        generator = torch.Generator().manual_seed(0)
        mixture.log_mean.data[:] = -9 + torch.randn(3, data.n_genes, generator=generator).to(mixture.log_mean)
        own = torch.zeros(data.n_cells, dtype=torch.float64)
        for batch in batches:
            own[batch.rows] = mixture.posterior(batch.to(device)).log_likelihood.cpu()
        found.append(misfits(mixture, batches, own, torch.full_like(own, torch.nan)))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_cells", [40, 1200])  # all values cut in two; a table of steps
def test_products_in_float32(n_cells):
    problem = make_problem(n_cells, 300, 4)
    components = problem.log_mean, problem.log_inv_disp
    exact = batch_log_likelihood(
        problem.batch, problem.basis, likelihood_tables(problem.basis, *components, torch.float64)
    )
    basis, batch = problem.basis.to("cuda"), problem.batch.to("cuda")
    tables = likelihood_tables(basis, *(t.to("cuda") for t in components), torch.float32)
    found = batch_log_likelihood(batch, basis, tables)
    torch.testing.assert_close(found.cpu(), exact, rtol=0, atol=0.01)


def test_batches_cut_on_the_gpu(data):
    basis = Basis.of(data.counts, data.size_factors)
    generator = torch.Generator().manual_seed(0)
    components = [torch.randn(3, data.n_genes, generator=generator, dtype=torch.float64) for _ in range(2)]
    rows = np.array([250, 3, 8, 100])
    found = [
        minibatch_log_likelihood(components[0].to(d) - 9, components[1].to(d), batch, basis.to(d))
        for d, batch in (
            ("cpu", CellBatches(data, basis)[rows]),
            ("cuda", CellsOnDevice(data, basis, "cuda")[rows]),
        )
    ]
    torch.testing.assert_close(found[1].cpu(), found[0], rtol=0, atol=1e-8)


def test_a_step_of_minibatches(data):
    basis = Basis.of(data.counts, data.size_factors)
    batch = CellBatch.build(data.counts, data.size_factors, basis, pick=np.arange(64))
    generator = torch.Generator().manual_seed(0)
    parameters = [
        -9 + torch.randn(3, data.n_genes, generator=generator, dtype=torch.float64),
        torch.randn(3, data.n_genes, generator=generator, dtype=torch.float64),
        torch.randn(data.n_genes, 16, generator=generator),
    ]
    found = []
    for device in ("cpu", "cuda"):
        a, b, first = (t.to(device).requires_grad_() for t in parameters)
        here, there = basis.to(device), batch.to(device)
        value = minibatch_log_likelihood(a, b, there, here, torch.float64)
        hidden = log_count_product(there, here.levels, first)
        slopes = torch.autograd.grad(value[:, 1].sum() + hidden.square().sum().double(), (a, b, first))
        found.append([t.detach().cpu() for t in (value, hidden, *slopes)])
    for of_cpu, of_gpu in zip(*found, strict=True):
        torch.testing.assert_close(of_gpu, of_cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["em", "amortized", "vaec", "gmvae"])
def test_train_and_predict(tmp_path, model):
    """The fit of the CPU; what it writes is read where there is no GPU."""
    settings = (*TINY, NO_PICTURES, f"model={model}", "trainer.max_epochs=6")
    metrics = [run_here(tmp_path / str(gpus), *settings, f"trainer.gpus={gpus}") for gpus in (0, 1)]
    for name in ("accuracy", "ari"):
        assert metrics[1][name] == metrics[0][name] == 1
    assert metrics[1]["log_likelihood"] == pytest.approx(metrics[0]["log_likelihood"], abs=0.1)
    again = ("task=predict", f"ckpt_path={tmp_path}/1/checkpoints/last.ckpt", "trainer.gpus=0")
    predicted = run_here(tmp_path / "again", *settings, *again)
    assert predicted["log_likelihood"] == pytest.approx(metrics[1]["log_likelihood"], abs=0.01)
    assigned = [ad.read_h5ad(tmp_path / f / "result.h5ad").obsm["X_nbmix"].argmax(1) for f in ("1", "again")]
    np.testing.assert_array_equal(*assigned)


def test_go_on(tmp_path):
    """A fit that goes on from a checkpoint ends as the one that was left alone, up to the order of sums."""
    settings = (*TINY, NO_PICTURES, "model.tolerance=1e-12", "model.dtype=float64", "trainer.gpus=1")
    whole = run_here(tmp_path / "whole", *settings, "trainer.max_epochs=6")
    run_here(tmp_path / "parts", *settings, "trainer.max_epochs=3")
    parts = run_here(tmp_path / "parts", *settings, "trainer.max_epochs=6", "ckpt_path=last")
    assert parts["log_likelihood"] == pytest.approx(whole["log_likelihood"], rel=1e-9)

"""The same numbers on a GPU as on the CPU."""

import numpy as np
import pytest
import torch

from nbmix.data.simulate import simulated_count_data
from nbmix.likelihood import component_log_likelihood
from nbmix.mixture import Mixture, MixtureSettings
from nbmix.start.base import one_hot, prepare

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
            mixture.begin()
            total = 0.0
            for batch in (b.to(device) for b in batches):
                responsibilities = q.to(device)[batch.rows]
                if iteration:
                    responsibilities, log_likelihood = mixture.posterior(batch)
                    total += float(log_likelihood.sum())
                mixture.collect(batch, responsibilities)
            mixture.m_step(warm=iteration > 0)
        objectives.append(total)
    assert objectives[1] == pytest.approx(objectives[0], rel=1e-9)

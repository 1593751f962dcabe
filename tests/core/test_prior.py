import numpy as np
import pytest
import scipy.sparse as sp
import torch

from nbmix.core.em_loop import run_em
from nbmix.core.expected_log_likelihood import Curvature, ExpectedLogLikelihood, curvature
from nbmix.core.m_step import NewtonMStep
from nbmix.core.parameters import Components, GenePrior
from nbmix.core.prior import dispersion_prior, first_prior, mean_variance, update_prior
from nbmix.core.settings import MixtureSettings
from nbmix.core.statistics import SufficientStatistics
from nbmix.data.counts import CountData
from nbmix.data.simulate import simulated_count_data
from nbmix.starts.base import new_mixture, one_hot, prepare
from tests.helpers.assigned import responsibilities_of


@pytest.fixture(scope="module")
def fitted():
    """Statistics of simulated cells at their labels, on the basis of the data."""
    data = simulated_count_data(200, 60, 3, seed=2)
    basis, batches = prepare(data, 1, np.random.default_rng(0))
    q = one_hot(np.unique(data.labels, return_inverse=True)[1], 3)
    statistics = SufficientStatistics.collect(batches[0], basis, q, torch.float64)
    return data, basis, statistics


def a_prior(n_genes: int) -> GenePrior:
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(3, n_genes, generator=generator, dtype=torch.float64)
    two = torch.tensor(2.0, dtype=torch.float64)
    return GenePrior(-9 + draw[0], 0.1 + draw[1], draw[2], two, torch.zeros(3))


@pytest.mark.parametrize("form", ["compiled", "in torch"])
def test_the_prior_adds_its_log_density_gradient_and_curvature(fitted, form):
    _, basis, statistics = fitted
    n_genes = statistics.rate.shape[0]
    prior = a_prior(n_genes)
    a = torch.linspace(-10, -7, 3 * n_genes, dtype=torch.float64).requires_grad_()
    b = torch.linspace(-1, 3, 3 * n_genes, dtype=torch.float64).requires_grad_()
    density = prior.log_density(Components(a.view(3, -1), b.view(3, -1)))
    grad_a, grad_b = torch.autograd.grad(density.sum(), (a, b))
    if form == "in torch":
        plain, with_prior = (
            ExpectedLogLikelihood.of(statistics, basis, given).curvature(a.detach(), b.detach())
            for given in (None, prior)
        )
    else:
        components = Components(a.detach().view(3, -1), b.detach().view(3, -1))
        plain, with_prior = (
            Curvature(*(t.flatten() for t in curvature(statistics, basis, components, given)))
            for given in (None, prior)
        )
    torch.testing.assert_close(with_prior.value - plain.value, density.detach().flatten())
    torch.testing.assert_close(with_prior.grad_a - plain.grad_a, grad_a)
    torch.testing.assert_close(with_prior.grad_b - plain.grad_b, grad_b)
    torch.testing.assert_close(
        with_prior.hess_aa - plain.hess_aa, -(1 / prior.log_mean_variance).repeat(3), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        with_prior.hess_bb - plain.hess_bb, torch.full_like(b, -0.5).detach(), rtol=1e-6, atol=1e-6
    )


def test_newton_ends_where_the_penalised_gradient_is_zero(fitted):
    data, basis, statistics = fitted
    prior = a_prior(statistics.rate.shape[0])
    begin = Components(prior.log_mean.repeat(3, 1), torch.ones(3, len(prior.log_mean), dtype=torch.float64))
    newton = NewtonMStep(tolerance=1e-12)
    found = newton(statistics, basis, begin, float(data.size_factors.sum()), prior).components
    problem = ExpectedLogLikelihood.of(statistics, basis, prior)
    slope = problem.curvature(found.log_mean.flatten(), found.log_inv_disp.flatten())
    assert slope.grad_a.abs().max() < 1e-4
    assert slope.grad_b.abs().max() < 1e-4


@pytest.mark.parametrize("true_variance", [0.04, 1.0])
def test_the_variance_between_components_is_recovered_from_noisy_offsets(true_variance):
    generator = torch.Generator().manual_seed(1)
    shape = (200, 30)  # components, genes
    information = 0.5 + 50 * torch.rand(shape, generator=generator, dtype=torch.float64)
    true = true_variance**0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    seen = true + torch.randn(shape, generator=generator, dtype=torch.float64) / information.sqrt()
    begin = torch.full((30,), 0.3, dtype=torch.float64)
    shrunken = seen / (1 + 1 / (begin * information))
    for _ in range(20):  # as over the iterations of EM
        variance = mean_variance(shrunken, information, begin)
        shrunken, begin = seen / (1 + 1 / (variance * information)), variance
    assert variance.log().mean().exp().item() == pytest.approx(true_variance, rel=0.1)


def test_the_variance_of_genes_that_say_little_settles_in_one_call():
    rng = np.random.default_rng(6)
    information = rng.uniform(0.2, 2, (8, 300))
    seen = rng.normal(0, 0.7, (8, 300)) + rng.normal(0, 1, (8, 300)) / np.sqrt(information)

    def em_steps(variance, n_steps):
        for _ in range(n_steps):
            weight = variance / (variance + 1 / information)
            total = (weight * (weight * seen**2 + 1 / information)).sum(0)
            variance = (total + np.exp(np.log(total / 8).mean())) / 9
        return variance

    begin = np.full(300, 1.0)
    shrunken = seen / (1 + 1 / (begin * information))
    found = mean_variance(*(torch.from_numpy(t) for t in (shrunken, information, begin))).numpy()
    wanted = em_steps(begin, 2000)
    left = np.abs(np.log([found / wanted, em_steps(begin, 10) / wanted])).mean(1)
    assert left[0] < min(0.02, left[1] / 5)


def test_what_a_component_does_not_say_of_the_variance_the_typical_gene_says():
    rng = np.random.default_rng(2)
    shrunken, information = rng.normal(0, 0.5, (3, 40)), rng.uniform(5, 50, (3, 40))
    begin = torch.full((40,), 0.3, dtype=torch.float64)

    def settled(votes):
        of_three = torch.from_numpy(shrunken), torch.from_numpy(information)
        found = begin
        for _ in range(50):
            seen = of_three[0] * (1 + 1 / (begin * of_three[1]))
            found = mean_variance(seen / (1 + 1 / (found * of_three[1])), of_three[1], found, votes)
        return found.numpy()

    def wanted(votes):
        variance = np.full(40, 0.3)
        seen = shrunken * (1 + 1 / (0.3 * information))
        for _ in range(5000):
            weight = variance / (variance + 1 / information)
            total = votes @ (weight * (weight * seen**2 + 1 / information))
            typical = np.exp(np.log(total / votes.sum()).mean())
            variance = (total + (4 - votes.sum()) * typical) / 4
        return variance

    votes = np.array([1.0, 0.6, 0.0])
    np.testing.assert_allclose(settled(torch.from_numpy(votes)), wanted(votes), rtol=1e-3)
    np.testing.assert_allclose(settled(torch.ones(3, dtype=torch.float64)), settled(None), rtol=1e-12)


@pytest.mark.parametrize("informed", [1.0, 0.3], ids=["all genes", "a third of the genes"])
def test_dispersions_of_genes_and_their_trend_are_recovered(informed):
    """From likelihoods of ln r that are normal ones, some of them flat."""
    rng = np.random.default_rng(4)
    log_mean = rng.uniform(-12, -6, 2000)
    b = 6 + 0.7 * log_mean + rng.normal(0, 0.5, 2000)
    true = b + rng.normal(0, 0.4, (4, 2000))
    information = rng.uniform(1, 50, (4, 2000)) * (rng.random(2000) < informed)
    seen = true + rng.normal(0, 1, (4, 2000)) / np.sqrt(np.maximum(information, 1))
    information, seen = torch.from_numpy(information), torch.from_numpy(seen)
    centre = torch.from_numpy(log_mean)
    one = torch.ones((), dtype=torch.float64)
    trend = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    prior = GenePrior(centre, torch.ones_like(centre), torch.ones_like(centre), one, trend)
    for _ in range(30):
        share = information / (information + 1 / prior.log_inv_disp_variance)
        fitted = prior.log_inv_disp + share * (seen - prior.log_inv_disp)
        disp, variance, trend = dispersion_prior(fitted, information, prior)
        prior = prior._replace(log_inv_disp=disp, log_inv_disp_variance=variance, trend=trend)
    assert prior.log_inv_disp_variance.item() == pytest.approx(0.4**2, rel=0.1)
    assert prior.trend.tolist() == pytest.approx([6, 0.7, 0.25], rel=0.1)
    known = information.sum(0) > 0
    assert (disp - torch.from_numpy(b))[known].square().mean().sqrt() < 0.25  # 0.4 / 2 from ln r alone
    torch.testing.assert_close(disp[~known], trend[0] + trend[1] * centre[~known], rtol=1e-3, atol=1e-3)


def test_genes_that_differ_nowhere_get_a_smaller_variance_than_genes_that_do():
    rng = np.random.default_rng(3)
    log_mean = np.tile(rng.uniform(-8, -6, 80), (2, 1))
    log_mean[1, :20] += rng.choice([-1.5, 1.5], 20)  # 20 of 80 genes tell the components apart
    label = np.arange(300) % 2
    counts = rng.poisson(1e4 * np.exp(log_mean[label]) * rng.gamma(5.0, 0.2, (300, 80)))
    data = CountData(
        sp.csr_matrix(counts.astype(np.float32)),
        np.full(300, 1e4),
        np.array([f"cell{i}" for i in range(300)]),
        np.array([f"gene{j}" for j in range(80)]),
    )
    basis, batches = prepare(data, 1, np.random.default_rng(0))
    seen = SufficientStatistics.collect(batches[0], basis, one_hot(label, 2), torch.float64)
    total = float(data.size_factors.sum())
    prior = first_prior(seen, basis, total)
    begin = Components(prior.log_mean.repeat(2, 1), torch.ones(2, 80, dtype=torch.float64))
    for _ in range(10):
        fit = NewtonMStep()(seen, basis, begin, total, prior)
        begin, prior = fit.components, update_prior(fit, prior)
    assert prior.log_mean_variance[:20].min() > 5 * prior.log_mean_variance[20:].max()
    assert prior.log_inv_disp.median().item() == pytest.approx(np.log(5), abs=0.3)


def test_the_learned_prior_predicts_left_out_cells_better_than_twenty_pseudo_cells():
    data = simulated_count_data(150, 120, 3, seed=5)
    q = one_hot(np.unique(data.labels, return_inverse=True)[1], 3)
    held_out = {}
    for pseudo_cells in (20.0, "auto"):
        basis, batches = prepare(data, 5, np.random.default_rng(0))
        mixture = new_mixture(data, MixtureSettings(3, 5, pseudo_cells), basis)
        run_em(mixture, batches, responsibilities=q, max_iterations=8)
        held_out[pseudo_cells] = responsibilities_of(mixture, batches, data.n_cells)[1]
    assert held_out["auto"] > held_out[20.0] + 1

"""The ELBO and the likelihood of the y -> z -> lambda model against brute force on a toy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Normal

from nbmix.models.gmvae import GMVAE
from tests.helpers.toys import log_likelihoods, mean_and_error, toy


def posterior(model, problem):
    """q(y | x) and q(z | y, x) of torch, from the same networks."""
    hidden = model.trunk(problem.batch, problem.basis.levels)
    both = torch.relu(model.of_cell(hidden)[:, None] + model.of_component)
    mean, log_sd = model.latent(both).chunk(2, -1)  # (cells, K, n_latent)
    return Categorical(logits=model.component(hidden)), Normal(mean, log_sd.exp())


def prior(model):
    return Normal(model.prior_mean, model.prior_log_sd.exp())


@torch.no_grad()
def test_elbo_is_a_monte_carlo_mean_of_the_log_joint_minus_log_q():
    model, problem = toy(GMVAE, n_latent=2)
    q_y, q_z = posterior(model, problem)
    torch.manual_seed(1)
    draws = []
    for _ in range(200):  # labels are drawn as well: nothing is summed exactly here
        y = q_y.sample()
        at = (torch.arange(len(y)), y)
        z = Normal(q_z.loc[at], q_z.scale[at]).sample()
        log_joint = (
            torch.log_softmax(model.mixture.log_weights[0], 0)[y]
            + Normal(model.prior_mean[y], model.prior_log_sd[y].exp()).log_prob(z).sum(1)
            + log_likelihoods(model, problem, z)
        )
        draws.append(log_joint - q_y.log_prob(y) - Normal(q_z.loc[at], q_z.scale[at]).log_prob(z).sum(1))
    brute, brute_error = mean_and_error(draws)
    generator = torch.Generator().manual_seed(2)
    terms = [model.draw(problem.batch, generator) for _ in range(200)]
    filled = slice(1, None)  # the empty cell gets the prior in place of q(y)
    for name in ("elbo", "drawn_elbo"):
        mine, error = mean_and_error([getattr(t, name) for t in terms])
        off = (mine - brute).abs()
        assert (off < 4 * torch.hypot(error, brute_error))[filled].all(), name


@torch.no_grad()
def test_parts_are_those_of_torch_at_the_same_draw():
    model, problem = toy(GMVAE, n_latent=2)
    q_y, q_z = posterior(model, problem)
    noise = torch.randn(len(problem.size_factors), 2, dtype=torch.float64)
    terms = model.terms_at(problem.batch, noise)
    z = q_z.loc + q_z.scale * noise[:, None]
    torch.testing.assert_close(terms.log_q, q_y.logits)
    kl = torch.distributions.kl_divergence(q_z, prior(model).expand(q_z.loc.shape)).sum(-1)
    torch.testing.assert_close(terms.kl, kl)
    drawn = (q_z.log_prob(z) - prior(model).log_prob(z)).sum(-1)
    torch.testing.assert_close(terms.drawn_kl, drawn)
    for k in range(3):
        expected = log_likelihoods(model, problem, z[:, k])
        torch.testing.assert_close(terms.log_likelihood[:, k], expected)
    log_pi = torch.log_softmax(model.mixture.log_weights[0], 0)
    parts = terms.parts()
    uniform = Categorical(logits=log_pi.expand_as(terms.log_q))
    torch.testing.assert_close(parts["kl_component"], torch.distributions.kl_divergence(q_y, uniform))
    torch.testing.assert_close(parts["kl_latent"], (q_y.probs * kl).sum(1))
    torch.testing.assert_close(
        terms.elbo, parts["expected_log_likelihood"] - parts["kl_latent"] - parts["kl_component"]
    )


@torch.no_grad()
def test_log_likelihood_is_the_integral_over_z_and_the_sum_over_components():
    model, problem = toy(GMVAE, n_latent=1)
    model.prior_mean.mul_(0.3)
    model.latent.weight.zero_()  # importance weights from N(0, 1) are far from each other in no cell
    model.latent.bias.zero_()
    grid, weight = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(60))
    log_weight = torch.log(weight) - math.log(2 * math.pi) / 2
    n_cells = len(problem.size_factors)
    joint = []
    for log_pi, mean, log_sd in zip(
        torch.log_softmax(model.mixture.log_weights[0], 0),
        model.prior_mean,
        model.prior_log_sd,
        strict=True,
    ):
        at = mean + log_sd.exp() * grid
        inside = torch.stack([log_likelihoods(model, problem, z.expand(n_cells, 1)) for z in at])
        joint.append(log_pi + torch.logsumexp(inside + log_weight[:, None], 0))
    exact = torch.logsumexp(torch.stack(joint), 0)
    generator = torch.Generator().manual_seed(0)
    terms = [model.draw(problem.batch, generator) for _ in range(600)]
    mean, error = mean_and_error([torch.exp(t.log_importance.logsumexp(1) - exact) for t in terms])
    assert ((mean - 1).abs() < 4 * error).all()
    assert (error < 0.2).all()  # a weight that is hardly ever drawn would hide from it
    assert (mean_and_error([t.elbo for t in terms])[0] < exact).all()


def test_every_parameter_has_a_gradient():
    model, problem = toy(GMVAE, n_latent=2)
    terms = model.draw(problem.batch, torch.Generator().manual_seed(0))
    terms.elbo.sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_permuted_components_give_permuted_responsibilities():
    model, problem = toy(GMVAE, n_latent=2)
    before = model.predict(problem.batch, 4)
    order = [2, 0, 1]
    for parameter in (
        model.component.weight,
        model.component.bias,
        model.of_component,
        model.prior_mean,
        model.prior_log_sd,
    ):
        parameter.copy_(parameter[order].clone())
    model.mixture.log_weights.copy_(model.mixture.log_weights[:, order].clone())
    after = model.predict(problem.batch, 4)
    torch.testing.assert_close(after.responsibilities, before.responsibilities[:, order])
    torch.testing.assert_close(after.elbo, before.elbo)
    torch.testing.assert_close(after.log_likelihood, before.log_likelihood)


@pytest.mark.parametrize("n_components", [1, 2, 5])
def test_priors_are_drawn_from(n_components):
    model, _ = toy(GMVAE, n_latent=2, n_components=n_components)
    z = model.sample_prior(20000, torch.Generator().manual_seed(0)).detach()
    sd = model.prior_log_sd.detach().exp()
    assert ((z.mean(1) - model.prior_mean.detach()).abs() < 4.5 * sd / math.sqrt(20000)).all()
    torch.testing.assert_close(z.std(1), sd, rtol=0.03, atol=0)

"""The ELBO and the likelihood of the M1+M2 mixture against brute force on a toy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.metrics import adjusted_rand_score
from torch.distributions import Categorical, Normal, kl_divergence

from nbmix.errors import InputError
from nbmix.models.vaec import VAEC
from tests.helpers.running import fit, small_data
from tests.helpers.toys import log_likelihoods, mean_and_error, toy


def posterior_of_size(model, problem):
    total = torch.from_numpy(np.asarray(problem.counts.sum(1), np.float64).clip(1))
    mean, log_sd = model.log_size(total.log() - model.decoder.log_unit).chunk(2, -1)
    return Normal(mean, log_sd.exp())


SIZES = pytest.mark.parametrize("size_factors", ["given", "latent"])


def one_hot(y):
    return torch.eye(3, dtype=torch.float64)[y]


def normal(network, *inputs):
    mean, log_sd = network(torch.cat(inputs, -1)).chunk(2, -1)
    return Normal(mean, log_sd.exp())


@SIZES
@torch.no_grad()
def test_elbo_is_a_monte_carlo_mean_of_the_log_joint_minus_log_q(size_factors):
    model, problem = toy(VAEC, n_latent=2, size_factors=size_factors)
    model.log_size_prior.copy_(torch.tensor([5.5, -0.5]))
    hidden = model.trunk(problem.batch, problem.basis.levels)
    torch.manual_seed(1)
    draws = []
    for _ in range(200):  # labels are drawn as well: nothing is summed exactly here
        q_z = normal(model.latent, hidden)
        z = q_z.sample()
        q_y = Categorical(logits=model.component(z))
        y = q_y.sample()
        q_u = normal(model.inner, z, one_hot(y))
        u = q_u.sample()
        log_p = torch.log_softmax(model.mixture.log_weights[0], 0)[y]
        log_p = log_p + Normal(0.0, 1.0).log_prob(u).sum(1)
        log_p = log_p + normal(model.outer, u, one_hot(y)).log_prob(z).sum(1)
        log_q = q_z.log_prob(z).sum(1) + q_y.log_prob(y) + q_u.log_prob(u).sum(1)
        sizes = problem.size_factors
        if size_factors == "latent":
            q_s = posterior_of_size(model, problem)
            log_size = q_s.sample()
            log_p = log_p + Normal(5.5, math.exp(-0.5)).log_prob(log_size)[:, 0]
            log_q = log_q + q_s.log_prob(log_size)[:, 0]
            sizes = log_size[:, 0].exp().numpy()
        draws.append(log_p + log_likelihoods(model, problem, z, sizes) - log_q)
    brute, brute_error = mean_and_error(draws)
    generator = torch.Generator().manual_seed(2)
    terms = [model.draw(problem.batch, generator) for _ in range(200)]
    filled = slice(1, None)  # the empty cell gets the prior in place of q(y)
    for name in ("elbo", "drawn_elbo"):
        mine, error = mean_and_error([getattr(t, name) for t in terms])
        off = (mine - brute).abs()
        assert (off < 4 * torch.hypot(error, brute_error))[filled].all(), name


@SIZES
@torch.no_grad()
def test_parts_are_those_of_torch_at_the_same_draw(size_factors):
    model, problem = toy(VAEC, n_latent=2, size_factors=size_factors)
    model.log_size_prior.copy_(torch.tensor([5.5, -0.5]))
    noise = torch.randn(6, model.noise_width, dtype=torch.float64)
    terms = model.terms_at(problem.batch, noise)
    hidden = model.trunk(problem.batch, problem.basis.levels)
    q_z = normal(model.latent, hidden)
    z = q_z.loc + q_z.scale * noise[:, :2]
    of_size, drawn_size, sizes = 0.0, 0.0, problem.size_factors
    if size_factors == "latent":
        q_s, p_s = posterior_of_size(model, problem), Normal(5.5, math.exp(-0.5))
        log_size = q_s.loc + q_s.scale * noise[:, 4:]
        of_size = kl_divergence(q_s, p_s)[:, 0]
        drawn_size = (q_s.log_prob(log_size) - p_s.log_prob(log_size))[:, 0]
        sizes = log_size[:, 0].exp().numpy()
    torch.testing.assert_close(terms.log_q, torch.log_softmax(model.component(z), 1))
    for k in range(3):
        y = one_hot(torch.full((6,), k))
        q_u = normal(model.inner, z, y)
        u = q_u.loc + q_u.scale * noise[:, 2:4]
        log_p_z = normal(model.outer, u, y).log_prob(z).sum(1)
        standard = Normal(torch.zeros(2).double(), torch.ones(2).double())
        kl = kl_divergence(q_u, standard).sum(1) - log_p_z - q_z.entropy().sum(1) + of_size
        torch.testing.assert_close(terms.kl[:, k], kl)
        drawn = (q_u.log_prob(u) - standard.log_prob(u)).sum(1) - log_p_z + q_z.log_prob(z).sum(1)
        torch.testing.assert_close(terms.drawn_kl[:, k], drawn + drawn_size)
        torch.testing.assert_close(terms.log_likelihood[:, k], log_likelihoods(model, problem, z, sizes))


@torch.no_grad()
def test_log_likelihood_is_the_integral_over_u_and_z_and_the_sum_over_components():
    model, problem = toy(VAEC, n_latent=1)
    for layer in (model.latent, model.inner[-1]):  # importance weights from N(0, 1) are of like size
        layer.weight.zero_()
        layer.bias.zero_()
    grid, weight = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(16))
    log_weight = torch.log(weight) - math.log(2 * math.pi) / 2
    joint = []
    for k, log_pi in enumerate(torch.log_softmax(model.mixture.log_weights[0], 0)):
        for u, log_w in zip(grid, log_weight, strict=True):
            p_z = normal(model.outer, u[None], one_hot(torch.tensor(k)))
            at = p_z.loc + p_z.scale * grid[:, None]  # (grid, 1)
            inside = torch.stack([log_likelihoods(model, problem, z.expand(6, 1)) for z in at])
            joint.append(log_pi + log_w + torch.logsumexp(inside + log_weight[:, None], 0))
    exact = torch.logsumexp(torch.stack(joint), 0)
    generator = torch.Generator().manual_seed(0)
    terms = [model.draw(problem.batch, generator) for _ in range(600)]
    mean, error = mean_and_error([torch.exp(t.log_importance.logsumexp(1) - exact) for t in terms])
    assert ((mean - 1).abs() < 4 * error).all()
    assert (error < 0.2).all()  # a weight that is hardly ever drawn would hide from it
    assert (mean_and_error([t.elbo for t in terms])[0] < exact).all()


@SIZES
def test_every_parameter_has_a_gradient(size_factors):
    model, problem = toy(VAEC, n_latent=2, size_factors=size_factors)
    model.draw(problem.batch, torch.Generator().manual_seed(0)).elbo.sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_latent_size_factors_are_found_in_the_counts():
    """The given ones belong to other cells here: they only say how size factors are distributed."""
    data = small_data(n_cells=100, n_genes=300)
    thinned = np.random.default_rng(0).binomial(
        data.counts.toarray().astype(int), np.linspace(0.1, 1, 100)[:, None]
    )
    truth = thinned.sum(1).astype(float)
    given = np.random.default_rng(1).permutation(truth)
    data = replace(data, counts=sp.csr_matrix(thinned.astype(np.float32)), size_factors=given)
    model = VAEC(data.gene_names, n_components=2, n_hidden=16, size_factors="latent", lr=5e-3)
    module, cells = fit(model, data, epochs=8, batch_size=20)
    log_given = np.log(given[module.training_rows])
    expected = [log_given.mean(), np.log(log_given.std())]
    np.testing.assert_allclose(model.log_size_prior.numpy(), expected, rtol=1e-5)
    labels = cells.responsibilities.argmax(1).numpy()
    assert adjusted_rand_score(data.labels, labels) == 1
    with torch.no_grad():
        for batch in module.predict_dataloader():
            found = model.posterior_of_size(batch).mean[:, 0].numpy()
            # they are known up to the noise of the counts, about a twentieth
            assert np.abs(found - np.log(truth[batch.rows])).mean() < 0.1


def test_a_kind_of_size_factors_that_there_is_not():
    with pytest.raises(InputError, match=r"model\.size_factors=free: choose given or latent"):
        VAEC(np.array(["a", "b"]), n_components=2, size_factors="free")


@torch.no_grad()
def test_priors_are_drawn_from():
    model, _ = toy(VAEC, n_latent=2)
    z = model.sample_prior(20000, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for k in range(3):
        u = torch.randn(20000, 2, dtype=torch.float64)
        theirs = normal(model.outer, u, one_hot(torch.full((20000,), k))).sample()
        error = (theirs.std(0) * math.sqrt(2 / 20000)).clamp(min=1e-9)
        assert ((z[k].mean(0) - theirs.mean(0)).abs() < 4.5 * error).all()
        torch.testing.assert_close(z[k].std(0), theirs.std(0), rtol=0.03, atol=0)

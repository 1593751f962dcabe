from __future__ import annotations

from functools import partial

import pytest
import torch

from nbmix.core.expected_log_likelihood import Curvature, ExpectedLogLikelihood, curvature
from nbmix.core.parameters import Components
from nbmix.core.statistics import SufficientStatistics


def random_components(n_components, n_genes, generator, log_mean=(-16.0, -3.0), log_inv_disp=(-8.0, 12.0)):
    def uniform(low, high):
        return low + (high - low) * torch.rand(
            n_components, n_genes, dtype=torch.float64, generator=generator
        )

    return Components(uniform(*log_mean), uniform(*log_inv_disp))


def random_q(n_cells, n_components, generator, sharpness=2.0):
    scores = torch.randn(n_cells, n_components, dtype=torch.float64, generator=generator)
    return torch.softmax(sharpness * scores, 1)


def q_per_problem(statistics, basis, components):
    """(K, genes) value of Q."""
    problem = ExpectedLogLikelihood.of(statistics, basis)
    flat = problem.value(components.log_mean.flatten(), components.log_inv_disp.flatten())
    return flat.view_as(components.log_mean)


FORMS = ("compiled", "in torch")


@pytest.fixture
def weighted(problem, generator):
    q = random_q(40, 3, generator)
    return SufficientStatistics.collect(problem.batch, problem.basis, q, torch.float64), q


def flat_curvature(form, statistics, basis, a, b):
    """At flat a and b (K genes,), by the compiled loops or in torch."""
    if form == "in torch":
        return ExpectedLogLikelihood.of(statistics, basis).curvature(a, b)
    shape = statistics.rate.shape[1::-1]
    found = curvature(statistics, basis, Components(a.view(shape), b.view(shape)))
    return Curvature(*(t.flatten() for t in found))


@pytest.mark.parametrize("form", FORMS)
def test_gradient_and_hessian_equal_autograd_of_the_dense_form(problem, weighted, generator, form):
    statistics, q = weighted
    components = random_components(3, 25, generator, log_inv_disp=(-4.0, 6.0))
    got = flat_curvature(form, statistics, problem.basis, *(t.flatten() for t in components))
    a, b = (t.clone().requires_grad_() for t in components)
    x = torch.from_numpy(problem.counts.toarray()).double()[:, None, :]
    s = torch.from_numpy(problem.size_factors)[:, None, None]
    r, scaled = torch.exp(b), s * torch.exp(a - b)
    terms = torch.lgamma(x + r) - torch.lgamma(r) + torch.xlogy(x, scaled) - (x + r) * torch.log1p(scaled)
    total = (q[:, :, None] * terms).sum()
    grad_a, grad_b = torch.autograd.grad(total, (a, b), create_graph=True)
    hess_aa, hess_ab = torch.autograd.grad(grad_a.sum(), (a, b), retain_graph=True)
    (hess_bb,) = torch.autograd.grad(grad_b.sum(), b)
    want = (grad_a, grad_b, hess_aa, hess_ab, hess_bb)
    for mine, theirs in zip(got[1:], want, strict=True):
        torch.testing.assert_close(mine.view_as(theirs), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", ["a", "b"])
def test_gradient_and_hessian_equal_finite_differences_over_the_whole_range(
    problem, weighted, generator, which, form
):
    exact = partial(flat_curvature, form, weighted[0], problem.basis)
    a, b = (t.flatten() for t in random_components(3, 25, generator))
    h = 1e-5
    up, down = (exact(a + d, b) if which == "a" else exact(a, b + d) for d in (h, -h))
    now = exact(a, b)
    grad, hess = (now.grad_a, now.hess_aa) if which == "a" else (now.grad_b, now.hess_bb)
    slope = [(up.value - down.value) / (2 * h), (up.grad_a - down.grad_a) / (2 * h)]
    slope.append((up.grad_b - down.grad_b) / (2 * h))
    scale = now.value.abs() + 1
    assert ((slope[0] - grad).abs() / scale).max() < 1e-8
    own, cross = (slope[1], slope[2]) if which == "a" else (slope[2], slope[1])
    assert ((own - hess).abs() / scale).max() < 1e-7
    assert ((cross - now.hess_ab).abs() / scale).max() < 1e-7


def test_a_subset_of_the_problems_has_their_curvature(problem, weighted, generator):
    whole = ExpectedLogLikelihood.of(weighted[0], problem.basis)
    a, b = (t.flatten() for t in random_components(3, 25, generator))
    keep = torch.rand(75, generator=generator) < 0.4
    again = torch.rand(int(keep.sum()), generator=generator) < 0.5
    for got, want in zip(whole.subset(keep).curvature(a[keep], b[keep]), whole.curvature(a, b), strict=True):
        torch.testing.assert_close(got, want[keep], rtol=1e-12, atol=1e-12)
    twice = whole.subset(keep).subset(again).value(a[keep][again], b[keep][again])
    torch.testing.assert_close(twice, whole.value(a, b)[keep][again], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept", [0, 1, 75])
def test_none_one_and_all_of_the_problems_are_subsets(problem, weighted, generator, kept):
    whole = ExpectedLogLikelihood.of(weighted[0], problem.basis)
    a, b = (t.flatten() for t in random_components(3, 25, generator))
    keep = torch.arange(75) < kept
    got = whole.subset(keep).value(a[keep], b[keep])
    torch.testing.assert_close(got, whole.value(a, b)[:kept], rtol=1e-12, atol=1e-12)

"""The rules of a step: compiled, in two numbers and in more; and where climbs end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbmix.core.kernels.newton import PLATEAU_STEP
from nbmix.core.kernels.newton import newton_step as compiled_step
from nbmix.core.newton import Curve, NewtonRule, climb, newton_step

RULE = NewtonRule(tolerance=1e-10, max_steps=200)


def curves(n_problems, d, generator, *, bound=0.0):
    """Random gradients and symmetric Hessians, indefinite ones, too; ``bound`` is added to the diagonal."""
    half = torch.randn(n_problems, d, d, dtype=torch.float64, generator=generator)
    hessian = half + half.mT + bound * torch.eye(d, dtype=torch.float64)
    gradient = torch.randn(n_problems, d, dtype=torch.float64, generator=generator)
    return Curve(torch.zeros(n_problems, dtype=torch.float64), gradient, hessian)


@pytest.mark.parametrize("damped", [False, True])
def test_the_compiled_step_is_that_of_torch(generator, damped):
    now = curves(500, 2, generator)
    pinned = torch.rand(500, 2, generator=generator) < 0.3
    damping = torch.rand(500, dtype=torch.float64, generator=generator) * damped
    step, gain = newton_step(now, pinned, damping, slice(1, 2))
    aa, ab, bb = now.hessian[:, 0, 0], now.hessian[:, 0, 1], now.hessian[:, 1, 1]
    rows = torch.stack([now.value, *now.gradient.T, aa, ab, bb], 1).numpy()
    for p in range(500):
        found = compiled_step(p, rows, bool(pinned[p, 0]), bool(pinned[p, 1]), float(damping[p]))
        np.testing.assert_allclose(found, [*step[p], gain[p]], rtol=1e-9)
    assert (step[:, 1] == -PLATEAU_STEP).any() != damped


def test_two_numbers_step_as_if_there_were_a_third_that_is_pinned(generator):
    two = curves(200, 2, generator)
    hessian = torch.zeros(200, 3, 3, dtype=torch.float64)
    hessian[:, :2, :2] = two.hessian
    three = Curve(two.value, torch.cat([two.gradient, torch.ones(200, 1)], 1), hessian)
    # a pin is an eigenvalue of 1, which changes nothing where the others enclose it
    between = (torch.linalg.eigvalsh(two.hessian).abs().amax(1) >= 1) & (
        torch.linalg.eigvalsh(-two.hessian)[:, 0] <= 1
    )
    none = torch.zeros(200, dtype=torch.float64)
    pinned = torch.tensor([False, False, True]).expand(200, 3)
    step, gain = newton_step(three, pinned, none, slice(0))
    want, promised = newton_step(two, pinned[:, :2], none, slice(0))
    assert between.sum() > 50
    torch.testing.assert_close(step[between, :2], want[between], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gain[between], promised[between], rtol=1e-7, atol=1e-9)
    assert (step[:, 2] == 0).all()


@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize("damping", [0.0, 10.0])
def test_steps_lead_uphill_and_are_newtons_where_the_hessian_is_negative_definite(generator, d, damping):
    pinned, damp = torch.zeros(300, d, dtype=torch.bool), torch.full((300,), damping, dtype=torch.float64)
    now = curves(300, d, generator)
    step, gain = newton_step(now, pinned, damp, slice(0))
    assert ((now.gradient * step).sum(1) > 0).all()
    torch.testing.assert_close(gain, (now.gradient * step).sum(1) / 2)
    now = curves(300, d, generator, bound=-20.0)
    step, _ = newton_step(now, pinned, damp, slice(0))
    solved = torch.linalg.solve(-now.hessian + damping * torch.eye(d, dtype=torch.float64), now.gradient)
    torch.testing.assert_close(step, solved, rtol=1e-7, atol=1e-9)


class Asymptotes:
    """f = -sum_i w_i e^-x_i, which rises towards 0 for ever."""

    log_inv_disps = slice(0)

    def __init__(self, weight):
        self.weight = weight

    def subset(self, keep):
        return Asymptotes(self.weight[keep])

    def curve(self, at):
        left = self.weight * torch.exp(-at)
        return Curve(-left.sum(1), left, torch.diag_embed(-left))


@pytest.mark.parametrize("to_bounds", [False, True])
def test_numbers_near_an_asymptote_go_to_their_bound_where_that_is_wanted(to_bounds):
    weight = torch.tensor([[1.0, 1e-3, 10.0], [1e3, 1.0, 1.0]], dtype=torch.float64)
    high = torch.full((3,), 40.0, dtype=torch.float64)
    end = climb(Asymptotes(weight), torch.zeros_like(weight), -high, high, RULE._replace(to_bounds=to_bounds))
    assert (end == 40).all() == to_bounds
    assert (end > 5).all()


class Quadratic:
    """f = g . x - x' A x / 2, A positive definite."""

    log_inv_disps = slice(0)

    def __init__(self, gradient, bend):
        self.gradient, self.bend = gradient, bend

    def subset(self, keep):
        return Quadratic(self.gradient[keep], self.bend[keep])

    def curve(self, at):
        bent = torch.einsum("pij,pj->pi", self.bend, at)
        value = ((self.gradient - bent / 2) * at).sum(1)
        return Curve(value, self.gradient - bent, -self.bend)


@pytest.mark.parametrize("d", [2, 4])
def test_a_climb_ends_where_the_gradient_vanishes_or_points_out_of_the_bounds(generator, d):
    half = torch.randn(60, d, d, dtype=torch.float64, generator=generator)
    bend = half @ half.mT + 0.1 * torch.eye(d, dtype=torch.float64)
    gradient = 5 * torch.randn(60, d, dtype=torch.float64, generator=generator)
    problem, high = Quadratic(gradient, bend), torch.ones(d, dtype=torch.float64)
    end = climb(problem, torch.full((60, d), 9.0, dtype=torch.float64), -high, high, RULE)
    slope = problem.curve(end).gradient
    inside = end.abs() < 1
    assert 0.1 < inside.double().mean() < 0.9
    assert slope[inside].abs().max() < 1e-4
    assert (slope * end)[~inside].min() > -1e-4


class Rates:
    """f = n x - s e^x, whose curves are counted."""

    log_inv_disps = slice(0)
    n_curves = 0

    def __init__(self, count, size):
        self.count, self.size = count, size

    def subset(self, keep):
        return Rates(self.count[keep], self.size[keep])

    def curve(self, at):
        Rates.n_curves += len(at)
        rate = self.size * torch.exp(at)
        return Curve((self.count * at - rate)[:, 0], self.count - rate, -rate[:, :, None])


def test_a_climb_that_begins_near_its_end_looks_at_one_place_alone():
    count = torch.logspace(0, 4, 50, dtype=torch.float64)[:, None]
    best = torch.log(count)
    far, rule = torch.full((1,), 40.0, dtype=torch.float64), NewtonRule(tolerance=1e-5, max_steps=50)
    Rates.n_curves = 0
    end = climb(Rates(count, 1.0 + 0 * count), best + 1e-2 / count**0.25, -far, far, rule)
    assert Rates.n_curves == len(count)
    left = count * (torch.exp(end - best) - 1 - (end - best))
    assert left.max() < 1e-5

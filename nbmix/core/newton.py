"""Damped Newton: how a value f of a few numbers x is raised within bounds, many problems at once.

With gradient g and Hessian H of f at x, a step obeys these rules.

- *Bounds.* A number at a bound whose gradient points outwards is pinned: its gradient counts as 0, its row
  and column of -H as those of the identity.
- *Shift and damping.* With the eigenvalues lambda of -H the step is

      (-H + t I)^-1 g,    t = 2 max(0, e - min lambda) + damping,    e = delta max |lambda| + 1e-12,

  which leads uphill where H is not negative definite, too (Nocedal & Wright 2006, section 3.4); delta is 1e-6
  in M steps. The step promises a rise of g . step / 2. No number moves farther than ``longest``, or beyond
  its bounds.
- *Trial.* A step that lowers f is taken back, and damping becomes max(8 damping, max |diag H| / 10). A step
  that is kept divides damping by 8. It begins at 0.
- *Plateau.* Towards the Poisson f is about f_0 + C e^-b in b = ln r. Where C > 0, gradient and curvature
  vanish far from the maximum. So where g_b < 0 < H_bb without damping, b goes down by 3, and the promise is
  at least the rise of that exponential over twice the way, -g_b (e^6 - 1).
- *Asymptote.* Where f is about f_0 - C e^-|x|, Newton goes on by 1 for ever. With ``to_bounds`` a number goes
  to its bound at once where -H_xx is |g_x|, to 5 %, unless the last step was taken back. M steps do without
  it: the next one begins where this one ends.
- *End.* A problem is done when its next step promises no more than ``tolerance``, in nats. Logarithms of
  rates and of r have derivatives of like sizes. So after an undamped step, by s at most and to gain G, the
  gradient is about f'' s^2 / 2, by which the next one would gain G s^2 / 4. Where that is no more than
  ``tolerance``, and s no more than 0.1, the step is taken without a trial, and is the last.

The same rules are compiled for two numbers in ``nbmix.core.kernels.newton``, which has their constants; tests
hold one form to the other.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nbmix.core.kernels.newton import (
    DAMPING_FACTOR,
    FIRST_DAMPING,
    LEAST_ABSOLUTE,
    LEAST_RELATIVE,
    LONGEST_LAST_STEP,
    PLATEAU_STEP,
)

LONGEST_STEP = 3.0  # in ln mu or ln r

NEAR_ASYMPTOTE = 0.05  # |-H_xx / |g_x| - 1|


class Curve(NamedTuple):
    """Values (problems,), gradients (problems, d) and Hessians (problems, d, d), in nats."""

    value: Tensor
    gradient: Tensor
    hessian: Tensor

    def where(self, mask: Tensor, other: Curve) -> Curve:
        """This one's problems where ``mask`` (problems,) holds, else the other's."""
        return Curve(
            torch.where(mask, self.value, other.value),
            torch.where(mask[:, None], self.gradient, other.gradient),
            torch.where(mask[:, None, None], self.hessian, other.hessian),
        )


class NewtonRule(NamedTuple):
    """What differs between fits.

    Attributes:
        tolerance: nats that the next step has to promise.
        max_steps: at most.
        longest: bound on one step in any number.
        delta: least eigenvalue beside the largest.
        to_bounds: whether numbers near an asymptote go to their bounds.
    """

    tolerance: float
    max_steps: int
    longest: float = LONGEST_STEP
    delta: float = LEAST_RELATIVE
    to_bounds: bool = False


class Problem(Protocol):
    """Functions of d numbers each."""

    @property
    def log_inv_disps(self) -> slice:
        """Which of the d numbers are ln r, and so have a plateau."""
        ...

    def curve(self, at: Tensor) -> Curve:
        """At (problems, d)."""
        ...

    def subset(self, keep: Tensor) -> Problem:
        """Those where the mask ``keep`` (problems,) holds."""
        ...


def climb(problem: Problem, start: Tensor, low: Tensor, high: Tensor, rule: NewtonRule) -> Tensor:
    """Where (problems, d) Newton comes to from ``start`` (problems, d); no problem's value falls.

    Args:
        problem: what is raised.
        start: is first moved within the bounds.
        low, high: (problems, d) or (d,) bounds.
        rule: of the steps.
    """
    best = start.clamp(low, high)
    low, high = low.expand_as(best), high.expand_as(best)
    left, at = torch.arange(len(best), device=best.device), best.clone()
    now, damping = problem.curve(at), best.new_zeros(len(best))
    going = better = torch.ones_like(left, dtype=torch.bool)
    for _ in range(rule.max_steps):
        pinned = ((at <= low) & (now.gradient <= 0)) | ((at >= high) & (now.gradient >= 0))
        step, gain = newton_step(now, pinned, damping, problem.log_inv_disps, rule.delta)
        going = going & (gain > rule.tolerance)
        last = going & (damping == 0) & _is_last(step, gain, rule.tolerance)
        at = torch.where(last[:, None], (at + step).clamp(low, high), at)
        going = going & ~last
        n_going = int(going.sum())
        if n_going == 0:
            break
        if 2 * n_going <= going.numel():  # picking them out is worth it
            best[left] = at
            parts = (left, at, damping, better, step, low, high)
            left, at, damping, better, step, low, high = (t[going] for t in parts)
            problem, now = problem.subset(going), Curve(*(t[going] for t in now))
            going = going[going]
        step = torch.where(going[:, None], step.clamp(-rule.longest, rule.longest), 0.0)
        if rule.to_bounds:
            step = torch.where(better[:, None] & _near_asymptote(now), now.gradient.sign() * math.inf, step)
        there = torch.where(going[:, None], (at + step).clamp(low, high), at)
        then = problem.curve(there)
        better = then.value >= now.value
        at = torch.where(better[:, None], there, at)
        steepest = now.hessian.diagonal(dim1=1, dim2=2).abs().amax(1)
        more = torch.maximum(damping * DAMPING_FACTOR, steepest * FIRST_DAMPING)
        damping = torch.where(better, damping / DAMPING_FACTOR, more)
        now = then.where(better, now)
    best[left] = at
    return best


def _is_last(step: Tensor, gain: Tensor, tolerance: float) -> Tensor:
    """(problems,) whether what comes after a step promises too little to be looked at, see the rules."""
    move = step.abs().amax(1)
    return (move <= LONGEST_LAST_STEP) & (gain * move**2 <= 4 * tolerance)


def newton_step(
    now: Curve, pinned: Tensor, damping: Tensor, log_inv_disps: slice, delta: float = LEAST_RELATIVE
) -> tuple[Tensor, Tensor]:
    """Uphill steps (problems, d) before any bound on them, and the rise (problems,) that they promise.

    Args:
        now: where the problems are.
        pinned: (problems, d) mask of numbers that stay.
        damping: (problems,).
        log_inv_disps: which numbers are ln r.
        delta: see the rule on the shift.
    """
    gradient = torch.where(pinned, 0.0, now.gradient)
    bend = torch.where(pinned[:, :, None] | pinned[:, None, :], 0.0, -now.hessian)
    bend = bend + torch.diag_embed(pinned.to(bend.dtype))
    step = _shifted_step(bend, gradient, damping, delta)
    gain = (gradient * step).sum(1) / 2
    of_disps = gradient[:, log_inv_disps]
    bend_disps = now.hessian.diagonal(dim1=1, dim2=2)[:, log_inv_disps]
    plateau = (bend_disps > 0) & (of_disps < 0) & (damping == 0)[:, None]  # a pinned gradient is 0
    step[:, log_inv_disps] = torch.where(plateau, -PLATEAU_STEP, step[:, log_inv_disps])
    promise = torch.where(plateau, -of_disps * math.expm1(2 * PLATEAU_STEP), 0.0)
    if promise.shape[1]:
        gain = torch.maximum(gain, promise.amax(1))
    return step, gain


def _shifted_step(bend: Tensor, gradient: Tensor, damping: Tensor, delta: float) -> Tensor:
    """(problems, d) for ``bend`` (problems, d, d), -H with pins; written out for d = 2, as GPUs want it."""
    if bend.shape[1] != 2:
        values, axes = torch.linalg.eigh(bend)
        shift = _shift(values[:, 0], values.abs().amax(1), delta) + damping
        along = torch.einsum("pij,pi->pj", axes, gradient) / (values + shift[:, None])
        return torch.einsum("pij,pj->pi", axes, along)
    aa, off, bb = bend[:, 0, 0], bend[:, 0, 1], bend[:, 1, 1]
    middle, radius = (aa + bb) / 2, torch.hypot((aa - bb) / 2, off)
    shift = _shift(middle - radius, middle.abs() + radius, delta) + damping
    aa, bb = aa + shift, bb + shift
    grad_a, grad_b = gradient.T
    step = torch.stack([bb * grad_a - off * grad_b, aa * grad_b - off * grad_a], 1)
    return step / (aa * bb - off * off)[:, None]


def _shift(smallest: Tensor, largest: Tensor, delta: float) -> Tensor:
    """What is added to eigenvalues, of which the smallest and the largest in size are given."""
    return 2 * (delta * largest + LEAST_ABSOLUTE - smallest).clamp(min=0)


def _near_asymptote(now: Curve) -> Tensor:
    """(problems, d) whether a number's value nears its limit as an exponential does."""
    bend = -now.hessian.diagonal(dim1=1, dim2=2)
    return (bend / now.gradient.abs() - 1).abs() < NEAR_ASYMPTOTE

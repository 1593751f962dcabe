"""Newton on many problems of a few numbers each."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

CLIMB_TOLERANCE = 1e-9  # nats, likewise of the other fits

MAX_STEPS = 200

LONGEST_STEP = 3.0

# ---- Newton on many problems ------------------------------------------------------------------------


class Curve(NamedTuple):
    """Values (problems,), gradients (problems, d) and Hessians (problems, d, d), in nats."""

    value: Tensor
    gradient: Tensor
    hessian: Tensor

    def where(self, mask: Tensor, other: Curve) -> Curve:
        return Curve(
            torch.where(mask, self.value, other.value),
            torch.where(mask[:, None], self.gradient, other.gradient),
            torch.where(mask[:, None, None], self.hessian, other.hessian),
        )


class Problem(Protocol):
    """Functions of d numbers each, one for every gene."""

    def curve(self, at: Tensor) -> Curve:
        """At (problems, d)."""
        ...

    def subset(self, keep: Tensor) -> Problem:
        """Those where the mask ``keep`` (problems,) holds."""
        ...


def climb(problem: Problem, start: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Raise every problem's value from ``start`` (problems, d) within bounds; returns the ends and values.

    Newton with the absolute values of the Hessian's eigenvalues, so that all steps lead uphill; one that
    lowers the value is taken back and shortened.
    """
    best = torch.maximum(torch.minimum(start, high), low)
    values = torch.empty(len(start), dtype=torch.float64)
    left, at = torch.arange(len(start)), best.clone()
    now, part = problem.curve(at), torch.ones(len(start), 1, dtype=torch.float64)
    for _ in range(MAX_STEPS):
        step, gain = newton_step(now, at, low, high)
        going = gain > CLIMB_TOLERANCE
        if not going.all():
            best[left], values[left] = at, now.value
            if not going.any():
                return best, values
            left, at, part, step, low, high = (t[going] for t in (left, at, part, step, low, high))
            problem, now = problem.subset(going), Curve(*(t[going] for t in now))
        there = torch.maximum(torch.minimum(at + part * step, high), low)
        then = problem.curve(there)
        better = then.value >= now.value
        part = torch.where(better[:, None], (4 * part).clamp(max=1), part / 4)
        at, now = torch.where(better[:, None], there, at), then.where(better, now)
    best[left], values[left] = at, now.value
    return best, values


def newton_step(now: Curve, at: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Uphill steps (problems, d), and the rise (problems,) that the quadratic promises."""
    pinned = ((at <= low) & (now.gradient <= 0)) | ((at >= high) & (now.gradient >= 0))
    gradient = torch.where(pinned, 0.0, now.gradient)
    hessian = torch.where(pinned[:, :, None] | pinned[:, None, :], 0.0, -now.hessian)
    bend, axes = torch.linalg.eigh(hessian + torch.diag_embed(pinned.double()))
    bend = bend.abs()
    bend = bend + 1e-12 * bend.amax(1, keepdim=True) + 1e-14
    along = torch.einsum("pij,pi->pj", axes, gradient)
    step = torch.einsum("pij,pj->pi", axes, along / bend)
    gain = (gradient * step).sum(1) / 2
    step = step * (LONGEST_STEP / step.abs().amax(1, keepdim=True)).clamp(max=1)
    # where the value nears an asymptote as e^-|x| Newton goes by 1 for ever
    tail = (hessian.diagonal(dim1=1, dim2=2) / gradient.abs() - 1).abs() < 0.05
    return torch.where(tail, torch.where(gradient > 0, high, low) - at, step), gain

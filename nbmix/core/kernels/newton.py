"""Damped Newton, the rule of ``nbmix.core.newton``, on the two numbers of every gene and component."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nbmix.core.kernels.blocks import GENES_A_BLOCK
from nbmix.core.kernels.elementary import ordered
from nbmix.core.kernels.expected import N_CURVES, empty_block, evaluate, load

LEAST_RELATIVE, LEAST_ABSOLUTE = 1e-6, 1e-12  # of the smallest eigenvalue, the former beside the largest

DAMPING_FACTOR = 8.0  # by which damping grows or shrinks

FIRST_DAMPING = 0.1  # of the Hessian's diagonal

PLATEAU_STEP = 3.0  # in ln r

LONGEST_LAST_STEP = 0.1  # that is not tried


class NewtonLimits(NamedTuple):
    """Where Newton ends, and how far it may go.

    Attributes:
        tolerance: nats that the next step has to promise.
        max_steps: at most.
        longest: bound on one step in a or b.
        floor: least a.
        low_b, high_b: bounds of b.
    """

    tolerance: float
    max_steps: int
    longest: float
    floor: float
    low_b: float
    high_b: float


@ordered
def newton_step(p, now, pinned_a, pinned_b, damping):
    """Steps of problem p in a and b and the rise that they promise; now: (problems, 6), see ``evaluate``."""
    grad_a = 0.0 if pinned_a else now[p, 1]
    grad_b = 0.0 if pinned_b else now[p, 2]
    off = 0.0 if pinned_a or pinned_b else -now[p, 4]
    aa = 1.0 if pinned_a else -now[p, 3]
    bb = 1.0 if pinned_b else -now[p, 5]
    middle = (aa + bb) / 2.0
    radius = math.sqrt((aa - bb) * (aa - bb) / 4.0 + off * off)
    least = LEAST_RELATIVE * (abs(middle) + radius) + LEAST_ABSOLUTE
    shift = max(least - (middle - radius), 0.0) * 2.0 + damping
    aa += shift
    bb += shift
    determinant = aa * bb - off * off
    step_a = (bb * grad_a - off * grad_b) / determinant
    step_b = (aa * grad_b - off * grad_a) / determinant
    gain = (grad_a * step_a + grad_b * step_b) / 2.0
    if not pinned_b and now[p, 5] > 0.0 and grad_b < 0.0 and damping == 0.0:
        step_b = -PLATEAU_STEP
        gain = max(gain, -grad_b * math.expm1(2.0 * PLATEAU_STEP))
    return step_a, step_b, gain


@ordered
def is_last(gain, move, tolerance):
    """Whether what comes after a step, by the rule on the end, promises too little to be looked at."""
    return move <= LONGEST_LAST_STEP and gain * move * move <= 4.0 * tolerance


@ordered
def newton_rows(begin, end, a, b, sums, limits, out):
    """Damped Newton on each problem of the genes begin..end: a, b (K, genes), in place.

    sums: ``ExpectedSums``. limits: ``NewtonLimits``. out: (6, K, genes), value, gradient and Hessian where
    Newton ends; gradient and Hessian may be those before a last step.
    """
    tolerance, max_steps, longest, floor, low_b, high_b = limits
    n_components = a.shape[0]
    size, block = GENES_A_BLOCK * n_components, empty_block(sums)
    active = np.empty(size, np.int64)
    at_a, at_b, damping = np.empty(size), np.empty(size), np.empty(size)
    next_a, next_b = np.empty(size), np.empty(size)
    now, then = np.empty((size, N_CURVES)), np.empty((size, N_CURVES))
    for start in range(begin, end, GENES_A_BLOCK):
        stop = min(start + GENES_A_BLOCK, end)
        load(start, stop, sums, block)
        n_active = (stop - start) * n_components
        for p in range(n_active):
            j, k = start + p // n_components, p % n_components
            active[p], damping[p] = p, 0.0
            at_a[p], at_b[p] = max(a[k, j], floor), min(max(b[k, j], low_b), high_b)
        evaluate(start, active[:n_active], at_a, at_b, sums, block, now)
        for _ in range(max_steps):
            n_left = 0
            for place in range(n_active):
                p = active[place]
                pinned_a = at_a[p] <= floor and now[p, 1] <= 0.0
                pinned_b = (at_b[p] <= low_b and now[p, 2] <= 0.0) or (at_b[p] >= high_b and now[p, 2] >= 0.0)
                step_a, step_b, gain = newton_step(p, now, pinned_a, pinned_b, damping[p])
                if gain <= tolerance:
                    continue
                next_a[p] = max(at_a[p] + min(max(step_a, -longest), longest), floor)
                next_b[p] = min(max(at_b[p] + min(max(step_b, -longest), longest), low_b), high_b)
                if damping[p] == 0.0 and is_last(gain, max(abs(step_a), abs(step_b)), tolerance):
                    at_a[p], at_b[p] = next_a[p], next_b[p]
                    now[p, 0] += gain
                else:
                    active[n_left] = p
                    n_left += 1
            n_active = n_left
            if n_active == 0:
                break
            evaluate(start, active[:n_active], next_a, next_b, sums, block, then)
            for place in range(n_active):
                p = active[place]
                if then[p, 0] >= now[p, 0]:
                    at_a[p], at_b[p] = next_a[p], next_b[p]
                    damping[p] /= DAMPING_FACTOR
                    for c in range(N_CURVES):
                        now[p, c] = then[p, c]
                else:
                    steepest = max(abs(now[p, 3]), abs(now[p, 5]))
                    damping[p] = max(damping[p] * DAMPING_FACTOR, steepest * FIRST_DAMPING)
        for p in range((stop - start) * n_components):
            a[p % n_components, start + p // n_components] = at_a[p]
            b[p % n_components, start + p // n_components] = at_b[p]
            for c in range(N_CURVES):
                out[c, p % n_components, start + p // n_components] = now[p, c]

"""Compiled loops for the CPU, where torch would need many passes over memory.

The numerical ones have a torch counterpart in the module that calls them, which serves GPUs and the tests.
Loops take a range of rows and release the GIL; ``in_threads`` runs ranges side by side. No result depends on
the number of threads. The package's cache folder keeps the machine code, so that only a first run compiles.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, TypeVar

import numba
import numpy as np
import torch

T = TypeVar("T")

LANES = 8  # float64 in the widest vector register: nodes are padded to a multiple
N_CURVES = 6  # value, gradient (2) and Hessian (3) of a problem
GENES_A_BLOCK = 16  # whose nodes are evaluated together
ROUNDING_SHIFT = 1.5 * 2.0**52  # adding and taking away so many units rounds to a multiple of one
LONGEST_LOADING_STEP = 0.5
LARGEST_POWER = 1.0  # |g|: nodes that interpolate in s do so in s^(1 + g) while that is not too far off
LOW_LEVELS = 20  # EXACT_COUNT of nbmix.special, which the compiler must see as a constant

_exact = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz"})
# sums in any order, so that they are vectorised
_loose = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "reassoc"})


class _Helpers:
    """Threads that stay and wait for work: to start one takes as long as many a loop."""

    def __init__(self) -> None:
        self.forget()
        os.register_at_fork(after_in_child=self.forget)  # where they do not exist

    def forget(self) -> None:
        self._lock = Lock()
        self._coming: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._n_threads = 0

    def ask(self, job: Callable[[], None], n_threads: int) -> None:
        """Have up to ``n_threads`` threads do the same job, which must not raise."""
        with self._lock:
            try:
                while self._n_threads < n_threads:
                    Thread(target=self._serve, args=(self._coming,), daemon=True).start()
                    self._n_threads += 1
            except RuntimeError:  # the system gives no more: those that are there will do
                n_threads = self._n_threads
        for _ in range(n_threads):
            self._coming.put(job)

    @staticmethod
    def _serve(coming: SimpleQueue[Callable[[], None]]) -> None:
        while True:
            coming.get()()


_helpers = _Helpers()


def in_threads(work: Callable[[int], T], n_items: int) -> list[T]:
    """``[work(0), work(1), ...]``, on as many threads as torch uses, this one among them.

    For compiled loops; torch, called in ``work``, would keep threads of its own for each of these.
    """
    results: list[Any] = [None] * n_items
    coming = iter(range(n_items))
    failures: list[BaseException] = []
    lock, last_is_done = Lock(), Event()
    n_helping, is_over = 0, False

    def take() -> None:
        try:
            for index in coming:
                results[index] = work(index)
        except BaseException as failure:
            failures.append(failure)
            for _ in coming:  # leave nothing for the others
                pass

    def help_out() -> None:
        nonlocal n_helping
        with lock:
            if is_over:
                return
            n_helping += 1
        take()
        with lock:
            n_helping -= 1
            if is_over and n_helping == 0:
                last_is_done.set()

    n_helpers = min(torch.get_num_threads(), n_items) - 1
    try:
        if n_helpers > 0:
            _helpers.ask(help_out, n_helpers)
        take()
    finally:
        # one that has not come has nothing to do, and may never come: it may be waiting for this thread
        with lock:
            is_over = True
            must_wait = n_helping > 0
    if must_wait:
        last_is_done.wait()
    if failures:
        raise failures[0]
    return results


def side_by_side(work: Callable[[int], T], n_items: int) -> list[T]:
    """``in_threads`` for work in which torch computes, each on one thread."""
    n_threads = torch.get_num_threads()

    def alone(index: int) -> T:
        torch.set_num_threads(1)
        return work(index)

    try:
        return in_threads(alone, n_items)
    finally:
        torch.set_num_threads(n_threads)


def over_rows(kernel: Callable[..., None], n_rows: int, rows_at_once: int, *arguments: Any) -> None:
    """Call ``kernel(begin, end, *arguments)`` on ranges that cover ``n_rows``."""

    def part(index: int) -> None:
        kernel(index * rows_at_once, min((index + 1) * rows_at_once, n_rows), *arguments)

    in_threads(part, -(-n_rows // rows_at_once))


@_exact
def _log1p_and_share(n, x, grown, share, y, bits):
    """ln(1 + x) and x / (1 + x) of the first n values x >= 0 to 2 ulp; ``bits`` is ``y`` seen as int64.

    ln y = e ln 2 + 2 atanh(s), s = (f - 1) / (f + 1), for y = 2^e f with f in [sqrt(1/2), sqrt(2)). Written
    out since calls to libm are not vectorised.
    """
    for m in range(n):
        y[m] = 1.0 + x[m]
    for m in range(n):
        exponent = (bits[m] - 0x3FE6A09E667F3BCD) >> 52
        bits[m] -= exponent << 52
        grown[m] = float(exponent)
    for m in range(n):
        whole = 1.0 + x[m]
        inverse = 1.0 / whole
        s = (y[m] - 1.0) / (y[m] + 1.0)
        z = s * s
        t = 1.0 / 19.0
        t = t * z + 1.0 / 17.0
        t = t * z + 1.0 / 15.0
        t = t * z + 1.0 / 13.0
        t = t * z + 1.0 / 11.0
        t = t * z + 1.0 / 9.0
        t = t * z + 1.0 / 7.0
        t = t * z + 1.0 / 5.0
        t = t * z + 1.0 / 3.0
        t = t * z + 1.0
        share[m] = x[m] * inverse
        # the last term is what rounding took from 1 + x
        grown[m] = grown[m] * 0.6931471805599453 + 2.0 * s * t + (x[m] - (whole - 1.0)) * inverse


@_loose
def _node_sums(p, k, r, rate, node, grown, share):
    """Sums over the nodes of problem p of component k; both = A + r R."""
    both_grown = both_share = both_bent = zero_share = zero_grown = 0.0
    for m in range(node.shape[1]):
        zeros = r * node[k, m]
        both = rate[p, m] + zeros
        both_grown += both * grown[m]
        both_share += both * share[m]
        both_bent += both * share[m] * (1.0 - share[m])
        zero_share += zeros * share[m]
        zero_grown += zeros * grown[m]
    return both_grown, both_share, both_bent, zero_share, zero_grown


@_exact
def _stirling_remainder(z):
    w = 1.0 / (z * z)
    return (1.0 / 12.0 - w * (1.0 / 360.0 - w * (1.0 / 1260.0 - w / 1680.0))) / z


@_exact
def _digamma_remainder(z):
    w = 1.0 / (z * z)
    return -0.5 / z - w * (1.0 / 12.0 - w * (1.0 / 120.0 - w * (1.0 / 252.0 - w / 240.0)))


@_exact
def _trigamma_remainder(z):
    w = 1.0 / (z * z)
    return w * (0.5 + (1.0 / 6.0 - w * (1.0 / 30.0 - w * (1.0 / 42.0 - w / 30.0))) / z)


@_exact
def _tail(count, r):
    """``nbmix.special.tail_curve``: value, first and second derivative in ln r."""
    extra = count - LOW_LEVELS
    z = r + LOW_LEVELS
    value = (
        (z - 0.5) * math.log1p(extra / z)
        + extra * (math.log1p(count / r) - 1.0)
        + _stirling_remainder(r + count)
        - _stirling_remainder(z)
    )
    first = r * (math.log1p(extra / z) + _digamma_remainder(r + count) - _digamma_remainder(z)) - extra
    curvature = r * r * (_trigamma_remainder(r + count) - _trigamma_remainder(z)) + extra * (
        1.0 - (r / z) * (r / (r + count))
    )
    return value, first, first + curvature


@_exact
def _load(begin, end, rate, pair, first, high_first, rates, totals, level_weights, tail_weights):
    """Lay the statistics of some genes out by problem p = (j - begin) K + k.

    level_weights[p, t]: counts above t.
    """
    n_low, n_components = first[-1], rate.shape[1]
    for j in range(begin, end):
        n_levels, n_tails = first[j + 1] - first[j], high_first[j + 1] - high_first[j]
        for k in range(n_components):
            p = (j - begin) * n_components + k
            totals[p] = above = 0.0
            for m in range(rate.shape[2]):
                rates[p, m] = rate[j, k, m]
                totals[p] += rate[j, k, m]
            for h in range(n_tails):
                tail_weights[p, h] = pair[n_low + high_first[j] + h, k]
                above += tail_weights[p, h]
            for t in range(n_levels - 1, -1, -1):
                above += pair[first[j] + t, k]
                level_weights[p, t] = above


@_exact
def _curves(
    begin,
    active,
    n_active,
    a,
    b,
    nodes,
    node,
    first,
    high_first,
    high_count,
    prior,
    rates,
    totals,
    level_weights,
    tail_weights,
    x,
    grown,
    share,
    y,
    bits,
    out,
):
    """Q, gradient and Hessian at (a, b) = (ln mu, ln r) of the active problems, into out (problems, 6).

    S_m rho of all problems, then t / r of all their levels, go through one vectorised logarithm.
    """
    width, n_components = nodes.shape[1], node.shape[0]
    for place in range(n_active):
        rho = math.exp(a[active[place]] - b[active[place]])
        j = begin + active[place] // n_components
        of_problem = x[place * width : (place + 1) * width]
        for m in range(width):
            of_problem[m] = nodes[j, m] * rho
    n = n_active * width
    for place in range(n_active):
        inverse = math.exp(-b[active[place]])
        j = begin + active[place] // n_components
        for t in range(1, first[j + 1] - first[j]):
            x[n] = t * inverse
            n += 1
    _log1p_and_share(n, x, grown, share, y, bits)
    n = n_active * width
    for place in range(n_active):
        p = active[place]
        j, k = begin + p // n_components, p % n_components
        r = math.exp(b[p])
        here = slice(place * width, (place + 1) * width)
        both_grown, both_share, both_bent, zero_share, zero_grown = _node_sums(
            p, k, r, rates, node, grown[here], share[here]
        )
        value = a[p] * totals[p] - both_grown
        grad_b = both_share - zero_grown
        hess_bb = 2.0 * zero_share - zero_grown - both_bent
        for t in range(1, first[j + 1] - first[j]):
            weight = level_weights[p, t]
            value += weight * grown[n]
            grad_b -= weight * share[n]
            hess_bb += weight * share[n] * (1.0 - share[n])
            n += 1
        for h in range(high_first[j + 1] - high_first[j]):
            weight = tail_weights[p, h]
            if weight != 0.0:
                tail, slope, bend = _tail(high_count[high_first[j] + h], r)
                value += weight * tail
                grad_b += weight * slope
                hess_bb += weight * bend
        off_a, off_b = a[p] - prior[0, j], b[p] - prior[2, j]
        out[p, 0] = value - (prior[1, j] * off_a * off_a + prior[3, j] * off_b * off_b) / 2.0
        out[p, 1] = totals[p] - both_share - prior[1, j] * off_a
        out[p, 2] = grad_b - prior[3, j] * off_b
        out[p, 3] = -both_bent - prior[1, j]
        out[p, 4] = both_bent - zero_share
        out[p, 5] = hess_bb - prior[3, j]


@_exact
def _most(first):
    most = 0
    for j in range(first.size - 1):
        most = max(most, first[j + 1] - first[j])
    return most


@_exact
def curvature_rows(begin, end, a, b, nodes, rate, node, pair, first, high_first, high_count, prior, out):
    """Value, gradient and Hessian of all components' problems of the genes begin..end into out (6, K, genes).

    a, b: (K, genes). nodes: (genes, padded) S_m, 0 where padded. rate: (genes, K, nodes). node: (K, padded).
    pair: (pairs, K). first, high_first: (genes + 1,) where a gene's low and high pairs begin. prior:
    (4, genes) centre and precision of a, then of b.
    """
    n_components, width = a.shape[0], nodes.shape[1]
    size = GENES_A_BLOCK * n_components
    rates, totals = np.zeros((size, width)), np.empty(size)
    level_weights = np.empty((size, LOW_LEVELS + 1))
    tail_weights = np.empty((size, _most(high_first)))
    n_values = size * (width + LOW_LEVELS)
    x, grown, share, y = np.empty(n_values), np.empty(n_values), np.empty(n_values), np.empty(n_values)
    bits = y.view(np.int64)
    active = np.arange(size)
    at_a, at_b, now = np.empty(size), np.empty(size), np.empty((size, N_CURVES))
    for start in range(begin, end, GENES_A_BLOCK):
        stop = min(start + GENES_A_BLOCK, end)
        _load(start, stop, rate, pair, first, high_first, rates, totals, level_weights, tail_weights)
        n_problems = (stop - start) * n_components
        for p in range(n_problems):
            j, k = start + p // n_components, p % n_components
            at_a[p], at_b[p] = a[k, j], b[k, j]
        _curves(
            start, active, n_problems, at_a, at_b, nodes, node, first, high_first, high_count, prior,
            rates, totals, level_weights, tail_weights, x, grown, share, y, bits, now,
        )  # fmt: skip
        for c in range(N_CURVES):
            for p in range(n_problems):
                out[c, p % n_components, start + p // n_components] = now[p, c]


@_loose
def _slope_sums(j, k, rho, r, nodes, rate, node, grown):
    """Over the nodes: A, (A + r R) share, r R ln(1 + S rho)."""
    total = both_share = zero_grown = 0.0
    for m in range(rate.shape[2]):
        zeros = r * node[k, m]
        x = nodes[j, m] * rho
        total += rate[j, k, m]
        both_share += (rate[j, k, m] + zeros) * (x / (1.0 + x))
        zero_grown += zeros * grown[j, k, m]
    return total, both_share, zero_grown


@_exact
def slope_rows(begin, end, a, b, nodes, rate, node, pair, first, high_first, high_count, grown, out):
    """Gradient of Q alone into out (2, K, genes), else as ``curvature_rows``; grown: ln(1 + S_m rho)."""
    n_components, n_low = a.shape[0], first[-1]
    for j in range(begin, end):
        for k in range(n_components):
            r = math.exp(b[k, j])
            total, both_share, zero_grown = _slope_sums(
                j, k, math.exp(a[k, j]) / r, r, nodes, rate, node, grown
            )
            grad_b, above = both_share - zero_grown, 0.0
            for h in range(high_first[j], high_first[j + 1]):
                weight = pair[n_low + h, k]
                if weight != 0.0:
                    grad_b += weight * _tail(high_count[h], r)[1]
                    above += weight
            for t in range(first[j + 1] - first[j] - 1, 0, -1):
                above += pair[first[j] + t, k]
                grad_b -= above * t / (r + t)
            out[0, k, j] = total - both_share
            out[1, k, j] = grad_b


@_exact
def _newton_step(k, now, pinned_a, pinned_b, damping, plateau_step):
    """``nbmix.components._newton_step`` of one problem."""
    grad_a = 0.0 if pinned_a else now[k, 1]
    grad_b = 0.0 if pinned_b else now[k, 2]
    off = 0.0 if pinned_a or pinned_b else -now[k, 4]
    aa = 1.0 if pinned_a else -now[k, 3]
    bb = 1.0 if pinned_b else -now[k, 5]
    middle = (aa + bb) / 2.0
    radius = math.sqrt((aa - bb) * (aa - bb) / 4.0 + off * off)
    least = 1e-6 * (abs(middle) + radius) + 1e-12
    shift = max(least - (middle - radius), 0.0) * 2.0 + damping
    aa += shift
    bb += shift
    determinant = aa * bb - off * off
    step_a = (bb * grad_a - off * grad_b) / determinant
    step_b = (aa * grad_b - off * grad_a) / determinant
    gain = (grad_a * step_a + grad_b * step_b) / 2.0
    if not pinned_b and now[k, 5] > 0.0 and grad_b < 0.0 and damping == 0.0:
        step_b = -plateau_step
        gain = max(gain, -grad_b * math.expm1(2.0 * plateau_step))
    return step_a, step_b, gain


@_exact
def newton_rows(
    begin, end, a, b, nodes, rate, node, pair, first, high_first, high_count, prior, limits, max_steps, out
):
    """Damped Newton on each problem of the genes begin..end, in place; arguments as in ``curvature_rows``.

    limits: tolerance in nats, longest step, plateau step, floor of a, least and largest b. out: (6, K,
    genes), the curvature where Newton ends.
    """
    tolerance, longest, plateau_step, floor, low_b, high_b = limits
    n_components, width = a.shape[0], nodes.shape[1]
    size = GENES_A_BLOCK * n_components
    rates, totals = np.zeros((size, width)), np.empty(size)
    level_weights = np.empty((size, LOW_LEVELS + 1))
    tail_weights = np.empty((size, _most(high_first)))
    n_values = size * (width + LOW_LEVELS)
    x, grown, share, y = np.empty(n_values), np.empty(n_values), np.empty(n_values), np.empty(n_values)
    bits = y.view(np.int64)
    active = np.empty(size, np.int64)
    at_a, at_b, damping = np.empty(size), np.empty(size), np.empty(size)
    next_a, next_b = np.empty(size), np.empty(size)
    now, then = np.empty((size, N_CURVES)), np.empty((size, N_CURVES))
    for start in range(begin, end, GENES_A_BLOCK):
        stop = min(start + GENES_A_BLOCK, end)
        _load(start, stop, rate, pair, first, high_first, rates, totals, level_weights, tail_weights)
        n_active = (stop - start) * n_components
        for p in range(n_active):
            j, k = start + p // n_components, p % n_components
            active[p], damping[p] = p, 0.0
            at_a[p], at_b[p] = max(a[k, j], floor), min(max(b[k, j], low_b), high_b)
        _curves(
            start, active, n_active, at_a, at_b, nodes, node, first, high_first, high_count, prior,
            rates, totals, level_weights, tail_weights, x, grown, share, y, bits, now,
        )  # fmt: skip
        for _ in range(max_steps):
            n_left = 0
            for place in range(n_active):
                p = active[place]
                pinned_a = at_a[p] <= floor and now[p, 1] <= 0.0
                pinned_b = (at_b[p] <= low_b and now[p, 2] <= 0.0) or (at_b[p] >= high_b and now[p, 2] >= 0.0)
                step_a, step_b, gain = _newton_step(p, now, pinned_a, pinned_b, damping[p], plateau_step)
                if gain > tolerance:
                    next_a[p] = max(at_a[p] + min(max(step_a, -longest), longest), floor)
                    next_b[p] = min(max(at_b[p] + min(max(step_b, -longest), longest), low_b), high_b)
                    active[n_left] = p
                    n_left += 1
            n_active = n_left
            if n_active == 0:
                break
            _curves(
                start, active, n_active, next_a, next_b, nodes, node, first, high_first, high_count, prior,
                rates, totals, level_weights, tail_weights, x, grown, share, y, bits, then,
            )  # fmt: skip
            for place in range(n_active):
                p = active[place]
                if then[p, 0] >= now[p, 0]:
                    at_a[p], at_b[p] = next_a[p], next_b[p]
                    damping[p] /= 8.0
                    for c in range(N_CURVES):
                        now[p, c] = then[p, c]
                else:
                    damping[p] = max(damping[p] * 8.0, max(abs(now[p, 3]), abs(now[p, 5])) * 0.1)
        for p in range((stop - start) * n_components):
            a[p % n_components, start + p // n_components] = at_a[p]
            b[p % n_components, start + p // n_components] = at_b[p]
            for c in range(N_CURVES):
                out[c, p % n_components, start + p // n_components] = now[p, c]


@_loose
def _loading_sums(j, k, rho, r, reach, rate, node, pulls, bends):
    """Add A - (A + r R) share, and (A + r R) share (1 - share), node by node, to pulls and bends (nodes,)."""
    for m in range(reach.size):
        x = reach[m] * rho
        share = x / (1.0 + x)
        both = (rate[j, k, m] + r * node[k, m]) * share
        pulls[m] += rate[j, k, m] - both
        bends[m] += both * (1.0 - share)


@_exact
def _solve_symmetric(matrix, right):
    """Solve in place, by Cholesky; ``matrix`` (small) is positive definite.

    Where rounding leaves it otherwise, a pivot is kept above a small part of its diagonal.
    """
    n = right.size
    for i in range(n):
        least = 1e-6 * abs(matrix[i, i])
        for t in range(i + 1):
            total = matrix[i, t]
            for u in range(t):
                total -= matrix[i, u] * matrix[t, u]
            matrix[i, t] = math.sqrt(max(total, least)) if i == t else total / matrix[t, t]
    for i in range(n):
        for u in range(i):
            right[i] -= matrix[i, u] * right[u]
        right[i] /= matrix[i, i]
    for i in range(n - 1, -1, -1):
        for u in range(i + 1, n):
            right[i] -= matrix[u, i] * right[u]
        right[i] /= matrix[i, i]


@_exact
def loading_rows(begin, end, a, b, v, log_nodes, effects, rate, node, precision, n_steps, out):
    """Newton on the loadings of the genes begin..end, in place: v (genes, E).

    Q is concave in v: sum_km A_km v e_m - (A_km + r R_km) ln(1 + rho S_m exp(v e_m)) - sum precision v^2 / 2.
    a, b: (K, genes). log_nodes: (nodes,) ln S_m. effects: (E, nodes). rate: (genes, K, nodes). node: (K,
    nodes). precision: (E,). out: (genes, E), diagonal of minus the Hessian where Newton ends. The first
    loading stays within LARGEST_POWER.
    """
    n_components, width = rate.shape[1], rate.shape[2]
    n_effects = effects.shape[0]
    reach, pulls, bends = np.empty(width), np.empty(width), np.empty(width)
    slope, hessian = np.empty(n_effects), np.empty((n_effects, n_effects))
    for j in range(begin, end):
        for step in range(n_steps + 1):
            for m in range(width):
                shift = log_nodes[m]
                for e in range(n_effects):
                    shift += v[j, e] * effects[e, m]
                reach[m] = math.exp(shift)
                pulls[m] = bends[m] = 0.0
            for k in range(n_components):
                r = math.exp(b[k, j])
                _loading_sums(j, k, math.exp(a[k, j]) / r, r, reach, rate, node, pulls, bends)
            for e in range(n_effects):
                slope[e] = -precision[e] * v[j, e]
                for m in range(width):
                    slope[e] += pulls[m] * effects[e, m]
                for f in range(e + 1):
                    hessian[e, f] = precision[e] if e == f else 0.0
                    for m in range(width):
                        hessian[e, f] += bends[m] * effects[e, m] * effects[f, m]
                out[j, e] = hessian[e, e]
            if step < n_steps:
                if abs(v[j, 0]) >= LARGEST_POWER and slope[0] * v[j, 0] > 0.0:  # it stays at its bound
                    slope[0], hessian[0, 0] = 0.0, 1.0
                    for e in range(1, n_effects):
                        hessian[e, 0] = 0.0
                _solve_symmetric(hessian, slope)
                for e in range(n_effects):
                    v[j, e] += min(max(slope[e], -LONGEST_LOADING_STEP), LONGEST_LOADING_STEP)
                v[j, 0] = min(max(v[j, 0], -LARGEST_POWER), LARGEST_POWER)


@_exact
def grown_rows(begin, end, a, b, nodes, n_nodes, chunk, grown, zero):
    """ln(1 + S_m rho) of the genes begin..end into grown (genes, K, nodes).

    a, b: (K, genes). nodes: (genes, padded). zero: (chunks, K, nodes), where row ``begin // chunk`` gets
    sum_j r ln(1 + S_m rho) of these genes.
    """
    n_components, width = a.shape[0], nodes.shape[1]
    size = GENES_A_BLOCK * n_components
    x, found, share = np.empty((size, width)), np.empty((size, width)), np.empty((size, width))
    y = np.empty(size * width)
    bits = y.view(np.int64)
    total = np.zeros((n_components, width))
    for start in range(begin, end, GENES_A_BLOCK):
        n_problems = (min(start + GENES_A_BLOCK, end) - start) * n_components
        for p in range(n_problems):
            j, k = start + p // n_components, p % n_components
            rho = math.exp(a[k, j] - b[k, j])
            for m in range(width):
                x[p, m] = nodes[j, m] * rho
        _log1p_and_share(n_problems * width, x.reshape(-1), found.reshape(-1), share.reshape(-1), y, bits)
        for p in range(n_problems):
            j, k = start + p // n_components, p % n_components
            r = math.exp(b[k, j])
            for m in range(width):
                total[k, m] += r * found[p, m]
            for m in range(n_nodes):
                grown[j, k, m] = found[p, m]
    for k in range(n_components):
        for m in range(n_nodes):
            zero[begin // chunk, k, m] = total[k, m]


@_exact
def pair_rows(begin, end, b, first, high_first, high_count, pair):
    """D(c, r) of the genes begin..end into pair (pairs, K); b (K, genes) is ln r."""
    n_components, n_low = b.shape[0], first[-1]
    for j in range(begin, end):
        for k in range(n_components):
            r, total = math.exp(b[k, j]), 0.0
            for t in range(first[j + 1] - first[j]):
                if t > 0:
                    total += math.log1p(t / r)
                pair[first[j] + t, k] = total
            for h in range(high_first[j], high_first[j + 1]):
                pair[n_low + h, k] = total + _tail(high_count[h], r)[0]


@_exact
def split_table_rows(begin, end, used, gene, count, rate, pair, unit, table):
    """What used pairs begin..end add, cut into a multiple of ``unit`` and the rest.

    rate: (genes, K, nodes). pair: (pairs, K). table: (used, 2 K nodes or more) float32.
    """
    n_components, n_nodes = rate.shape[1], rate.shape[2]
    width = n_components * n_nodes
    shift = ROUNDING_SHIFT * unit
    for u in range(begin, end):
        j, c = gene[used[u]], count[used[u]]
        for k in range(n_components):
            d = pair[used[u], k]
            for m in range(n_nodes):
                value = c * rate[j, k, m] + d
                coarse = (value + shift) - shift
                table[u, k * n_nodes + m] = coarse
                table[u, width + k * n_nodes + m] = value - coarse


@_exact
def step_table_rows(begin, end, used, gene, count, rate, pair, unit, table):
    """As ``split_table_rows`` for the first node, then the steps from it to the others.

    Steps are split into their mean over components, itself cut like the values, and the rest.
    table (used, width or more) float32: coarse part and rest of K values at the first node, K (nodes - 1)
    steps less their means, coarse part and rest of the nodes - 1 means, and a bound on the steps less theirs.
    """
    n_components, n_nodes = rate.shape[1], rate.shape[2]
    n_steps = n_nodes - 1
    n_rests = n_components * n_steps
    of_means = 2 * n_components + n_rests
    means, rests, largest = np.empty(n_steps), np.empty(n_rests), 0.0  # of one count of the gene
    shift = ROUNDING_SHIFT * unit
    of_gene = -1
    for u in range(begin, end):
        j, c = gene[used[u]], count[used[u]]
        if j != of_gene:
            of_gene, largest = j, 0.0
            means[:] = 0.0
            for k in range(n_components):
                for m in range(n_steps):
                    means[m] += (rate[j, k, m + 1] - rate[j, k, 0]) / n_components
            for k in range(n_components):
                for m in range(n_steps):
                    rest = rate[j, k, m + 1] - rate[j, k, 0] - means[m]
                    rests[k * n_steps + m] = rest
                    largest = max(largest, abs(rest))
        row = table[u]
        for k in range(n_components):
            value = c * rate[j, k, 0] + pair[used[u], k]
            coarse = (value + shift) - shift
            row[k] = coarse
            row[n_components + k] = value - coarse
        of_steps = row[2 * n_components : of_means]
        for q in range(n_rests):
            of_steps[q] = c * rests[q]
        for m in range(n_steps):
            coarse = (c * means[m] + shift) - shift
            row[of_means + m] = coarse
            row[of_means + n_steps + m] = c * means[m] - coarse
        row[of_means + 2 * n_steps] = c * largest


@_exact
def _at_or_after(values, wanted, low, high):
    """The first position of ``wanted`` or more among values[low:high], which ascend."""
    while low < high:
        middle = (low + high) // 2
        if values[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@_exact
def _add_summed(c, summed, by_node, of_pair):
    """Add what the cells of a used pair, of count c, sum to: (K nodes or more) to (K, nodes)."""
    n_components, n_nodes = by_node.shape
    for k in range(n_components):
        of_component, into = summed[k * n_nodes : (k + 1) * n_nodes], by_node[k]
        total = 0.0
        for m in range(n_nodes):
            into[m] += c * of_component[m]
            total += of_component[m]
        of_pair[k] += total


@_exact
def gathered_rows(begin, end, used, first, high_first, high_count, summed, to_all, rate, pair):
    """Add a batch's sums to rate (genes, K, nodes) and pair (pairs, K) of the genes begin..end.

    used: the pairs of the batch. first, high_first, high_count: see ``CountLevels``. summed: (used, K own
    nodes or more) of q w. to_all: (own nodes, nodes), how sums at the batch's nodes spread to those of all.
    """
    n_low, n_components = first[-1], rate.shape[1]
    by_node = np.empty((n_components, to_all.shape[0]))
    low = _at_or_after(used, first[begin], 0, used.size)
    high = _at_or_after(used, n_low + high_first[begin], 0, used.size)
    for j in range(begin, end):
        is_there = False
        by_node[:] = 0.0
        while low < used.size and used[low] < first[j + 1]:
            _add_summed(float(used[low] - first[j] + 1), summed[low], by_node, pair[used[low]])
            low, is_there = low + 1, True
        while high < used.size and used[high] < n_low + high_first[j + 1]:
            _add_summed(high_count[used[high] - n_low], summed[high], by_node, pair[used[high]])
            high, is_there = high + 1, True
        if is_there:
            for k in range(n_components):
                into = rate[j, k]
                for m in range(to_all.shape[0]):
                    value, spread = by_node[k, m], to_all[m]
                    for n in range(into.size):
                        into[n] += value * spread[n]


@_exact
def code_rows(rows, indptr, indices, counts, first, high_first, high_count, log_factorial, codes, constant):
    """Code the nonzeros of some rows of a CSR matrix by their pair of gene and count.

    Fills codes (nonzeros,) row by row, and constant (rows,) with -sum_j ln G(x_ij + 1). Returns the position
    in ``rows`` of the first row with a pair that is not listed, or -1.
    """
    n_low, at = first[-1], 0
    for i in range(rows.size):
        total = 0.0
        for t in range(indptr[rows[i]], indptr[rows[i] + 1]):
            j, c = indices[t], int(counts[t])
            if c <= LOW_LEVELS:
                code = first[j] + c - 1
                if code >= first[j + 1]:
                    return i
            else:
                low = _at_or_after(high_count, c, high_first[j], high_first[j + 1])
                if low == high_first[j + 1] or high_count[low] != c:
                    return i
                code = n_low + low
            codes[at] = code
            at += 1
            if c > 1:
                total -= log_factorial[c] if c < log_factorial.size else math.lgamma(c + 1.0)
        constant[i] = total
    return -1


@_exact
def compact_columns(columns, position):
    """Renumber ``columns`` in place to 0, 1, ... in their order; returns the sorted distinct columns.

    ``position`` (all columns,) is zero and scratch.
    """
    for t in range(columns.size):
        position[columns[t]] = 1
    n_used = 0
    for c in range(position.size):
        if position[c]:
            position[c] = n_used
            n_used += 1
        else:
            position[c] = -1
    used = np.empty(n_used, np.int64)
    for c in range(position.size):
        if position[c] >= 0:
            used[position[c]] = c
    for t in range(columns.size):
        columns[t] = position[columns[t]]
    return used


@_exact
def transpose_pattern(indptr, columns, n_columns):
    """indptr and rows of the transpose of a CSR pattern, by counting; rows ascend."""
    turned = np.zeros(n_columns + 1, indptr.dtype)
    for t in range(columns.size):
        turned[columns[t] + 1] += 1
    for c in range(n_columns):
        turned[c + 1] += turned[c]
    place = turned[:-1].copy()
    rows = np.empty(columns.size, columns.dtype)
    for i in range(indptr.size - 1):
        for t in range(indptr[i], indptr[i + 1]):
            rows[place[columns[t]]] = i
            place[columns[t]] += 1
    return turned, rows


@_exact
def largest_and_high(begin, end, indices, counts, largest):
    """Raise largest (genes,) to the counts of nonzeros begin..end; their (gene, count) above LOW_LEVELS."""
    n_high = 0
    for t in range(begin, end):
        c = int(counts[t])
        if c > largest[indices[t]]:
            largest[indices[t]] = c
        n_high += c > LOW_LEVELS
    keys = np.empty(n_high, np.int64)
    at = 0
    for t in range(begin, end):
        c = int(counts[t])
        if c > LOW_LEVELS:
            keys[at] = (np.int64(indices[t]) << 32) | c
            at += 1
    return keys


@_exact
def interpolation_weights(size_factors, log_nodes, barycentric, weights):
    """Barycentric weights (cells, nodes) at ln s between nodes; a row of zeros where s = 0."""
    for i in range(size_factors.size):
        if size_factors[i] <= 0.0:
            weights[i] = 0.0
            continue
        log_s, hit, total = math.log(size_factors[i]), -1, 0.0
        for m in range(log_nodes.size):
            gap = log_s - log_nodes[m]
            if gap == 0.0:
                hit, gap = m, 1.0
            weights[i, m] = barycentric[m] / gap
            total += weights[i, m]
        if hit >= 0:
            weights[i] = 0.0
            weights[i, hit] = 1.0
        else:
            for m in range(log_nodes.size):
                weights[i, m] /= total

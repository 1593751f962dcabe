"""The expected log likelihood of many genes with its derivatives, and damped Newton on it."""

from __future__ import annotations

import math

import numpy as np

from nbmix.core.kernels.elementary import LOW_LEVELS, exact, log1p_and_share, loose, tail_of_count

N_CURVES = 6  # value, gradient (2) and Hessian (3) of a problem

GENES_A_BLOCK = 16  # whose nodes are evaluated together


@loose
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


@exact
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


@exact
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
    log1p_and_share(n, x, grown, share, y, bits)
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
                tail, slope, bend = tail_of_count(high_count[high_first[j] + h], r)
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


@exact
def _most(first):
    most = 0
    for j in range(first.size - 1):
        most = max(most, first[j + 1] - first[j])
    return most


@exact
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


@loose
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


@exact
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
                    grad_b += weight * tail_of_count(high_count[h], r)[1]
                    above += weight
            for t in range(first[j + 1] - first[j] - 1, 0, -1):
                above += pair[first[j] + t, k]
                grad_b -= above * t / (r + t)
            out[0, k, j] = total - both_share
            out[1, k, j] = grad_b


@exact
def _newton_step(k, now, pinned_a, pinned_b, damping, plateau_step):
    """``nbmix.core.m_step._newton_step`` of one problem."""
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


@exact
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

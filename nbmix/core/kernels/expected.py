"""Q of ``nbmix.core.expected_log_likelihood`` with its derivatives, many genes at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nbmix.core.kernels.blocks import GENES_A_BLOCK
from nbmix.core.kernels.elementary import (
    LOW_LEVELS,
    LogBuffers,
    log1p_and_share,
    log_buffers,
    ordered,
    reordered,
    tail_of_count,
)
from nbmix.core.kernels.sparse import PairPlaces

N_CURVES = 6  # value, gradient (2) and Hessian (3) of a problem


class ExpectedSums(NamedTuple):
    """What Q of all genes and components is a function of.

    Attributes:
        nodes: (genes, padded) S_m, 0 where padded.
        rate: (genes, K, nodes) A.
        node: (genes, K, padded) R, or (1, K, padded) where it is the same for all genes.
        pair: (pairs, K) B.
        places: of the pairs.
        prior: (4, genes) centre and precision of a = ln mu, then of b = ln r; 0 where there is no prior.
    """

    nodes: np.ndarray
    rate: np.ndarray
    node: np.ndarray
    pair: np.ndarray
    places: PairPlaces
    prior: np.ndarray


class Block(NamedTuple):
    """The sums of a block of genes, laid out by problem p = (j - first gene) K + k.

    Attributes:
        rates: (problems, padded) A.
        totals: (problems,) sum_m A.
        level_weights: (problems, levels) counts above t.
        tail_weights: (problems, high counts of the gene that has most).
        logs: of all nodes and levels.
    """

    rates: np.ndarray
    totals: np.ndarray
    level_weights: np.ndarray
    tail_weights: np.ndarray
    logs: LogBuffers


@ordered
def empty_block(sums):
    """Room for GENES_A_BLOCK genes."""
    width, high_first, most = sums.nodes.shape[1], sums.places.high_first, 0
    for j in range(high_first.size - 1):
        most = max(most, high_first[j + 1] - high_first[j])
    size = GENES_A_BLOCK * sums.node.shape[1]
    return Block(
        np.zeros((size, width)),
        np.empty(size),
        np.empty((size, LOW_LEVELS + 1)),
        np.empty((size, most)),
        log_buffers(size * (width + LOW_LEVELS)),
    )


@ordered
def load(begin, end, sums, block):
    """Lay the genes begin..end out in a"""
    rates, totals, level_weights, tail_weights, _ = block
    rate, pair = sums.rate, sums.pair
    first, high_first = sums.places.first, sums.places.high_first
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


@reordered
def _node_sums(p, r, rate, node, grown, share):
    """Sums over the nodes of problem p, whose R is ``node`` (padded,); both = A + r R."""
    both_grown = both_share = both_bent = zero_share = zero_grown = 0.0
    for m in range(node.shape[0]):
        zeros = r * node[m]
        both = rate[p, m] + zeros
        both_grown += both * grown[m]
        both_share += both * share[m]
        both_bent += both * share[m] * (1.0 - share[m])
        zero_share += zeros * share[m]
        zero_grown += zeros * grown[m]
    return both_grown, both_share, both_bent, zero_share, zero_grown


@ordered
def evaluate(begin, active, a, b, sums, block, out):
    """Q, gradient and Hessian at (a, b) = (ln mu, ln r) of the active problems, into out (problems, 6).

    ``block`` holds the genes from ``begin`` on. S_m rho of all problems, then t / r of all their levels, go
    through one vectorised logarithm.
    """
    nodes, node, prior = sums.nodes, sums.node, sums.prior
    first, high_first, high_count = sums.places.first, sums.places.high_first, sums.places.high_count
    rates, totals, level_weights, tail_weights, logs = block
    x, grown, share, y, bits = logs
    width, n_components = nodes.shape[1], node.shape[1]
    for place in range(active.size):
        rho = math.exp(a[active[place]] - b[active[place]])
        j = begin + active[place] // n_components
        of_problem = x[place * width : (place + 1) * width]
        for m in range(width):
            of_problem[m] = nodes[j, m] * rho
    n = active.size * width
    for place in range(active.size):
        inverse = math.exp(-b[active[place]])
        j = begin + active[place] // n_components
        for t in range(1, first[j + 1] - first[j]):
            x[n] = t * inverse
            n += 1
    log1p_and_share(n, x, grown, share, y, bits)
    n = active.size * width
    for place in range(active.size):
        p = active[place]
        j, k = begin + p // n_components, p % n_components
        r = math.exp(b[p])
        here = slice(place * width, (place + 1) * width)
        both_grown, both_share, both_bent, zero_share, zero_grown = _node_sums(
            p, r, rates, node[j if node.shape[0] > 1 else 0, k], grown[here], share[here]
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


@ordered
def curvature_rows(begin, end, a, b, sums, out):
    """Value, gradient and Hessian of all components' problems of the genes begin..end into out (6, K, genes).

    a, b: (K, genes).
    """
    n_components = a.shape[0]
    size, block = GENES_A_BLOCK * n_components, empty_block(sums)
    at_a, at_b, now = np.empty(size), np.empty(size), np.empty((size, N_CURVES))
    for start in range(begin, end, GENES_A_BLOCK):
        stop = min(start + GENES_A_BLOCK, end)
        load(start, stop, sums, block)
        n_problems = (stop - start) * n_components
        for p in range(n_problems):
            j, k = start + p // n_components, p % n_components
            at_a[p], at_b[p] = a[k, j], b[k, j]
        evaluate(start, np.arange(n_problems), at_a, at_b, sums, block, now)
        for c in range(N_CURVES):
            for p in range(n_problems):
                out[c, p % n_components, start + p // n_components] = now[p, c]


@reordered
def _slope_sums(rho, r, nodes, rate, node, grown):
    """Over the nodes: A, (A + r R) share, r R ln(1 + S rho)."""
    total = both_share = zero_grown = 0.0
    for m in range(rate.size):
        zeros = r * node[m]
        x = nodes[m] * rho
        total += rate[m]
        both_share += (rate[m] + zeros) * (x / (1.0 + x))
        zero_grown += zeros * grown[m]
    return total, both_share, zero_grown


@ordered
def slope_rows(begin, end, a, b, sums, grown, out):
    """Gradient of Q alone, without the prior, into out (2, K, genes), else as ``curvature_rows``.

    grown: (genes, K, nodes) ln(1 + S_m rho).
    """
    nodes, rate, node, pair = sums.nodes, sums.rate, sums.node, sums.pair
    first, high_first, high_count = sums.places.first, sums.places.high_first, sums.places.high_count
    n_components, n_low = a.shape[0], first[-1]
    for j in range(begin, end):
        for k in range(n_components):
            r, of_zeros = math.exp(b[k, j]), node[j if node.shape[0] > 1 else 0, k]
            total, both_share, zero_grown = _slope_sums(
                math.exp(a[k, j]) / r, r, nodes[j], rate[j, k], of_zeros, grown[j, k]
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

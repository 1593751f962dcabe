"""Offsets of the genes of one origin: Newton on them, and statistics brought to the nodes that all share."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nbmix.core.kernels.blocks import LANES
from nbmix.core.kernels.elementary import ordered, reordered


class OffsetProblem(NamedTuple):
    """What Q is a function of in the offsets of one origin.

    Attributes:
        log_nodes: (nodes,) ln S_m, level by level where there are levels.
        effects: (E, nodes) what a gene's loadings multiply; E = 0 where there are none.
        loadings: (genes, E), the first of which is the power of the size factor.
        rate: (genes, K, nodes) A of the cells of the origin.
        node: (K, nodes) R.
        precision: (genes,) of the offsets around 0.
        longest, largest: bounds of a step and of an offset.
    """

    log_nodes: np.ndarray
    effects: np.ndarray
    loadings: np.ndarray
    rate: np.ndarray
    node: np.ndarray
    precision: np.ndarray
    longest: float
    largest: float


@reordered
def _sums(j, k, rho, r, reach, rate, node):
    """Over the nodes: A - (A + r R) share, and (A + r R) share (1 - share)."""
    pull = bend = 0.0
    for m in range(reach.size):
        x = reach[m] * rho
        share = x / (1.0 + x)
        both = (rate[j, k, m] + r * node[k, m]) * share
        pull += rate[j, k, m] - both
        bend += both * (1.0 - share)
    return pull, bend


@ordered
def offset_rows(begin, end, rho, r, problem, offset, information):
    """A step of Newton on the offsets of the genes begin..end, in place: offset, information (genes,).

    Q is concave in an offset d, with e = 1 + g what a gene makes of the size factor,

        sum_km A_km e d - (A_km + r R_km) ln(1 + rho S_m exp(v e_m + e d)) - precision d^2 / 2.

    rho, r: (genes, K) mu / r and r. problem: ``OffsetProblem``. ``information`` gets minus the second
    derivative without the prior, where the step begins.
    """
    log_nodes, effects, loadings, rate, node, precision, longest, largest = problem
    n_components, width = node.shape
    reach = np.empty(width)
    for j in range(begin, end):
        effect = 1.0 + loadings[j, 0] if loadings.shape[1] else 1.0
        for m in range(width):
            shift = log_nodes[m] + effect * offset[j]
            for e in range(effects.shape[0]):
                shift += loadings[j, e] * effects[e, m]
            reach[m] = math.exp(shift)
        slope = bend = 0.0
        for k in range(n_components):
            pull, curved = _sums(j, k, rho[j, k], r[j, k], reach, rate, node)
            slope += pull
            bend += curved
        information[j] = max(bend, 0.0) * effect * effect
        step = (slope * effect - precision[j] * offset[j]) / (information[j] + precision[j])
        offset[j] = min(max(offset[j] + min(max(step, -longest), longest), -largest), largest)


@ordered
def _interpolation(at, j, log_nodes, barycentric, row, out):
    """Weights that interpolate between the nodes of gene j to ``at``, into a row of ``out``."""
    hit = -1
    for m in range(barycentric.size):
        if at == log_nodes[j, m]:
            hit = m
    if hit >= 0:
        for m in range(barycentric.size):
            out[row, m] = 1.0 if m == hit else 0.0
        return
    total = 0.0
    for m in range(barycentric.size):
        out[row, m] = barycentric[m] / (at - log_nodes[j, m])
    for m in range(barycentric.size):
        total += out[row, m]
    scale = 1.0 / total
    for m in range(barycentric.size):
        out[row, m] *= scale


@ordered
def shifted_rows(begin, end, genes, offset, base, nodes, n_levels, seen, total):
    """Add the statistics of the genes in rows begin..end, with nodes moved by their offsets, at other nodes.

    genes: (rows,) which these are. offset: (rows,). base: (rows,) offsets at which the same statistics are
    there already, and are taken off, so that nothing is to be done where both are the same; (0,) where they
    are not there. nodes: (M,)
    ln S_m, (genes, N) the logarithms of the other ones, N a multiple of LANES, and (N,) their barycentric
    weights. seen: A (rows, K, L M) and R (1, K, L M). total: both (genes, K, L N).
    """
    log_nodes, to_nodes, barycentric = nodes
    rate, node = seen
    to_rate, to_node = total
    n_from, n_to, n_components = log_nodes.size, barycentric.size, rate.shape[1]
    weights, others = np.empty((n_from, n_to)), np.empty((n_from, n_to))
    for row in range(begin, end):
        if base.size > 0 and offset[row] == base[row]:
            continue
        j = genes[row]
        for m in range(n_from):
            _interpolation(log_nodes[m] + offset[row], j, to_nodes, barycentric, m, weights)
        if base.size > 0:
            for m in range(n_from):
                _interpolation(log_nodes[m] + base[row], j, to_nodes, barycentric, m, others)
                for n in range(n_to):
                    weights[m, n] -= others[m, n]
        counted = 0.0
        for k in range(n_components):
            for m in range(rate.shape[2]):
                counted += abs(rate[row, k, m])
        for part in range(n_components * n_levels):
            k, first, to = part // n_levels, part % n_levels * n_from, part % n_levels * n_to
            for n in range(0, n_to, LANES):
                _add_lanes(weights, n, node, 0, k, first, to_node, j, to)
                if counted > 0.0:
                    _add_lanes(weights, n, rate, row, k, first, to_rate, j, to)


@ordered
def _add_lanes(weights, n, values, i, k, first, into, j, to):
    """Add sum_m values[i, k, first + m] weights[m, n:n + LANES] to into[j, k, to + n:], in registers."""
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = 0.0
    for m in range(weights.shape[0]):
        value = values[i, k, first + m]
        a0 += value * weights[m, n]
        a1 += value * weights[m, n + 1]
        a2 += value * weights[m, n + 2]
        a3 += value * weights[m, n + 3]
        a4 += value * weights[m, n + 4]
        a5 += value * weights[m, n + 5]
        a6 += value * weights[m, n + 6]
        a7 += value * weights[m, n + 7]
    to += n
    into[j, k, to] += a0
    into[j, k, to + 1] += a1
    into[j, k, to + 2] += a2
    into[j, k, to + 3] += a3
    into[j, k, to + 4] += a4
    into[j, k, to + 5] += a5
    into[j, k, to + 6] += a6
    into[j, k, to + 7] += a7

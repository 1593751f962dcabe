"""Offsets of the genes of one origin: Newton on them, and statistics brought to the nodes that all share."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

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
def _sums(rho, r, reach, rate, node):
    """Over the nodes: A - (A + r R) share, and (A + r R) share (1 - share)."""
    pull = bend = 0.0
    for m in range(reach.size):
        x = reach[m] * rho
        share = x / (1.0 + x)
        both = (rate[m] + r * node[m]) * share
        pull += rate[m] - both
        bend += both * (1.0 - share)
    return pull, bend


@ordered
def offset_rows(begin, end, a, b, problem, offset, information):
    """A step of Newton on the offsets of the genes begin..end, in place: offset, information (genes,).

    Q is concave in an offset d, with e = 1 + g what a gene makes of the size factor,

        sum_km A_km e d - (A_km + r R_km) ln(1 + rho S_m exp(v e_m + e d)) - precision d^2 / 2.

    a, b: (K, genes) ln mu and ln r. problem: ``OffsetProblem``. ``information`` gets minus the second
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
            r = math.exp(b[k, j])
            pull, curved = _sums(math.exp(a[k, j]) / r, r, reach, rate[j, k], node[k])
            slope += pull
            bend += curved
        information[j] = max(bend, 0.0) * effect * effect
        step = (slope * effect - precision[j] * offset[j]) / (information[j] + precision[j])
        offset[j] = min(max(offset[j] + min(max(step, -longest), longest), -largest), largest)


@ordered
def _interpolation(at, log_nodes, barycentric, out):
    """Weights (nodes,) that interpolate to ``at``."""
    total = 0.0
    for m in range(log_nodes.size):
        gap = at - log_nodes[m]
        if gap == 0.0:
            out[:] = 0.0
            out[m] = 1.0
            return
        out[m] = barycentric[m] / gap
        total += out[m]
    for m in range(log_nodes.size):
        out[m] /= total


@ordered
def shifted_rows(begin, end, offset, nodes, n_levels, seen, total):
    """Add the statistics of the genes begin..end, with nodes moved by their offsets, at other nodes.

    offset: (genes,). nodes: (M,) ln S_m, and of the other N their logarithms and barycentric weights. seen:
    A (genes, K, L M) and R (K, L M). total: both (genes, K, L N).
    """
    log_nodes, to_nodes, barycentric = nodes
    rate, node = seen
    to_rate, to_node = total
    n_from, n_to, n_components = log_nodes.size, to_nodes.size, node.shape[0]
    weights = np.empty((n_from, n_to))
    for j in range(begin, end):
        for m in range(n_from):
            _interpolation(log_nodes[m] + offset[j], to_nodes, barycentric, weights[m])
        counted = 0.0
        for k in range(n_components):
            for m in range(rate.shape[2]):
                counted += abs(rate[j, k, m])
        for k in range(n_components):
            for at in range(n_levels):
                for m in range(n_from):
                    of_zeros, of_counts = node[k, at * n_from + m], rate[j, k, at * n_from + m]
                    for n in range(n_to):
                        to_node[j, k, at * n_to + n] += of_zeros * weights[m, n]
                    if counted > 0.0:
                        for n in range(n_to):
                            to_rate[j, k, at * n_to + n] += of_counts * weights[m, n]

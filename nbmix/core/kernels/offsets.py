"""Offsets of genes by origin: Newton on them, and statistics brought to the nodes that all origins share."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nbmix.core.kernels.blocks import LANES
from nbmix.core.kernels.elementary import ordered, reordered


class SeenCells(NamedTuple):
    """Statistics of genes of origins, a row each, gene by gene.

    Attributes:
        first: (genes + 1,) where the rows of each gene begin.
        origin: (rows,).
        rate: (folds, rows, K L M) A, level by level where there are levels.
        node: (copies, origins, K L M) R of the cells that each copy sees.
        without: (copies,) the fold that each does not see; -1: none.
        log_nodes: (M,) ln S_m.
    """

    first: np.ndarray
    origin: np.ndarray
    rate: np.ndarray
    node: np.ndarray
    without: np.ndarray
    log_nodes: np.ndarray


class JudgedBy(NamedTuple):
    """What Q is a function of beside the offsets, copy by copy.

    Attributes:
        rho, inv_disp: (copies, genes, K) mu / r and r.
        loadings: (copies, genes, E), the first of which is the power of the size factor; E = 0: none.
        effects: (E, L M) what they multiply.
        precision: (copies, genes) of the offsets around 0.
        base: (copies, genes) offset of a gene where it has none of its own.
        may_step: (copies, rows) whether one may be worth a step.
        longest, largest: bounds of a step and of an offset; with 0 for ``longest`` none is taken.
        least_gain: nats, by which all cells of an origin have to gain by another offset than ``base``.
    """

    rho: np.ndarray
    inv_disp: np.ndarray
    loadings: np.ndarray
    effects: np.ndarray
    precision: np.ndarray
    base: np.ndarray
    may_step: np.ndarray
    longest: float
    largest: float
    least_gain: float


class SharedNodes(NamedTuple):
    """Statistics of all origins together, at nodes of every gene's own.

    Attributes:
        log_nodes: (genes, N), N a multiple of LANES.
        barycentric: (N,).
        rate, node: (copies, genes, K L N).
        have_cells: they have the cells at ``JudgedBy.base`` already, from where they are moved.
    """

    log_nodes: np.ndarray
    barycentric: np.ndarray
    rate: np.ndarray
    node: np.ndarray
    have_cells: bool


@ordered
def _less(total, part, out):
    """total - part into ``out``, (values,) each."""
    for q in range(out.size):
        out[q] = total[q] - part[q]


@reordered
def _slope_and_bend(scale, reach, r, seen, node):
    """Sums of A - (A + r R) share, and of (A + r R) share (1 - share)."""
    pull = bend = 0.0
    for q in range(reach.size):
        x = scale * reach[q]
        share = x / (1.0 + x)
        both = (seen[q] + r[q] * node[q]) * share
        pull += seen[q] - both
        bend += both * (1.0 - share)
    return pull, bend


@ordered
def _reach(c, j, judged, log_nodes, reach, r):
    """S rho where a gene has no offset, and r, at all components, levels and nodes: (K L M,) each."""
    n_components, n_nodes = judged.rho.shape[2], log_nodes.size
    width = reach.size // n_components
    for m in range(width):
        shift = log_nodes[m % n_nodes]
        for e in range(judged.effects.shape[0]):
            shift += judged.loadings[c, j, e] * judged.effects[e, m]
        reach[m] = math.exp(shift)
    for k in range(n_components - 1, -1, -1):
        for m in range(width):
            reach[k * width + m] = reach[m] * judged.rho[c, j, k]
            r[k * width + m] = judged.inv_disp[c, j, k]


@reordered
def _weights(offset, log_nodes, to_nodes, barycentric, out):
    """Weights that interpolate from the nodes (N,) of a gene to these with an offset: ``out`` (M, N)."""
    for m in range(log_nodes.size):
        at, total, into = log_nodes[m] + offset, 0.0, out[m]
        for n in range(to_nodes.size):
            part = barycentric[n] / (at - to_nodes[n])
            into[n] = part
            total += part
        if math.isfinite(total):
            scale = 1.0 / total
            for n in range(to_nodes.size):
                into[n] *= scale
        else:  # it is one of them
            for n in range(to_nodes.size):
                into[n] = 1.0 if at == to_nodes[n] else 0.0


@ordered
def _add_moved(weights, values, into):
    """Add values (parts M,) at other nodes to into (parts N,)."""
    n_from, n_to = weights.shape
    for n in range(0, n_to, LANES):
        for part in range(values.size // n_from):
            lanes = into[part * n_to + n : part * n_to + n + LANES]
            for m in range(n_from):
                value, of_lanes = values[part * n_from + m], weights[m, n : n + LANES]
                for lane in range(LANES):  # as many as the compiler knows, which it takes at once
                    lanes[lane] += value * of_lanes[lane]


@ordered
def offset_rows(begin, end, cells, judged, offset, information, shared):
    """A step of Newton on the offsets of the genes begin..end, whose cells then go where all cells are.

    Q is concave in an offset d, with e = 1 + g what a gene makes of the size factor,

        sum_km A_km e d - (A_km + r R_km) ln(1 + rho S_m exp(v e_m + e d)) - precision d^2 / 2.

    cells: ``SeenCells``. judged: ``JudgedBy``. offset: (copies, rows), where the step begins and ends.
    information: (copies, rows) gets minus the second derivative without the prior, where steps begin. shared:
    ``SharedNodes``, of no copy where cells are to go nowhere.
    """
    n_copies, width = offset.shape[0], cells.rate.shape[2]
    total, seen = np.empty(width), np.empty(width)
    reach, r = np.empty((n_copies, width)), np.empty((n_copies, width))
    moves = shared.rate.shape[0] > 0
    n_from, n_to = cells.log_nodes.size, shared.barycentric.size
    weights, others = np.empty((n_from, n_to)), np.empty((n_copies, n_from, n_to))
    knows_others = np.empty(n_copies, np.bool_)
    for j in range(begin, end):
        if cells.first[j] == cells.first[j + 1]:
            continue
        knows_others[:] = False
        for c in range(n_copies if judged.longest > 0.0 else 0):
            _reach(c, j, judged, cells.log_nodes, reach[c], r[c])
        for row in range(cells.first[j], cells.first[j + 1]):
            total[:] = 0.0
            for fold in range(cells.rate.shape[0]):
                of_fold = cells.rate[fold, row]
                for q in range(width):
                    total[q] += of_fold[q]
            for c in range(n_copies):
                base, d, node = judged.base[c, j], offset[c, row], cells.node[c, cells.origin[row]]
                steps = judged.longest > 0.0 and judged.may_step[c, row]
                if not steps and shared.have_cells and d == base:
                    continue
                if cells.without[c] >= 0:
                    _less(total, cells.rate[cells.without[c], row], seen)
                else:
                    seen[:] = total
                if steps:
                    effect = 1.0 + judged.loadings[c, j, 0] if judged.effects.shape[0] else 1.0
                    precision = judged.precision[c, j]
                    slope, bend = _slope_and_bend(math.exp(effect * d), reach[c], r[c], seen, node)
                    told = max(bend, 0.0) * effect * effect
                    step = (slope * effect - precision * d) / (told + precision)
                    d += min(max(step, -judged.longest), judged.longest)
                    d = min(max(d, -judged.largest), judged.largest)
                    if told * (d - base) ** 2 / 2.0 <= judged.least_gain:
                        d = base
                    offset[c, row], information[c, row] = d, told
                if not moves or (shared.have_cells and d == base):
                    continue
                _weights(d, cells.log_nodes, shared.log_nodes[j], shared.barycentric, weights)
                if shared.have_cells:
                    if not knows_others[c]:
                        _weights(base, cells.log_nodes, shared.log_nodes[j], shared.barycentric, others[c])
                        knows_others[c] = True
                    for m in range(n_from):
                        for n in range(n_to):
                            weights[m, n] -= others[c, m, n]
                _add_moved(weights, seen, shared.rate[c, j])
                _add_moved(weights, node, shared.node[c, j])

"""Tables over nodes of the size factor and over pairs of gene and count: see ``nbmix.core.tables``."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nbmix.core.kernels.blocks import GENES_A_BLOCK, GENES_AT_ONCE
from nbmix.core.kernels.elementary import log1p_and_share, log_buffers, ordered, tail_of_count

ROUNDING_SHIFT = 1.5 * 2.0**52  # adding and taking away so many units rounds to a multiple of one


@ordered
def grown_rows(begin, end, a, b, nodes, grown, zero):
    """ln(1 + S_m rho) of the genes begin..end into grown (genes, K, nodes).

    a, b: (K, genes) ln mu and ln r. nodes: (genes, padded), of which the first are those of ``grown``. zero:
    (chunks, K, nodes), where row ``begin // GENES_AT_ONCE`` gets sum_j r ln(1 + S_m rho) of these genes.
    """
    n_components, width, n_nodes = a.shape[0], nodes.shape[1], grown.shape[2]
    logs = log_buffers(GENES_A_BLOCK * n_components * width)
    x, found = logs.x.reshape((-1, width)), logs.grown.reshape((-1, width))
    total = np.zeros((n_components, width))
    for start in range(begin, end, GENES_A_BLOCK):
        n_problems = (min(start + GENES_A_BLOCK, end) - start) * n_components
        for p in range(n_problems):
            j, k = start + p // n_components, p % n_components
            rho = math.exp(a[k, j] - b[k, j])
            for m in range(width):
                x[p, m] = nodes[j, m] * rho
        log1p_and_share(n_problems * width, logs.x, logs.grown, logs.share, logs.y, logs.bits)
        for p in range(n_problems):
            j, k = start + p // n_components, p % n_components
            r = math.exp(b[k, j])
            for m in range(width):
                total[k, m] += r * found[p, m]
            for m in range(n_nodes):
                grown[j, k, m] = found[p, m]
    for k in range(n_components):
        for m in range(n_nodes):
            zero[begin // GENES_AT_ONCE, k, m] = total[k, m]


@ordered
def pair_rows(begin, end, b, places, pair):
    """D(c, r) of the genes begin..end into pair (pairs, K); b: (K, genes) ln r. places: ``PairPlaces``."""
    first, high_first, high_count = places.first, places.high_first, places.high_count
    n_components, n_low = b.shape[0], first[-1]
    for j in range(begin, end):
        for k in range(n_components):
            r, total = math.exp(b[k, j]), 0.0
            for t in range(first[j + 1] - first[j]):
                if t > 0:
                    total += math.log1p(t / r)
                pair[first[j] + t, k] = total
            for h in range(high_first[j], high_first[j + 1]):
                pair[n_low + h, k] = total + tail_of_count(high_count[h], r)[0]


class PairTerms(NamedTuple):
    """What the used pairs of a batch add: a count c of gene j adds c rate[j] + pair to each component.

    Attributes:
        used: (used,) positions among all pairs.
        gene, counts: (pairs,) of all pairs.
        rate: (genes, K, nodes) ln mu - ln(1 + S_m rho).
        pair: (pairs, K) D(c, r).
    """

    used: np.ndarray
    gene: np.ndarray
    counts: np.ndarray
    rate: np.ndarray
    pair: np.ndarray


@ordered
def split_table_rows(begin, end, terms, unit, table):
    """What used pairs begin..end add, cut into a multiple of ``unit`` and the rest.

    terms: ``PairTerms``. table: (used, 2 K nodes or more) float32.
    """
    used, gene, count, rate, pair = terms
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


@ordered
def step_table_rows(begin, end, terms, unit, table):
    """As ``split_table_rows`` for the first node, then the steps from it to the others.

    Steps are split into their mean over components, itself cut like the values, and the rest.
    table (used, width or more) float32: coarse part and rest of K values at the first node, K (nodes - 1)
    steps less their means, coarse part and rest of the nodes - 1 means, and a bound on the steps less theirs.
    """
    used, gene, count, rate, pair = terms
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


@ordered
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


@ordered
def zero_change_rows(begin, end, first, origin, nodes, rho, r, moved, base, change):
    """What moving genes begin..end changes in sum_j r ln(1 + S_m rho), origin by origin.

    first: (genes + 1,) where the rows of each gene begin, each of one ``origin`` (rows,). nodes: (genes, M or
    more) S_m. rho, r: (genes, K). moved: (origins, genes) and base: (genes,) natural logarithms, the second
    of what is there already. change: (chunks, origins, K, M), one chunk of these genes.
    """
    n_components, n_nodes = rho.shape[1], change.shape[3]
    width = n_components * n_nodes
    reach, before = np.empty(width), np.empty(width)
    logs = log_buffers(width)
    into = change[begin // GENES_AT_ONCE].reshape((-1, width))
    for j in range(begin, end):
        if first[j] == first[j + 1]:
            continue
        for k in range(n_components):
            for m in range(n_nodes):
                reach[k * n_nodes + m] = nodes[j, m] * rho[j, k]
        scale = math.exp(base[j])
        for q in range(width):
            logs.x[q] = reach[q] * scale
        log1p_and_share(width, logs.x, logs.grown, logs.share, logs.y, logs.bits)
        for q in range(width):
            before[q] = logs.grown[q]
        for row in range(first[j], first[j + 1]):
            scale, out = math.exp(moved[origin[row], j]), into[origin[row]]
            for q in range(width):
                logs.x[q] = reach[q] * scale
            log1p_and_share(width, logs.x, logs.grown, logs.share, logs.y, logs.bits)
            for k in range(n_components):
                for m in range(n_nodes):
                    q = k * n_nodes + m
                    out[q] += r[j, k] * (logs.grown[q] - before[q])

"""E step and statistics cell by cell, without tables: see ``nbmix.core.cellwise``."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nbmix.core.kernels.elementary import log1p_and_share, log_buffers, ordered

MOST_MULTIPLIED = 15  # counts up to here enter the product as a power

POWERS_A_PART = 18  # before exponents are taken out: 1 + S rho stays below 2^56, as counts stay below 2^40

EXPONENT_BITS = np.uint64(52)

BIAS = np.uint64(1023)


@ordered
def _take_exponents(product, bits, exponents):
    """Bring every product > 0 into [1, 2); ``bits`` is ``product`` seen as uint64."""
    for q in range(product.size):
        exponent = (bits[q] >> EXPONENT_BITS) - BIAS
        exponents[q] += float(np.int64(exponent))
        bits[q] -= exponent << EXPONENT_BITS


class CellPairs(NamedTuple):
    """The nonzeros of a batch of cells, and what each adds.

    Attributes:
        indptr, codes: CSR, the used pairs of every cell.
        gene, counts: (used,) of each pair.
        linear: (used, K + 1 + axes), what a pair adds to each component, to d_i and to each axis.
        size, depth: (cells,) s and t = ln(s / s_0).
        origin: (cells,) what each comes from; (0,) where nothing is known.
    """

    indptr: np.ndarray
    codes: np.ndarray
    gene: np.ndarray
    counts: np.ndarray
    linear: np.ndarray
    size: np.ndarray
    depth: np.ndarray
    origin: np.ndarray


@ordered
def joint_rows(begin, end, cells, power, rho, levels, moved, out):
    """ln p(nonzeros of a cell | k, z_l) of the cells begin..end into out (cells, K L), but for constants.

    sum_j c [ln mu_kj + u_ij + v_j z_l] + D(c, r_kj) - c ln(1 + s_i e^(u_ij) rho_klj), nats, with
    u_ij = g_j t_i + what the origin of the cell moves the gene by.

    cells: ``CellPairs``. power: (genes,) g. rho: (genes, K L or more, for speed). levels: (L, axes). moved:
    (origins, genes).
    """
    indptr, codes, gene, count, linear, size, depth, origin = cells
    n_all, n_levels, n_axes = rho.shape[1], levels.shape[0], levels.shape[1]
    n_components = linear.shape[1] - 1 - n_axes
    product, exponents, logs = np.empty(n_all), np.empty(n_all), np.empty(n_all)
    bits = product.view(np.uint64)
    x, grown, share, whole, whole_bits = log_buffers(n_all)
    sums = np.empty(linear.shape[1])
    for i in range(begin, end):
        product[:], exponents[:], logs[:], sums[:] = 1.0, 0.0, 0.0, 0.0
        powers, of_origin = 0, 0.0
        for t in range(indptr[i], indptr[i + 1]):
            u = codes[t]
            j, c = gene[u], count[u]
            for k in range(sums.size):
                sums[k] += linear[u, k]
            shift = power[j] * depth[i]
            if origin.size > 0:
                shift += moved[origin[i], j]
                of_origin += c * moved[origin[i], j]
            reach = size[i] * math.exp(shift)
            if c > MOST_MULTIPLIED:
                for q in range(n_all):
                    x[q] = reach * rho[j, q]
                log1p_and_share(n_all, x, grown, share, whole, whole_bits)
                for q in range(n_all):
                    logs[q] += c * grown[q]
                continue
            left = int(c)
            if powers + left > POWERS_A_PART:
                _take_exponents(product, bits, exponents)
                powers = 0
            powers += left
            for q in range(n_all):
                x[q] = 1.0 + reach * rho[j, q]
            while True:
                if left & 1:
                    for q in range(n_all):
                        product[q] *= x[q]
                left >>= 1
                if left == 0:
                    break
                for q in range(n_all):
                    x[q] *= x[q]
        for k in range(n_components):
            for at in range(n_levels):
                q = k * n_levels + at
                total = sums[k] + of_origin + depth[i] * sums[n_components]
                for e in range(n_axes):
                    total += levels[at, e] * sums[n_components + 1 + e]
                out[i, q] = total - logs[q] - exponents[q] * math.log(2.0) - math.log(product[q])


class Memberships(NamedTuple):
    """Which components and levels every cell may belong to, and how cells stand between the nodes.

    Attributes:
        first: (cells + 1,) where a cell's memberships begin.
        component: (memberships,) k L + l.
        share: (memberships,) q.
        weights: (cells, nodes).
        origin: (cells,) what each comes from; (0,) where it is of no account.
    """

    first: np.ndarray
    component: np.ndarray
    share: np.ndarray
    weights: np.ndarray
    origin: np.ndarray


class UsedPairs(NamedTuple):
    """The pairs of a batch, and the cells that have them.

    Attributes:
        low, high: (genes + 1,) where a gene's low and high pairs begin among the used ones.
        used: (used,) positions among all pairs.
        counts: (used,).
        indptr, cells: CSR, the cells of each pair.
    """

    low: np.ndarray
    high: np.ndarray
    used: np.ndarray
    counts: np.ndarray
    indptr: np.ndarray
    cells: np.ndarray


@ordered
def _add_pair(u, j, pairs, members, rows, n_levels, rate, of_pair):
    """Add the cells of the used pair u, a count of gene j."""
    indptr, cells, c = pairs.indptr, pairs.cells, pairs.counts[u]
    first, component, share, weights, origin = members
    for t in range(indptr[u], indptr[u + 1]):
        i = cells[t]
        row = rows[origin[i], j] if origin.size > 0 else j
        if row < 0:
            continue
        for place in range(first[i], first[i + 1]):
            q, counted = component[place], c * share[place]
            if of_pair.size > 0:
                of_pair[q // n_levels] += share[place]
            for m in range(weights.shape[1]):
                rate[row, q, m] += counted * weights[i, m]


@ordered
def statistics_rows(begin, end, pairs, rows, members, n_levels, rate, pair):
    """Add the pairs of the genes begin..end to rate (rows, K L, nodes) and pair (pairs, K).

    pairs: ``UsedPairs``. members: ``Memberships``. rows: (origins, genes) the row of a gene in ``rate`` for
    cells of an origin, -1 where it has none; of no account where cells have no origin, and each gene has its
    own. pair: (0, 0) where pairs are not asked for.
    """
    no_pair = np.zeros(0)
    counts_pairs = pair.shape[0] > 0
    for j in range(begin, end):
        for u in range(pairs.low[j], pairs.low[j + 1]):
            of_pair = pair[pairs.used[u]] if counts_pairs else no_pair
            _add_pair(u, j, pairs, members, rows, n_levels, rate, of_pair)
        for u in range(pairs.high[j], pairs.high[j + 1]):
            of_pair = pair[pairs.used[u]] if counts_pairs else no_pair
            _add_pair(u, j, pairs, members, rows, n_levels, rate, of_pair)

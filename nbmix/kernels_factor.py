"""Compiled loops of ``nbmix.factor``, where components times levels are many and cells are few.

There a table over pairs, nodes and K L components would cost more than the cells that use it. So the
ln(1 + S rho) of a cell's nonzeros are not interpolated: their product is taken, and its logarithm once.
Statistics are summed over those components alone that a cell may belong to.
"""

from __future__ import annotations

import math

import numpy as np

from nbmix.kernels import _exact, _log1p_and_share

MOST_MULTIPLIED = 15  # counts up to here enter the product as a power
POWERS_A_PART = 18  # before exponents are taken out: 1 + S rho stays below 2^56, as counts stay below 2^40
EXPONENT_BITS = np.uint64(52)
BIAS = np.uint64(1023)


@_exact
def _take_exponents(product, bits, exponents):
    """Bring every product > 0 into [1, 2); ``bits`` is ``product`` seen as uint64."""
    for q in range(product.size):
        exponent = (bits[q] >> EXPONENT_BITS) - BIAS
        exponents[q] += float(np.int64(exponent))
        bits[q] -= exponent << EXPONENT_BITS


@_exact
def joint_rows(begin, end, indptr, codes, gene, count, linear, size, depth, power, rho, levels, out):
    """ln p(nonzeros of a cell | k, z_l) of the cells begin..end into out (cells, K L), but for constants.

    sum_j c [ln mu_kj + g_j d_i + v_j z_l] + D(c, r_kj) - c ln(1 + s_i e^(g_j d_i) rho_klj), nats.

    indptr, codes: the cells' pairs. gene, count: (used,) of each. linear: (used, K + 1 + axes), what a pair
    adds to each component, to d_i and to each axis. size, depth: (cells,) s and d = ln(s / s_0). power:
    (genes,) g. rho: (genes, K L or more, for speed). levels: (L, axes).
    """
    n_all, n_levels, n_axes = rho.shape[1], levels.shape[0], levels.shape[1]
    n_components = linear.shape[1] - 1 - n_axes
    product, exponents, logs = np.empty(n_all), np.empty(n_all), np.empty(n_all)
    bits = product.view(np.uint64)
    x, grown, share, whole = np.empty(n_all), np.empty(n_all), np.empty(n_all), np.empty(n_all)
    whole_bits = whole.view(np.int64)
    sums = np.empty(linear.shape[1])
    for i in range(begin, end):
        product[:], exponents[:], logs[:], sums[:] = 1.0, 0.0, 0.0, 0.0
        powers = 0
        for t in range(indptr[i], indptr[i + 1]):
            u = codes[t]
            j, c = gene[u], count[u]
            for k in range(sums.size):
                sums[k] += linear[u, k]
            reach = size[i] * math.exp(power[j] * depth[i])
            if c > MOST_MULTIPLIED:
                for q in range(n_all):
                    x[q] = reach * rho[j, q]
                _log1p_and_share(n_all, x, grown, share, whole, whole_bits)
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
                total = sums[k] + depth[i] * sums[n_components]
                for e in range(n_axes):
                    total += levels[at, e] * sums[n_components + 1 + e]
                out[i, q] = total - logs[q] - exponents[q] * math.log(2.0) - math.log(product[q])


@_exact
def _add_pair(u, j, indptr, cells, c, first, component, share, weights, n_levels, rate, of_pair):
    """Add the cells of the used pair u, a count c of gene j."""
    for t in range(indptr[u], indptr[u + 1]):
        i = cells[t]
        for place in range(first[i], first[i + 1]):
            q, counted = component[place], c * share[place]
            of_pair[q // n_levels] += share[place]
            for m in range(weights.shape[1]):
                rate[j, q, m] += counted * weights[i, m]


@_exact
def statistics_rows(
    begin, end, low, high, used, count, indptr, cells, first, component, share, weights, n_levels, rate, pair
):
    """Add the pairs of the genes begin..end to rate (genes, K L, nodes) and pair (pairs, K).

    low, high: (genes + 1,) where a gene's low and high pairs begin among the used ones. used, count:
    (used,) their position among all pairs, and their count. indptr, cells: the cells of each. first,
    component, share: the components and levels that each cell may belong to, and their q. weights: (cells,
    nodes).
    """
    for j in range(begin, end):
        for u in range(low[j], low[j + 1]):
            _add_pair(
                u, j, indptr, cells, count[u], first, component, share, weights, n_levels, rate, pair[used[u]]
            )
        for u in range(high[j], high[j + 1]):
            _add_pair(
                u, j, indptr, cells, count[u], first, component, share, weights, n_levels, rate, pair[used[u]]
            )

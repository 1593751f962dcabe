"""The mixture with shared axes, ``nbmix.core.factor``: its E step, its statistics and its loadings."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nbmix.core.kernels.elementary import log1p_and_share, log_buffers, ordered, reordered

LONGEST_LOADING_STEP = 0.5

LARGEST_POWER = 1.0  # |g|: nodes that interpolate in s do so in s^(1 + g) while that is not too far off


@reordered
def _loading_sums(rho, r, reach, rate, node, pulls, bends):
    """Add A - (A + r R) share, and (A + r R) share (1 - share), to pulls and bends; all are (nodes,)."""
    for m in range(reach.size):
        x = reach[m] * rho
        share = x / (1.0 + x)
        both = (rate[m] + r * node[m]) * share
        pulls[m] += rate[m] - both
        bends[m] += both * (1.0 - share)


@ordered
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


class LoadingProblem(NamedTuple):
    """What Q is a function of in the loadings v of a gene, beside its components.

    Attributes:
        log_nodes: (genes, nodes) ln S_m; here and below a single row is that of all genes.
        effects: (genes, E, nodes) e, what the loadings multiply.
        rate: (genes, K, nodes) A.
        node: (genes, K, nodes) R.
        precision: (E,) of the loadings around 0.
    """

    log_nodes: np.ndarray
    effects: np.ndarray
    rate: np.ndarray
    node: np.ndarray
    precision: np.ndarray


@ordered
def loading_rows(begin, end, a, b, problem, n_steps, v, out):
    """Newton on the loadings of the genes begin..end, in place: v (genes, E).

    A loop beside that of ``nbmix.core.kernels.newton``, for a gene has several numbers, and damping is not
    needed: Q is concave in v,

        sum_km A_km v e_m - (A_km + r R_km) ln(1 + rho S_m exp(v e_m)) - sum precision v^2 / 2.

    a, b: (K, genes). problem: ``LoadingProblem``. out: (genes, E), diagonal of minus the Hessian where Newton
    ends. The first loading stays within LARGEST_POWER.
    """
    log_nodes, effects, rate, node, precision = problem
    n_components, width = rate.shape[1], rate.shape[2]
    n_effects = effects.shape[1]
    reach, pulls, bends = np.empty(width), np.empty(width), np.empty(width)
    slope, hessian = np.empty(n_effects), np.empty((n_effects, n_effects))
    for j in range(begin, end):
        at = j if node.shape[0] > 1 else 0
        for step in range(n_steps + 1):
            for m in range(width):
                shift = log_nodes[at, m]
                for e in range(n_effects):
                    shift += v[j, e] * effects[at, e, m]
                reach[m] = math.exp(shift)
                pulls[m] = bends[m] = 0.0
            for k in range(n_components):
                r = math.exp(b[k, j])
                _loading_sums(math.exp(a[k, j]) / r, r, reach, rate[j, k], node[at, k], pulls, bends)
            for e in range(n_effects):
                slope[e] = -precision[e] * v[j, e]
                for m in range(width):
                    slope[e] += pulls[m] * effects[at, e, m]
                for f in range(e + 1):
                    hessian[e, f] = precision[e] if e == f else 0.0
                    for m in range(width):
                        hessian[e, f] += bends[m] * effects[at, e, m] * effects[at, f, m]
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
        size, depth: (cells,) s and d = ln(s / s_0).
    """

    indptr: np.ndarray
    codes: np.ndarray
    gene: np.ndarray
    counts: np.ndarray
    linear: np.ndarray
    size: np.ndarray
    depth: np.ndarray


@ordered
def joint_rows(begin, end, cells, power, rho, levels, out):
    """ln p(nonzeros of a cell | k, z_l) of the cells begin..end into out (cells, K L), but for constants.

    sum_j c [ln mu_kj + g_j d_i + v_j z_l] + D(c, r_kj) - c ln(1 + s_i e^(g_j d_i) rho_klj), nats.

    cells: ``CellPairs``. power: (genes,) g. rho: (genes, K L or more, for speed). levels: (L, axes).
    """
    indptr, codes, gene, count, linear, size, depth = cells
    n_all, n_levels, n_axes = rho.shape[1], levels.shape[0], levels.shape[1]
    n_components = linear.shape[1] - 1 - n_axes
    product, exponents, logs = np.empty(n_all), np.empty(n_all), np.empty(n_all)
    bits = product.view(np.uint64)
    x, grown, share, whole, whole_bits = log_buffers(n_all)
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
                total = sums[k] + depth[i] * sums[n_components]
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
    """

    first: np.ndarray
    component: np.ndarray
    share: np.ndarray
    weights: np.ndarray


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
def _add_pair(u, row, pairs, members, n_levels, rate, of_pair):
    """Add the cells of the used pair u, a count of the gene of a row."""
    indptr, cells, c = pairs.indptr, pairs.cells, pairs.counts[u]
    first, component, share, weights = members
    for t in range(indptr[u], indptr[u + 1]):
        i = cells[t]
        for place in range(first[i], first[i + 1]):
            q, counted = component[place], c * share[place]
            of_pair[q // n_levels] += share[place]
            for m in range(weights.shape[1]):
                rate[row, q, m] += counted * weights[i, m]


@ordered
def statistics_rows(begin, end, pairs, rows, members, n_levels, rate, pair):
    """Add the pairs of the genes begin..end to rate (rows, K L, nodes) and pair (pairs, K).

    pairs: ``UsedPairs``. rows: (genes,) the row of each gene in ``rate``, -1 where it has none; (0,) where
    all have theirs. members: ``Memberships``. pair: (0, K) where pairs are not asked for.
    """
    no_pair = np.zeros(pair.shape[1])
    counts_pairs = pair.shape[0] > 0
    for j in range(begin, end):
        row = rows[j] if rows.size > 0 else j
        if row < 0:
            continue
        for u in range(pairs.low[j], pairs.low[j + 1]):
            of_pair = pair[pairs.used[u]] if counts_pairs else no_pair
            _add_pair(u, row, pairs, members, n_levels, rate, of_pair)
        for u in range(pairs.high[j], pairs.high[j + 1]):
            of_pair = pair[pairs.used[u]] if counts_pairs else no_pair
            _add_pair(u, row, pairs, members, n_levels, rate, of_pair)

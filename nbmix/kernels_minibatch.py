"""Compiled loops for steps on a minibatch, where tables over all pairs would cost more than the few nonzeros.

Nonzeros are evaluated one by one; only the zeros' term, which all genes have, goes through nodes. Loops are
long and over one component at a time, so that they are vectorised. What is said in ``nbmix.kernels`` holds.
"""

from __future__ import annotations

import math

import numpy as np

from nbmix.kernels import LOW_LEVELS, _exact, _log1p_and_share, _loose, _tail

BLOCK = 256  # of genes or nonzeros, whose buffers stay in the first level cache


@_exact
def _pair_range(begin, end, of_high, used, first, high_first):
    """Where in ``used`` the low pairs, or the high ones, of the genes begin..end are."""
    if of_high:
        low, high = first[-1] + high_first[begin], first[-1] + high_first[end]
    else:
        low, high = first[begin], first[end]
    return np.searchsorted(used, low), np.searchsorted(used, high)


@_exact
def _next_nonzeros(u, at, end, indptr, cells, pair, cell):
    """List up to BLOCK nonzeros from ``at``, of used pair ``u``, to ``end``; how many, and next u, at."""
    n = 0
    while n < BLOCK and at < end:
        while indptr[u + 1] <= at:
            u += 1
        stop = min(indptr[u + 1], at + BLOCK - n)
        for t in range(at, stop):
            pair[n], cell[n] = u, cells[t]
            n += 1
        at = stop
    return n, u, at


@_exact
def _count_value(count, r):
    """D(c, r) of ``nbmix.special``."""
    product = 1.0  # at most (1 + 19 / r)^19
    for t in range(1, int(min(count, LOW_LEVELS))):
        product *= 1.0 + t / r
    return math.log(product) + (_tail(count, r)[0] if count > LOW_LEVELS else 0.0)


@_exact
def _count_slope(count, r):
    """dD(c, r) / d ln r."""
    total = _tail(count, r)[1] if count > LOW_LEVELS else 0.0
    for t in range(1, int(min(count, LOW_LEVELS))):
        total -= t / (r + t)
    return total


@_loose
def _dot(x, y):
    total = 0.0
    for t in range(x.size):
        total += x[t] * y[t]
    return total


@_exact
def _zero_values(begin, end, r, rho, nodes, grown, zero):
    """ln(1 + S_m rho) of the genes begin..end into grown (K, nodes, genes); its sum times r added to zero."""
    x, share, y = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    bits = y.view(np.int64)
    for k in range(rho.shape[0]):
        for start in range(begin, end, BLOCK):
            stop = min(start + BLOCK, end)
            of_genes = rho[k, start:stop]
            for m in range(nodes.size):
                for t in range(stop - start):
                    x[t] = nodes[m] * of_genes[t]
                _log1p_and_share(stop - start, x, grown[k, m, start:stop], share, y, bits)
                zero[k, m] += _dot(r[k, start:stop], grown[k, m, start:stop])


@_exact
def likelihood_rows(
    begin, end, a, r, rho, nodes, sizes, used, gene, count, first, high_first, indptr, cells,
    genes_at_once, grown, zero, total,
):  # fmt: skip
    """What the genes begin..end add to the log likelihoods of a batch.

    a, r, rho: (K, genes) ln mu, r and mu / r. nodes: (nodes,) S_m. sizes: (cells,). used: (used,) pairs that
    the batch has, of gene (used,) and count (used,); indptr, cells: the cells of each. grown: (K, nodes,
    genes) gets ln(1 + S_m rho). Row ``begin // genes_at_once`` of zero (chunks, K, nodes) gets its sum over
    genes times r, that of total (chunks, K, cells) the sum of c (ln mu - ln(1 + s rho)) + D(c, r).
    """
    n_components, chunk = rho.shape[0], begin // genes_at_once
    _zero_values(begin, end, r, rho, nodes, grown, zero[chunk])
    pair, cell = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    x, of_x, share, y = np.empty((4, BLOCK))
    bits = y.view(np.int64)
    for of_high in (False, True):
        u, stop = _pair_range(begin, end, of_high, used, first, high_first)
        from_pair, at, last = u, indptr[u], indptr[stop]
        of_pair = np.empty((n_components, stop - u))
        for p in range(u, stop):
            j, c = gene[p], count[p]
            for k in range(n_components):
                of_pair[k, p - u] = c * a[k, j] + (_count_value(c, r[k, j]) if c > 1.0 else 0.0)
        while at < last:
            n, u, at = _next_nonzeros(u, at, last, indptr, cells, pair, cell)
            for k in range(n_components):
                for t in range(n):
                    x[t] = sizes[cell[t]] * rho[k, gene[pair[t]]]
                _log1p_and_share(n, x, of_x, share, y, bits)
                for t in range(n):
                    total[chunk, k, cell[t]] += of_pair[k, pair[t] - from_pair] - count[pair[t]] * of_x[t]


@_exact
def _zero_slopes(begin, end, r, rho, nodes, node, grown, out):
    """Slopes of -sum_m R_m r ln(1 + S_m rho) of the genes begin..end into out (2, K, genes)."""
    of_share, of_grown = np.empty(BLOCK), np.empty(BLOCK)
    for k in range(rho.shape[0]):
        for start in range(begin, end, BLOCK):
            stop = min(start + BLOCK, end)
            of_genes = rho[k, start:stop]
            of_share[:] = 0.0
            of_grown[:] = 0.0
            for m in range(nodes.size):
                known = grown[k, m, start:stop]
                for t in range(stop - start):
                    x = nodes[m] * of_genes[t]
                    of_share[t] += node[k, m] * (x / (1.0 + x))
                    of_grown[t] += node[k, m] * known[t]
            for t in range(stop - start):
                out[0, k, start + t] = -r[k, start + t] * of_share[t]
                out[1, k, start + t] = r[k, start + t] * (of_share[t] - of_grown[t])


@_exact
def likelihood_slope_rows(
    begin, end, r, rho, nodes, sizes, used, gene, count, first, high_first, indptr, cells, grown, node, q, out
):
    """Gradient in (ln mu, ln r) of sum_ik q_ik l_ik, of the genes begin..end, into out (2, K, genes).

    node: (K, nodes) sum_i w_im q_ik. q: (K, cells). Else as ``likelihood_rows``.
    """
    _zero_slopes(begin, end, r, rho, nodes, node, grown, out)
    pair, cell, left = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64), np.empty(BLOCK)
    for of_high in (False, True):
        u, stop = _pair_range(begin, end, of_high, used, first, high_first)
        at, last = indptr[u], indptr[stop]
        for p in range(u, stop):
            j, c = gene[p], count[p]
            if c > 1.0:
                for k in range(rho.shape[0]):
                    weight = 0.0
                    for t in range(indptr[p], indptr[p + 1]):
                        weight += q[k, cells[t]]
                    out[1, k, j] += weight * _count_slope(c, r[k, j])
        while at < last:
            n, u, at = _next_nonzeros(u, at, last, indptr, cells, pair, cell)
            for k in range(rho.shape[0]):
                for t in range(n):
                    left[t] = 1.0 / (1.0 + sizes[cell[t]] * rho[k, gene[pair[t]]])
                for t in range(n):
                    j, weight = gene[pair[t]], count[pair[t]] * q[k, cell[t]]
                    out[0, k, j] += weight * left[t]
                    out[1, k, j] += weight * (1.0 - left[t])


@_exact
def weight_slope_rows(begin, end, used, gene, value, first, high_first, indptr, cells, slope, out):
    """Gradient of a layer over genes: rows begin..end of out (genes, units).

    Sum over the used pairs of a gene of value (used,) times slope (cells, units) of the cells of that pair.
    """
    out[begin:end] = 0.0
    for of_high in (False, True):
        u, stop = _pair_range(begin, end, of_high, used, first, high_first)
        for p in range(u, stop):
            row = out[gene[p]]
            for t in range(indptr[p], indptr[p + 1]):
                of_cell = slope[cells[t]]
                for h in range(row.size):
                    row[h] += value[p] * of_cell[h]

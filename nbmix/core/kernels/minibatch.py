"""The steps on a minibatch of ``nbmix.core.minibatch``, without tables over all pairs of gene and count.

Nonzeros are evaluated one by one, all components together; only the zeros' term, which all genes have, goes
through nodes. Logarithms are taken of many values at once, so that they are vectorised; buffers are made one
by one, since loops over rows of one array are not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nbmix.core.kernels.blocks import VALUES_A_BLOCK
from nbmix.core.kernels.elementary import (
    LOW_LEVELS,
    log1p_and_share,
    log_buffers,
    ordered,
    reordered,
    tail_of_count,
)
from nbmix.core.kernels.sparse import PairPlaces

SMALL = 0.125  # s rho, up to which ln(1 + s rho) is a sum of

POWERS = 12  # powers; the next is below 8^-12 of the first


class MinibatchPairs(NamedTuple):
    """The pairs of gene and count that a batch has.

    Attributes:
        used: (used,) their positions among all pairs.
        gene: (used,).
        value: (used,) what each is worth: the count, or a function of it.
        places: of all pairs.
        indptr, cells: CSR, the cells of each used pair.
    """

    used: np.ndarray
    gene: np.ndarray
    value: np.ndarray
    places: PairPlaces
    indptr: np.ndarray
    cells: np.ndarray


class GeneParameters(NamedTuple):
    """Components as loops read them.

    Attributes:
        r, rho: (K, genes) r and mu / r.
        by_gene: (3, genes, K) ln mu, r and mu / r.
    """

    r: np.ndarray
    rho: np.ndarray
    by_gene: np.ndarray


class MinibatchSums(NamedTuple):
    """What the genes of every chunk add to the log likelihoods of a batch.

    Attributes:
        grown: (K, nodes, genes) ln(1 + S_m rho) of genes that are not rare, see ``_zero_values``.
        zero: (chunks, K, nodes) sum_j r ln(1 + S_m rho).
        total: (chunks, cells, K) sum_j c (ln mu - ln(1 + s rho)) + D(c, r) over the nonzeros.
    """

    grown: np.ndarray
    zero: np.ndarray
    total: np.ndarray


@ordered
def _pair_range(begin, end, of_high, used, places):
    """Where in ``used`` the low pairs, or the high ones, of the genes begin..end are."""
    first, high_first = places.first, places.high_first
    if of_high:
        low, high = first[-1] + high_first[begin], first[-1] + high_first[end]
    else:
        low, high = first[begin], first[end]
    return np.searchsorted(used, low), np.searchsorted(used, high)


@ordered
def _raise_products(product, level, count, r_row):
    """product (K,) = prod_{0 < t < level} (1 + t / r), taken on to ``count``; the level that it is at then.

    At most (1 + 19 / r)^19, which is a float64 for every r.
    """
    while level < min(count, LOW_LEVELS):
        for k in range(product.size):
            product[k] *= 1.0 + level / r_row[k]
        level += 1
    return level


@ordered
def _raise_slopes(slope, level, count, r_row):
    """slope (K,) = sum_{0 < t < level} -t / (r + t), likewise."""
    while level < min(count, LOW_LEVELS):
        for k in range(slope.size):
            slope[k] -= level / (r_row[k] + level)
        level += 1
    return level


@reordered
def _sum(x):
    total = 0.0
    for t in range(x.size):
        total += x[t]
    return total


@reordered
def _dot(x, y):
    total = 0.0
    for t in range(x.size):
        total += x[t] * y[t]
    return total


@ordered
def _by_size(start, stop, rho, bound, small, large):
    """Part the genes start..stop at rho (genes,) = bound; how many are in ``small`` and in ``large``."""
    n_small = n_large = 0
    for j in range(start, stop):
        small[n_small] = large[n_large] = j
        n_small += rho[j] <= bound
        n_large += rho[j] > bound
    return n_small, n_large


@ordered
def _zero_values(begin, end, r, rho, nodes, grown, zero):
    """Add sum_j r ln(1 + S_m rho) over the genes begin..end to zero (K, nodes).

    Most genes are so rare that a few powers will do, whose sums serve all nodes:
    sum_j r ln(1 + S rho) = sum_d (-1)^(d + 1) / d (S / S*)^d sum_j r (S* rho)^d, S* the largest node. Of the
    others grown (K, nodes, genes) gets ln(1 + S_m rho), from the beginning of each block of genes on.
    """
    small, large = np.empty(VALUES_A_BLOCK + 1, np.int64), np.empty(VALUES_A_BLOCK + 1, np.int64)
    x, share, y = np.empty(VALUES_A_BLOCK), np.empty(VALUES_A_BLOCK), np.empty(VALUES_A_BLOCK)
    of_genes, weight = np.empty(VALUES_A_BLOCK), np.empty(VALUES_A_BLOCK)
    bits, sums, top = y.view(np.int64), np.empty(POWERS), nodes.max()
    for k in range(rho.shape[0]):
        sums[:] = 0.0
        for start in range(begin, end, VALUES_A_BLOCK):
            n_small, n_large = _by_size(
                start, min(start + VALUES_A_BLOCK, end), rho[k], SMALL / top, small, large
            )
            for t in range(n_small):
                x[t] = top * rho[k, small[t]]
                weight[t] = r[k, small[t]] * x[t]
            for d in range(POWERS):
                sums[d] += _sum(weight[:n_small])
                for t in range(n_small):
                    weight[t] *= x[t]
            for t in range(n_large):
                of_genes[t], weight[t] = rho[k, large[t]], r[k, large[t]]
            for m in range(nodes.size):
                for t in range(n_large):
                    x[t] = nodes[m] * of_genes[t]
                of_large = grown[k, m, start : start + n_large]
                log1p_and_share(n_large, x, of_large, share, y, bits)
                zero[k, m] += _dot(weight[:n_large], of_large)
        for m in range(nodes.size):
            power = 1.0
            for d in range(POWERS):
                power *= nodes[m] / top
                zero[k, m] += power * sums[d] / (d + 1) if d % 2 == 0 else -power * sums[d] / (d + 1)


@ordered
def _take_off_logs(n, logs, cell, count, total):
    """total (cells, K) minus count ln(1 + x) of n nonzeros, x (n K,)."""
    n_components, of_x = total.shape[1], logs.grown
    log1p_and_share(n * n_components, logs.x, of_x, logs.share, logs.y, logs.bits)
    for t in range(n):
        i, c = cell[t], count[t]
        for k in range(n_components):
            total[i, k] -= c * of_x[t * n_components + k]


@ordered
def likelihood_rows(begin, end, genes, nodes, sizes, pairs, genes_at_once, sums):
    """What the genes begin..end add to the log likelihoods of a batch.

    genes: ``GeneParameters``. nodes: (nodes,) S_m. sizes: (cells,) s. pairs: ``MinibatchPairs``, of counts.
    sums: ``MinibatchSums``, of which the chunk ``begin // genes_at_once`` is filled.
    """
    n_components, chunk = genes.rho.shape[0], begin // genes_at_once
    _zero_values(begin, end, genes.r, genes.rho, nodes, sums.grown, sums.zero[chunk])
    at_once = max(1, VALUES_A_BLOCK // n_components)
    cell, counts = np.empty(at_once, np.uint64), np.empty(at_once)
    logs = log_buffers(at_once * n_components)
    x, of_pair, product = logs.x, np.empty(n_components), np.empty(n_components)
    gene, count, indptr, cells = pairs.gene, pairs.value, pairs.indptr, pairs.cells
    by_gene, total = genes.by_gene, sums.total[chunk]
    for of_high in (False, True):
        u, stop = _pair_range(begin, end, of_high, pairs.used, pairs.places)
        n, of_product, level = 0, -1, 1
        for p in range(u, stop):
            j, c = gene[p], count[p]
            log_mean, r_row, rho_row = by_gene[0, j], by_gene[1, j], by_gene[2, j]
            for k in range(n_components):
                of_pair[k] = c * log_mean[k]
            if c > 1.0:
                if j != of_product:
                    of_product, level = j, 1
                    product[:] = 1.0
                level = _raise_products(product, level, c, r_row)
                for k in range(n_components):
                    of_pair[k] += math.log(product[k]) + (tail_of_count(c, r_row[k])[0] if of_high else 0.0)
            for t in range(indptr[p], indptr[p + 1]):
                i = np.uint64(cells[t])
                s = sizes[i]
                for k in range(n_components):
                    total[i, k] += of_pair[k]
                    x[n * n_components + k] = s * rho_row[k]
                cell[n], counts[n] = i, c
                n += 1
                if n == at_once:
                    _take_off_logs(n, logs, cell, counts, total)
                    n = 0
        _take_off_logs(n, logs, cell, counts, total)


@ordered
def _zero_slopes(begin, end, r, rho, nodes, node, grown, out):
    """Slopes of -sum_m R_m r ln(1 + S_m rho) of the genes begin..end into out (2, K, genes)."""
    small, large = np.empty(VALUES_A_BLOCK + 1, np.int64), np.empty(VALUES_A_BLOCK + 1, np.int64)
    x, of_share, of_grown = np.empty(VALUES_A_BLOCK), np.empty(VALUES_A_BLOCK), np.empty(VALUES_A_BLOCK)
    moments, top = np.empty(POWERS), nodes.max()
    for k in range(rho.shape[0]):
        moments[:] = 0.0
        for m in range(nodes.size):
            power = -node[k, m]
            for d in range(POWERS):
                power *= -nodes[m] / top
                moments[d] += power
        for start in range(begin, end, VALUES_A_BLOCK):
            n_small, n_large = _by_size(
                start, min(start + VALUES_A_BLOCK, end), rho[k], SMALL / top, small, large
            )
            for t in range(n_small):
                x[t] = top * rho[k, small[t]]
                of_share[t] = of_grown[t] = 0.0
            for d in range(POWERS - 1, -1, -1):
                for t in range(n_small):
                    of_share[t] = (of_share[t] + moments[d]) * x[t]
                    of_grown[t] = (of_grown[t] + moments[d] / (d + 1)) * x[t]
            for t in range(n_small):
                weight = r[k, small[t]]
                out[0, k, small[t]] = -weight * of_share[t]
                out[1, k, small[t]] = weight * (of_share[t] - of_grown[t])
            for t in range(n_large):
                x[t] = rho[k, large[t]]
                of_share[t] = of_grown[t] = 0.0
            for m in range(nodes.size):
                known = grown[k, m, start : start + n_large]
                for t in range(n_large):
                    of_node = nodes[m] * x[t]
                    of_share[t] += node[k, m] * (of_node / (1.0 + of_node))
                    of_grown[t] += node[k, m] * known[t]
            for t in range(n_large):
                weight = r[k, large[t]]
                out[0, k, large[t]] = -weight * of_share[t]
                out[1, k, large[t]] = weight * (of_share[t] - of_grown[t])


@ordered
def likelihood_slope_rows(begin, end, genes, nodes, sizes, pairs, back, out):
    """Gradient in (ln mu, ln r) of sum_ik q_ik l_ik, of the genes begin..end, into out (2, K, genes).

    back: ``grown`` of ``MinibatchSums``, node (K, nodes) sum_i w_im q_ik, and q (cells, K). Else as
    ``likelihood_rows``.
    """
    grown, node, q = back
    _zero_slopes(begin, end, genes.r, genes.rho, nodes, node, grown, out)
    n_components = genes.rho.shape[0]
    weight, left, slope = np.empty(n_components), np.empty(n_components), np.empty(n_components)
    gene, count, indptr, cells = pairs.gene, pairs.value, pairs.indptr, pairs.cells
    for of_high in (False, True):
        u, stop = _pair_range(begin, end, of_high, pairs.used, pairs.places)
        of_slope, level = -1, 1
        for p in range(u, stop):
            j, c = gene[p], count[p]
            r_row, rho_row = genes.by_gene[1, j], genes.by_gene[2, j]
            weight[:] = 0.0
            left[:] = 0.0
            for t in range(indptr[p], indptr[p + 1]):
                i = np.uint64(cells[t])
                s = sizes[i]
                for k in range(n_components):
                    weight[k] += q[i, k]
                    left[k] += q[i, k] / (1.0 + s * rho_row[k])
            for k in range(n_components):
                out[0, k, j] += c * left[k]
                out[1, k, j] += c * (weight[k] - left[k])
            if c > 1.0:
                if j != of_slope:
                    of_slope, level = j, 1
                    slope[:] = 0.0
                level = _raise_slopes(slope, level, c, r_row)
                for k in range(n_components):
                    out[1, k, j] += weight[k] * (
                        slope[k] + (tail_of_count(c, r_row[k])[1] if of_high else 0.0)
                    )


@ordered
def weight_slope_rows(begin, end, pairs, slope, out):
    """Gradient of a layer over genes: rows begin..end of out (genes, units).

    Sum over the used pairs of a gene of their value times slope (cells, units) of the cells of that pair.
    """
    gene, value, indptr, cells = pairs.gene, pairs.value, pairs.indptr, pairs.cells
    out[begin:end] = 0.0
    for of_high in (False, True):
        u, stop = _pair_range(begin, end, of_high, pairs.used, pairs.places)
        for p in range(u, stop):
            j, v = np.uint64(gene[p]), value[p]
            for t in range(indptr[p], indptr[p + 1]):
                i = np.uint64(cells[t])
                for h in range(out.shape[1]):
                    out[j, h] += v * slope[i, h]

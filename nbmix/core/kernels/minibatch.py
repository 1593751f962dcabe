"""Compiled loops for steps on a minibatch, where tables over all pairs would cost more than the few nonzeros.

Nonzeros are evaluated one by one, all components together; only the zeros' term, which all genes have, goes
through nodes. Logarithms are taken of many values at once, so that they are vectorised; buffers are made one
by one, since loops over rows of one array are not. What is said in ``nbmix.core.kernels.threads`` holds.
"""

from __future__ import annotations

import math

import numpy as np

from nbmix.core.kernels.elementary import LOW_LEVELS, exact, log1p_and_share, loose, tail_of_count

BLOCK = 256  # of genes or nonzeros, whose buffers stay in the first level cache

SMALL = 0.125  # s rho, up to which ln(1 + s rho) is a sum of

POWERS = 12  # powers; the next is below 8^-12 of the first


@exact
def _pair_range(begin, end, of_high, used, first, high_first):
    """Where in ``used`` the low pairs, or the high ones, of the genes begin..end are."""
    if of_high:
        low, high = first[-1] + high_first[begin], first[-1] + high_first[end]
    else:
        low, high = first[begin], first[end]
    return np.searchsorted(used, low), np.searchsorted(used, high)


@exact
def _raise_products(product, level, count, r_row):
    """product (K,) = prod_{0 < t < level} (1 + t / r), taken on to ``count``; the level that it is at then.

    At most (1 + 19 / r)^19, which is a float64 for every r.
    """
    while level < min(count, LOW_LEVELS):
        for k in range(product.size):
            product[k] *= 1.0 + level / r_row[k]
        level += 1
    return level


@exact
def _raise_slopes(slope, level, count, r_row):
    """slope (K,) = sum_{0 < t < level} -t / (r + t), likewise."""
    while level < min(count, LOW_LEVELS):
        for k in range(slope.size):
            slope[k] -= level / (r_row[k] + level)
        level += 1
    return level


@loose
def _sum(x):
    total = 0.0
    for t in range(x.size):
        total += x[t]
    return total


@loose
def _dot(x, y):
    total = 0.0
    for t in range(x.size):
        total += x[t] * y[t]
    return total


@exact
def _by_size(start, stop, rho, bound, small, large):
    """Part the genes start..stop at rho (genes,) = bound; how many are in ``small`` and in ``large``."""
    n_small = n_large = 0
    for j in range(start, stop):
        small[n_small] = large[n_large] = j
        n_small += rho[j] <= bound
        n_large += rho[j] > bound
    return n_small, n_large


@exact
def _zero_values(begin, end, r, rho, nodes, grown, zero):
    """Add sum_j r ln(1 + S_m rho) over the genes begin..end to zero (K, nodes).

    Most genes are so rare that a few powers will do, whose sums serve all nodes:
    sum_j r ln(1 + S rho) = sum_d (-1)^(d + 1) / d (S / S*)^d sum_j r (S* rho)^d, S* the largest node. Of the
    others grown (K, nodes, genes) gets ln(1 + S_m rho), from the beginning of each block of genes on.
    """
    small, large = np.empty(BLOCK + 1, np.int64), np.empty(BLOCK + 1, np.int64)
    x, share, y = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    of_genes, weight = np.empty(BLOCK), np.empty(BLOCK)
    bits, sums, top = y.view(np.int64), np.empty(POWERS), nodes.max()
    for k in range(rho.shape[0]):
        sums[:] = 0.0
        for start in range(begin, end, BLOCK):
            n_small, n_large = _by_size(start, min(start + BLOCK, end), rho[k], SMALL / top, small, large)
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


@exact
def _take_off_logs(n, x, of_x, share, y, bits, cell, count, total):
    """total (cells, K) minus count ln(1 + x) of n nonzeros, x (n K,)."""
    n_components = total.shape[1]
    log1p_and_share(n * n_components, x, of_x, share, y, bits)
    for t in range(n):
        i, c = cell[t], count[t]
        for k in range(n_components):
            total[i, k] -= c * of_x[t * n_components + k]


@exact
def likelihood_rows(
    begin, end, r, rho, of_genes, nodes, sizes, used, gene, count, first, high_first, indptr, cells,
    genes_at_once, grown, zero, total,
):  # fmt: skip
    """What the genes begin..end add to the log likelihoods of a batch.

    r, rho: (K, genes) r and mu / r. of_genes: (3, genes, K) ln mu, r and mu / r. nodes: (nodes,) S_m. sizes:
    (cells,). used: (used,) pairs that the batch has, of gene (used,) and count (used,); indptr, cells: the
    cells of each. grown: (K, nodes, genes), see ``_zero_values``. Row ``begin // genes_at_once`` of zero
    (chunks, K, nodes) gets its sum over genes times r, that of total (chunks, cells, K) the sum of
    c (ln mu - ln(1 + s rho)) + D(c, r).
    """
    n_components, chunk = rho.shape[0], begin // genes_at_once
    _zero_values(begin, end, r, rho, nodes, grown, zero[chunk])
    at_once = max(1, BLOCK // n_components)
    cell, counts = np.empty(at_once, np.uint64), np.empty(at_once)
    size = at_once * n_components
    x, of_x, share, y = np.empty(size), np.empty(size), np.empty(size), np.empty(size)
    bits, of_pair, product = y.view(np.int64), np.empty(n_components), np.empty(n_components)
    sums = total[chunk]
    for of_high in (False, True):
        u, stop = _pair_range(begin, end, of_high, used, first, high_first)
        n, of_product, level = 0, -1, 1
        for p in range(u, stop):
            j, c = gene[p], count[p]
            log_mean, r_row, rho_row = of_genes[0, j], of_genes[1, j], of_genes[2, j]
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
                    sums[i, k] += of_pair[k]
                    x[n * n_components + k] = s * rho_row[k]
                cell[n], counts[n] = i, c
                n += 1
                if n == at_once:
                    _take_off_logs(n, x, of_x, share, y, bits, cell, counts, sums)
                    n = 0
        _take_off_logs(n, x, of_x, share, y, bits, cell, counts, sums)


@exact
def _zero_slopes(begin, end, r, rho, nodes, node, grown, out):
    """Slopes of -sum_m R_m r ln(1 + S_m rho) of the genes begin..end into out (2, K, genes)."""
    small, large = np.empty(BLOCK + 1, np.int64), np.empty(BLOCK + 1, np.int64)
    x, of_share, of_grown = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    moments, top = np.empty(POWERS), nodes.max()
    for k in range(rho.shape[0]):
        moments[:] = 0.0
        for m in range(nodes.size):
            power = -node[k, m]
            for d in range(POWERS):
                power *= -nodes[m] / top
                moments[d] += power
        for start in range(begin, end, BLOCK):
            n_small, n_large = _by_size(start, min(start + BLOCK, end), rho[k], SMALL / top, small, large)
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


@exact
def likelihood_slope_rows(
    begin, end, r, rho, of_genes, nodes, sizes, used, gene, count, first, high_first, indptr, cells, grown,
    node, q, out,
):  # fmt: skip
    """Gradient in (ln mu, ln r) of sum_ik q_ik l_ik, of the genes begin..end, into out (2, K, genes).

    node: (K, nodes) sum_i w_im q_ik. q: (cells, K). Else as ``likelihood_rows``.
    """
    _zero_slopes(begin, end, r, rho, nodes, node, grown, out)
    n_components = rho.shape[0]
    weight, left, slope = np.empty(n_components), np.empty(n_components), np.empty(n_components)
    for of_high in (False, True):
        u, stop = _pair_range(begin, end, of_high, used, first, high_first)
        of_slope, level = -1, 1
        for p in range(u, stop):
            j, c = gene[p], count[p]
            r_row, rho_row = of_genes[1, j], of_genes[2, j]
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


@exact
def weight_slope_rows(begin, end, used, gene, value, first, high_first, indptr, cells, slope, out):
    """Gradient of a layer over genes: rows begin..end of out (genes, units).

    Sum over the used pairs of a gene of value (used,) times slope (cells, units) of the cells of that pair.
    """
    out[begin:end] = 0.0
    for of_high in (False, True):
        u, stop = _pair_range(begin, end, of_high, used, first, high_first)
        for p in range(u, stop):
            j, v = np.uint64(gene[p]), value[p]
            for t in range(indptr[p], indptr[p + 1]):
                i = np.uint64(cells[t])
                for h in range(out.shape[1]):
                    out[j, h] += v * slope[i, h]

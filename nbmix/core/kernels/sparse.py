"""Sparse counts coded by their pair of gene and count, sums over these, and patterns of sparse matrices."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nbmix.core.kernels.elementary import LOW_LEVELS, ordered


class PairPlaces(NamedTuple):
    """Where the pairs of every gene stand: see ``nbmix.core.levels.CountLevels``.

    Attributes:
        first, high_first: (genes + 1,) where a gene's low and high pairs begin.
        high_count: (high pairs,).
    """

    first: np.ndarray
    high_first: np.ndarray
    high_count: np.ndarray


@ordered
def _at_or_after(values, wanted, low, high):
    """The first position of ``wanted`` or more among values[low:high], which ascend."""
    while low < high:
        middle = (low + high) // 2
        if values[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@ordered
def _add_summed(c, summed, by_node, of_pair):
    """Add what the cells of a used pair, of count c, sum to: (K nodes or more) to (K, nodes)."""
    n_components, n_nodes = by_node.shape
    for k in range(n_components):
        of_component, into = summed[k * n_nodes : (k + 1) * n_nodes], by_node[k]
        total = 0.0
        for m in range(n_nodes):
            into[m] += c * of_component[m]
            total += of_component[m]
        of_pair[k] += total


@ordered
def gathered_rows(begin, end, used, places, summed, to_all, rate, pair):
    """Add a batch's sums to rate (genes, K, nodes) and pair (pairs, K) of the genes begin..end.

    used: the pairs of the batch. places: ``PairPlaces``. summed: (used, K own nodes or more) of q w. to_all:
    (own nodes, nodes), how sums at the batch's nodes spread to those of all.
    """
    first, high_first, high_count = places.first, places.high_first, places.high_count
    n_low, n_components = first[-1], rate.shape[1]
    by_node = np.empty((n_components, to_all.shape[0]))
    low = _at_or_after(used, first[begin], 0, used.size)
    high = _at_or_after(used, n_low + high_first[begin], 0, used.size)
    for j in range(begin, end):
        has_low = low < used.size and used[low] < first[j + 1]
        if not has_low and not (high < used.size and used[high] < n_low + high_first[j + 1]):
            continue
        by_node[:] = 0.0
        while low < used.size and used[low] < first[j + 1]:
            _add_summed(float(used[low] - first[j] + 1), summed[low], by_node, pair[used[low]])
            low += 1
        while high < used.size and used[high] < n_low + high_first[j + 1]:
            _add_summed(high_count[used[high] - n_low], summed[high], by_node, pair[used[high]])
            high += 1
        for k in range(n_components):
            into = rate[j, k]
            for m in range(to_all.shape[0]):
                value, spread = by_node[k, m], to_all[m]
                for n in range(into.size):
                    into[n] += value * spread[n]


@ordered
def code_rows(rows, matrix, places, log_factorial, codes, constant):
    """Code the nonzeros of some rows of a CSR matrix by their pair of gene and count.

    matrix: indptr, indices and counts. places: ``PairPlaces``. log_factorial: ln c! for c = 0, 1, ... Fills
    codes (nonzeros,) row by row, and constant (rows,) with -sum_j ln G(x_ij + 1). Returns the position in
    ``rows`` of the first row with a pair that is not listed, or -1.
    """
    indptr, indices, counts = matrix
    first, high_first, high_count = places.first, places.high_first, places.high_count
    n_low, at = first[-1], 0
    for i in range(rows.size):
        total = 0.0
        for t in range(indptr[rows[i]], indptr[rows[i] + 1]):
            j, c = indices[t], int(counts[t])
            if c <= LOW_LEVELS:
                code = first[j] + c - 1
                if code >= first[j + 1]:
                    return i
            else:
                low = _at_or_after(high_count, c, high_first[j], high_first[j + 1])
                if low == high_first[j + 1] or high_count[low] != c:
                    return i
                code = n_low + low
            codes[at] = code
            at += 1
            if c > 1:
                total -= log_factorial[c] if c < log_factorial.size else math.lgamma(c + 1.0)
        constant[i] = total
    return -1


@ordered
def compact_columns(columns, position):
    """Renumber ``columns`` in place to 0, 1, ... in their order; returns the sorted distinct columns.

    ``position`` (all columns,) is zero and scratch.
    """
    for t in range(columns.size):
        position[columns[t]] = 1
    n_used = 0
    for c in range(position.size):
        if position[c]:
            position[c] = n_used
            n_used += 1
        else:
            position[c] = -1
    used = np.empty(n_used, np.int64)
    for c in range(position.size):
        if position[c] >= 0:
            used[position[c]] = c
    for t in range(columns.size):
        columns[t] = position[columns[t]]
    return used


@ordered
def transpose_pattern(indptr, columns, n_columns):
    """indptr and rows of the transpose of a CSR pattern, by counting; rows ascend."""
    turned = np.zeros(n_columns + 1, indptr.dtype)
    for t in range(columns.size):
        turned[columns[t] + 1] += 1
    for c in range(n_columns):
        turned[c + 1] += turned[c]
    place = turned[:-1].copy()
    rows = np.empty(columns.size, columns.dtype)
    for i in range(indptr.size - 1):
        for t in range(indptr[i], indptr[i + 1]):
            rows[place[columns[t]]] = i
            place[columns[t]] += 1
    return turned, rows


@ordered
def largest_and_high(begin, end, indices, counts, largest):
    """Raise largest (genes,) to the counts of nonzeros begin..end; their (gene, count) above LOW_LEVELS."""
    n_high = 0
    for t in range(begin, end):
        c = int(counts[t])
        if c > largest[indices[t]]:
            largest[indices[t]] = c
        n_high += c > LOW_LEVELS
    keys = np.empty(n_high, np.int64)
    at = 0
    for t in range(begin, end):
        c = int(counts[t])
        if c > LOW_LEVELS:
            keys[at] = (np.int64(indices[t]) << 32) | c
            at += 1
    return keys

"""The dip statistic of sorted numbers, the rule of ``nbmix.core.dip``."""

from __future__ import annotations

import numpy as np

from nbmix.core.kernels.elementary import ordered


@ordered
def hull_of(x, first, last, sign, hull):
    """Corners of the convex hull of the points (x_i, i), i = first..last: below for sign 1, above for -1.

    Args:
        hull: room for their indices, ascending.

    Returns:
        How many there are.
    """
    size = 0
    for i in range(first, last + 1):
        while size > 1:
            a, b = hull[size - 2], hull[size - 1]
            if sign * ((b - a) * (x[i] - x[b]) - (i - b) * (x[b] - x[a])) < 0.0:
                break
            size -= 1
        hull[size] = i
        size += 1
    return size


@ordered
def on_line(x, a, b, i):
    """Height at x_i of the line through (x_a, a) and (x_b, b)."""
    return a + (x[i] - x[a]) * ((b - a) / (x[b] - x[a]))


@ordered
def widest(x, below, n_below, above, n_above):
    """Where the two hulls are farthest apart.

    Returns:
        n times the distance between majorant and minorant, and the corners of the hulls, one below and one
        above, between which a mode has to lie.
    """
    distance, left, right = 0.0, below[0], above[0]
    k = 0
    for j in range(1, n_below):
        while above[k + 1] < below[j]:
            k += 1
        here = on_line(x, above[k], above[k + 1], below[j]) + 1.0 - below[j]
        if here > distance:
            distance, left, right = here, below[j], above[k + 1]
    k = 0
    for j in range(n_above - 1):
        while below[k + 1] <= above[j]:
            k += 1
        here = above[j] + 1.0 - on_line(x, below[k], below[k + 1], above[j])
        if here > distance:
            distance, left, right = here, below[k], above[j]
    return distance, left, right


@ordered
def farthest(x, hull, size, first, last, sign):
    """n times the largest distance of F from a hull, below for sign 1, between its corners first and last."""
    most = 1.0
    for k in range(size - 1):
        a, b = hull[k], hull[k + 1]
        if a >= first and b <= last:
            for i in range(a + 1, b):
                most = max(most, 1.0 + sign * (i - on_line(x, a, b, i)))
    return most


@ordered
def dip_of_sorted(x):
    """Hartigan's dip of ascending numbers x (n,), no two equal, in O(n) a round and few rounds."""
    n = x.size
    below, above = np.empty(n, np.int64), np.empty(n, np.int64)
    first, last, twice = 0, n - 1, 1.0
    while first < last:
        n_below, n_above = hull_of(x, first, last, 1, below), hull_of(x, first, last, -1, above)
        distance, left, right = widest(x, below, n_below, above, n_above)
        if distance <= twice:
            break
        twice = max(twice, farthest(x, below, n_below, first, left, 1))
        twice = max(twice, farthest(x, above, n_above, right, last, -1))
        first, last = left, right
    return twice / (2.0 * n)

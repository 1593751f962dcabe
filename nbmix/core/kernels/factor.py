"""The loadings of the mixture with shared axes, ``nbmix.core.factor``."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nbmix.core.kernels.elementary import ordered, reordered

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

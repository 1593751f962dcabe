"""How far apart two components or groups are, in log likelihood ratios of cells that neither has seen.

A component is cut from its kind wherever genes depend on each other within it, so a likelihood that calls
them independent cannot say whether two components are two kinds. The cells can: over those of a and of b,

    d_i = ln p(x_i | a) - ln p(x_i | b)

has whatever correlation genes have in it already. A cut through a continuum leaves d with one mode, two kinds
leave two and few cells between. With one mode for each side d grows with the size factor s_i, and so does its
variance; both are taken out, see ``separation`` and ``standardised``.

Merging of mixture components by unimodality, without likelihood ratios and counts: Hennig 2010; by entropy:
Baudry et al. 2010.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from nbmix.core.dip import dip, dip_p_value

RIDGE = 1e-3  # of the mean variance: less is noise of a covariance that some hundred cells estimate

WIDEST = 100.0  # of separations: more says no more, and sides of one cell each show no spread at all

FEWEST_CELLS = 3  # of a side: two that lie apart are no mode

MOST_IN_WINDOW = 800  # of a side in a test: more would find dents that are too shallow for a gap


def ratio_space(log_likelihood: np.ndarray, size_factors: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Cells in the space of log likelihood ratios per unit of depth, whitened within components.

        F_i = Q' (l_i - mean_c l_ic) / s_i,    Q (C, C - 1) orthonormal contrasts
        S   = sum_i s_i (F_i - m_i)(F_i - m_i)' / sum_i s_i,    m_i the mean of F, by s, in i's component

    The noise of F_i has variance 1 / s_i, hence the weights. F S^-1/2 is what a linear discriminant looks at:
    it undoes, from cells that components have not seen, that genes depend on each other within a kind.

    Args:
        log_likelihood: (cells, C), ln p(x_i | c) in nats.
        size_factors: (cells,), positive.
        label: (cells,), the component of each cell.

    Returns:
        (cells, C - 1).
    """
    n_components = log_likelihood.shape[1]
    contrasts = np.linalg.svd(np.eye(n_components) - 1.0 / n_components)[0][:, : n_components - 1]
    centred = log_likelihood - log_likelihood.mean(1, keepdims=True)
    slopes = centred @ contrasts / size_factors[:, None]
    covariance = np.zeros((n_components - 1, n_components - 1))
    for c in np.unique(label):
        mine = label == c
        weights = size_factors[mine, None]
        residual = slopes[mine] - (weights * slopes[mine]).sum(0) / weights.sum()
        covariance += (weights * residual).T @ residual
    covariance /= size_factors.sum()
    variances, axes = np.linalg.eigh(covariance)
    spread = variances + RIDGE * variances.mean()
    return slopes @ axes / np.sqrt(np.where(spread > 0, spread, 1.0))


def neighbours(points: np.ndarray, n_neighbours: int) -> np.ndarray:
    """(cells, n_neighbours) indices of each point's nearest others; fewer columns where there are no more.

    Args:
        points: (cells, dimensions).
    """
    n_cells = len(points)
    found = cKDTree(points).query(points, np.arange(1, min(n_neighbours + 1, n_cells) + 1))[1]
    itself = found == np.arange(n_cells)[:, None]
    itself[~itself.any(1), -1] = True  # one of many in the same place: its last goes
    return found[~itself].reshape(n_cells, -1)


def separation(ratios: np.ndarray, in_first: np.ndarray, size_factors: np.ndarray, depth: float) -> float:
    """Distance of two sides in standard deviations of d, both at size factor ``depth``.

    With |d_i| = alpha s_i + noise of variance v s_i on either side,

        alpha = sum d / sum s,    v = mean of (d - alpha s)^2 / s
        D = (alpha_a + alpha_b) depth / sqrt((v_a + v_b) depth / 2).

    A normal d that is cut in the middle has D = 2 (2 / pi)^1/2 / (1 - 2 / pi)^1/2 = 2.65, a uniform one 3.46.

    Args:
        ratios: (cells,), d in nats, of the cells of either side.
        in_first: (cells,), whether a cell is on the side where d is large.
        size_factors: (cells,).

    Returns:
        D, from 0 to ``WIDEST``; 0 where a side has no cells.
    """
    if in_first.all() or not in_first.any():
        return 0.0
    (rise_a, variance_a), (rise_b, variance_b) = (
        _growth(d[side], size_factors[side]) for side, d in ((in_first, ratios), (~in_first, -ratios))
    )
    rise, variance = rise_a + rise_b, (variance_a + variance_b) / 2
    if rise <= 0:
        return 0.0
    return float(rise * depth / max(np.sqrt(variance * depth), rise * depth / WIDEST))


def inflation(ratios: np.ndarray, in_first: np.ndarray, size_factors: np.ndarray) -> float:
    """Variance of d over what it is where genes are independent within either side.

    A log likelihood ratio of many small independent terms has a variance of twice its mean. With alpha and v
    as in ``separation``,

        tau = (v_a + v_b) / 2 / (alpha_a + alpha_b),

    which is 1 then, and more the more genes rise and fall together.

    Args:
        ratios, in_first, size_factors: as in ``separation``.

    Returns:
        tau; NaN where d does not tell the sides apart, or one has no cells.
    """
    if in_first.all() or not in_first.any():
        return np.nan
    (rise_a, variance_a), (rise_b, variance_b) = (
        _growth(d[side], size_factors[side]) for side, d in ((in_first, ratios), (~in_first, -ratios))
    )
    rise = rise_a + rise_b
    return float((variance_a + variance_b) / 2 / rise) if rise > 0 else np.nan


def _growth(d: np.ndarray, size_factors: np.ndarray) -> tuple[float, float]:
    """alpha and v of d = alpha s + noise of variance v s."""
    slope = d.sum() / size_factors.sum()
    return float(slope), float(np.mean((d - slope * size_factors) ** 2 / size_factors))


def standardised(ratios: np.ndarray, in_first: np.ndarray, size_factors: np.ndarray) -> np.ndarray:
    """d in standard deviations of its noise at the cell's depth; its sign, and so the boundary, stays.

        z_i = d_i / sqrt(v_1 t_i + v_2 t_i^2),    t = s / median s

    The first part is noise of counts, the second a programme that scales with depth. Both are at least 0, by
    least squares of (d - alpha s)^2 / t on (1, t), alpha as in ``separation``, over both sides.
    """
    residual = ratios.astype(np.float64)
    for side in (in_first, ~in_first):
        s = size_factors[side]
        residual[side] -= ratios[side].sum() / s.sum() * s if s.size else 0.0
    t = size_factors / np.median(size_factors)
    of_counts, of_programme = _two_variances(residual**2 / t, t)
    if of_counts == of_programme == 0:
        of_counts = 1.0
    return ratios / np.sqrt(of_counts * t + of_programme * t**2)


def _two_variances(y: np.ndarray, t: np.ndarray) -> tuple[float, float]:
    """Least squares of y >= 0 on (1, t), t > 0, with coefficients of at least 0."""
    spread = ((t - t.mean()) ** 2).sum()
    slope = ((t - t.mean()) * y).sum() / spread if spread > 0 else 0.0
    if slope <= 0:
        return float(y.mean()), 0.0
    level = y.mean() - slope * t.mean()
    return (float(level), float(slope)) if level > 0 else (0.0, float((t * y).sum() / (t * t).sum()))


def window(values: np.ndarray, in_first: np.ndarray, most: int = MOST_IN_WINDOW) -> np.ndarray:
    """As many values of either side as the smaller has, those nearest to the boundary, ascending.

    A stretch of a unimodal distribution is unimodal, so this makes no gap; without it a rare kind's mode
    would be lost beside a large one's. Of more than ``most`` a side, that many of evenly spaced ranks.
    """
    first, second = np.sort(values[in_first]), np.sort(values[~in_first])
    n = min(first.size, second.size)
    ranks = np.arange(n) if n <= most else np.linspace(0, n - 1, most).astype(np.int64)
    return np.sort(np.concatenate([first[ranks], second[second.size - 1 - ranks]]))


def gap_p_value(ratios: np.ndarray, in_first: np.ndarray, size_factors: np.ndarray) -> float:
    """Chance of as deep a valley between the two sides where there is one mode: small is a gap.

    By the dip of the standardised ratios in the window, under a uniform distribution; 1 where a side has
    fewer than ``FEWEST_CELLS``. Arguments as in ``separation``.
    """
    if min(in_first.sum(), (~in_first).sum()) < FEWEST_CELLS:
        return 1.0
    values = window(standardised(ratios, in_first, size_factors), in_first)
    return dip_p_value(dip(values), values.size)

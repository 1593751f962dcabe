"""EM for the negative binomial of one gene, by two of its constructions.

For cells i with counts x_i and size factors s_i, both maximise

    l(ln mu, ln r) = sum_i ln NB(x_i; mean s_i mu, inverse dispersion r),        rho = mu / r,

and differ in what they call missing.

**Poisson-Gamma** (Karlis 2005, "EM algorithm for mixed Poisson and other discrete distributions"): the rates.
lambda_i ~ Gamma(shape r, rate 1 / rho) and x_i ~ Poisson(s_i lambda_i), so that given x_i lambda_i ~
Gamma(x_i + r, s_i + 1 / rho).

    E step:  E[lambda_i] = (x_i + r) / (s_i + 1 / rho)     E[ln lambda_i] = psi(x_i + r) - ln(s_i + 1 / rho)
    M step:  mu = mean_i E[lambda_i]                       ln r - psi(r) = ln mu - mean_i E[ln lambda_i]

The last equation is solved, not just approached by one Newton step. The source notebook prints the rate as
mean(lambda) / r (it is r / mean(lambda)) and the shape's gradient with E[ln x] (it is E[ln lambda]).

**Poisson-Log** (Adamidis 1999, "An EM algorithm for estimating negative binomial parameters"): clusters of
molecules. With u = s rho, theta = u / (1 + u) and lambda = r ln(1 + u), there are m ~ Poisson(lambda)
clusters, cluster t has y_t ~ Log(theta) molecules, and x = sum_t y_t. A third variable, on 0 < z < 1, makes
an exponential family of each: p(y, z) = (1 - theta)^z theta^(y - 1) / y. For equal size factors the expected
complete log likelihood is, but for terms without lambda and theta,

    Q = sum_i E[m_i] ln lambda - lambda - E[ln m_i!] + E[sum_t z_it] ln(1 - theta) + (x_i - E[m_i]) ln theta

The source notebook gave this EM up, as E[ln m_i!] is intractable and "neglected". But that is an expectation
under the *old* parameters, hence constant in (lambda, theta): the M step does not need it, and nothing is
neglected. What the M step needs is closed,

    E step:  E[m_i] = r (psi(x_i + r) - psi(r))            E[z] = 1 / ln(1 + u) - 1 / u
    M step:  lambda = mean_i E[m_i]                        theta = A / (A + B), so u = A / B
             A = sum_i x_i - E[m_i]                        B = E[z] sum_i E[m_i]

and r = lambda / ln(1 + u), mu = r u / s. E[m]: the probability of (m, x) is proportional to r^m and its sum
over m to G(x + r) / G(r), hence E[m] = r d/dr ln(G(x + r) / G(r)). E[z]: whatever y is, z has a density
proportional to (1 + u)^-z.

*Unequal size factors* tie lambda_i = r ln(1 + s_i rho) to theta_i, and theta = A / (A + B) no longer holds.
The extension here is an alternating ECM (Meng & van Dyk 1997, "The EM algorithm: an old folk-song sung to a
fast new tune"): r and mu in turn, each with those variables missing that give it a closed form. Either
raises l.

    clusters missing, rho held:  r = sum_i E[m_i] / sum_i ln(1 + s_i rho)
    rates missing, r held:       mu = mean_i (x_i + r) / (s_i + 1 / rho)

**Speed.** A maximum close to the Poisson takes EM thousands of steps. So an iteration also tries Newton's
step on l, in ln r and in phi = 1 / r (in which l is close to a parabola where r is large), no longer than
steps that worked before, and keeps the best of the three: l rises at least as much as by EM from the same
point. These steps are not those of ``nbmix.core.newton``: EM's is there where Newton's is bad, and a shift by
a millionth of the largest curvature would slow fits close to the Poisson. ``accelerate=False`` is EM alone. A
fit ends where Newton's step promises less than ``TOLERANCE``.

**Where there is no maximum.** Where the counts vary no more than Poisson counts, l rises as r grows without
end, towards the Poisson's. The result is that limit: log_inv_disp = inf. For equal size factors this is so if
and only if sum (x - mean)^2 <= sum x, and else the maximum is the only one (Levin & Reeds 1977, "Compound
multinomial likelihood functions are unimodal"). For unequal ones l may have several maxima: the climb begins
at the best of a few r, and its end is compared with the Poisson. Without any count mu = 0: log_mean = -inf,
log_inv_disp = inf.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import digamma, gammaln, zeta
from torch import Tensor

from nbmix.core.likelihood import check_size_factors
from nbmix.core.raw_counts import check_counts
from nbmix.core.special import EXACT_COUNT, level_curve, tail_curve
from nbmix.errors import InputError

__all__ = ["NBFit", "fit_pois_gam", "fit_pois_log"]

TOLERANCE = 1e-9  # nats that a Newton step promises, where a fit ends

START_LOG_INV_DISPS = (-5.0, -3.0, -1.0, 1.0, 3.0, 5.0)

MOST_LEVELS = 4096  # up to here the sum over levels is faster than Stirling's series

LONGEST_STEP = 3.0  # of Newton, in ln r


class NBFit(NamedTuple):
    """Negative binomial of one gene, as ``fit_pois_gam`` and ``fit_pois_log`` return it.

    Attributes:
        log_mean: ln mu, per unit of size factor; -inf for a gene without counts.
        log_inv_disp: ln r; inf for the Poisson.
        trace: (iterations + 1,) float64 log likelihood in nats, with the -ln G(x + 1) term, at the start and
            after each iteration. It never falls. A last step to the Poisson counts as one more.

    >>> import nbmix
    >>> nbmix.em.fit_pois_gam([0, 0, 1, 2, 9], s=1e4).trace.shape
    (3,)
    """

    log_mean: float
    log_inv_disp: float
    trace: np.ndarray


def fit_pois_gam(x: Any, s: Any, max_iters: int = 1000, *, accelerate: bool = True) -> NBFit:
    """Maximum likelihood of one gene by EM with the Poisson rates missing (Karlis 2005).

        E[lambda_i] = (x_i + r) / (s_i + r / mu)      E[ln lambda_i] = psi(x_i + r) - ln(s_i + r / mu)
        mu <- mean_i E[lambda_i]                      ln r - psi(r) <- ln mu - mean_i E[ln lambda_i]

    The docstring of the module, and the page One gene of the documentation, have the derivation. To use a
    Poisson fit as a component, clip log_inv_disp to ``nbmix.core.parameters.LOG_INV_DISP_RANGE``.

    Args:
        x: (cells,) counts.
        s: (cells,) size factors, or one for all. Cells with s = 0 have to be empty, and say nothing.
        max_iters: the largest number of iterations; a fit that ends there warns.
        accelerate: whether to try Newton's step beside that of EM.

    Returns:
        ``NBFit``: log_mean, log_inv_disp and the trace of the log likelihood.

    Raises:
        InputError: counts that are not non-negative integers up to 2**24; no cells; size factors that are
            negative, not finite, 0 for a cell with counts or 0 for all cells; shapes that do not fit;
            max_iters below 1.

    >>> import nbmix, numpy as np
    >>> log_mean, log_inv_disp, trace = nbmix.em.fit_pois_gam(np.array([0, 0, 1, 2, 9]), s=1e4)
    >>> print(f"{log_mean:.4f} {log_inv_disp:.4f} {trace[-1]:.6f}")
    -8.3349 -0.6774 -10.024232
    """
    return _fit(x, s, max_iters, accelerate, pois_gam_step)


def fit_pois_log(x: Any, s: Any, max_iters: int = 1000, *, accelerate: bool = True) -> NBFit:
    """Maximum likelihood of one gene by EM with the clusters of molecules missing (Adamidis 1999).

        E[m_i] = r (psi(x_i + r) - psi(r))            A = sum_i x_i - E[m_i]
        s mu / r <- A / B                             B = (1 / ln(1 + s mu / r) - r / (s mu)) sum_i E[m_i]
        r <- mean_i E[m_i] / ln(1 + A / B)

    for equal size factors. For unequal ones it is an extension, which is in closed form as well. The
    docstring of the module, and the page One gene of the documentation, have the derivation. Arguments,
    result, errors and the maximum are those of ``fit_pois_gam``.

    >>> import nbmix, numpy as np
    >>> log_mean, log_inv_disp, trace = nbmix.em.fit_pois_log(np.array([0, 0, 1, 2, 9]), s=1e4)
    >>> print(f"{log_mean:.4f} {log_inv_disp:.4f} {trace[-1]:.6f}")
    -8.3349 -0.6774 -10.024232
    >>> nbmix.em.fit_pois_log([2, 2, 3], s=1.0).log_inv_disp  # varies less than a Poisson
    inf
    """
    return _fit(x, s, max_iters, accelerate, pois_log_step)


@dataclass(frozen=True)
class Gene:
    """The cells of one gene that have a positive size factor, alike ones put together.

    Attributes:
        x, s, weight: (distinct,) counts, size factors and numbers of cells.
        n_cells, total: number of cells, sum of counts.
        equal: whether all size factors are.
        level, level_weight: (levels,) t >= 1, and the cells whose sum of levels holds t.
        high, high_weight: (high counts,) those that the series handles from EXACT_COUNT on, and their cells.
        constant: sum_i x_i ln s_i - ln G(x_i + 1), nats.
    """

    x: np.ndarray
    s: np.ndarray
    weight: np.ndarray
    n_cells: int
    total: float
    equal: bool
    level: Tensor
    level_weight: Tensor
    high: Tensor
    high_weight: Tensor
    constant: float

    @classmethod
    def checked(cls, x: Any, s: Any) -> Gene:
        x = np.asarray(x)
        if x.ndim != 1:
            raise InputError(f"x has shape {x.shape}; give one count for each cell")
        counts = check_counts(x[:, None], "x")
        s = np.asarray(s, dtype=np.float64)
        s = np.broadcast_to(s, x.shape) if s.ndim == 0 else s
        check_size_factors(s, counts)
        if not s.any():
            raise InputError("size_factors is 0 for all cells; give at least one that is positive")
        return cls._of(counts.toarray()[:, 0].astype(np.float64)[s > 0], s[s > 0])

    @classmethod
    def _of(cls, x: np.ndarray, s: np.ndarray) -> Gene:
        n_cells, equal = x.size, bool((s == s[0]).all())
        values, n_each = np.unique(x, return_counts=True)
        constant = x @ np.log(s) - n_each @ gammaln(values + 1)
        series = values > MOST_LEVELS
        last = np.where(series, EXACT_COUNT, values).astype(np.int64)  # t < last is summed
        level = np.arange(1, max(last.max(), 1))
        n_reaching = np.cumsum(np.bincount(last, n_each)[::-1])[::-1]  # cells with last >= t
        return cls(
            x=values if equal else x,
            s=s[:1] if equal else s,
            weight=n_each.astype(np.float64) if equal else np.ones(n_cells),
            n_cells=n_cells,
            total=float(x.sum()),
            equal=equal,
            level=torch.from_numpy(level.astype(np.float64)),
            level_weight=torch.from_numpy(n_reaching[level + 1]),
            high=torch.from_numpy(values[series]),
            high_weight=torch.from_numpy(n_each[series].astype(np.float64)),
            constant=float(constant),
        )

    def at(self, log_mean: float, log_inv_disp: float) -> Point:
        """The log likelihood at a finite point, and its derivatives."""
        b = torch.tensor(log_inv_disp, dtype=torch.float64)
        rising = np.array([float(self.level_weight @ part) for part in level_curve(self.level, b)])
        if len(self.high):
            rising += [float(self.high_weight @ part) for part in tail_curve(self.high, b)]
        value, first, second = rising.tolist()
        r = math.exp(log_inv_disp)
        scaled = self.s * math.exp(log_mean - log_inv_disp)
        share = scaled / (1 + scaled)
        log_scaled = self.weight * np.log1p(scaled)
        weighted = self.weight * (self.x + r)
        mean, bend = float((weighted * share).sum()), float((weighted * share * (1 - share)).sum())
        log_sum, share_sum = float(log_scaled.sum()), float((self.weight * share).sum())
        return Point(
            log_mean=log_mean,
            log_inv_disp=log_inv_disp,
            value=self.constant + value + self.total * log_mean - float(((self.x + r) * log_scaled).sum()),
            grad_a=self.total - mean,
            grad_b=first - r * log_sum + mean,
            hess_aa=-bend,
            hess_ab=bend - r * share_sum,
            hess_bb=second - r * log_sum + 2 * r * share_sum - bend,
            clusters=self.total + first,
            singles=-first,
            scaled=scaled,
            log_sum=log_sum,
        )

    def poisson(self) -> float:
        """Log likelihood of the limit r = inf at its mu = sum x / sum s, for a gene with counts."""
        return self.constant + self.total * self.poisson_log_mean - self.total

    @property
    def poisson_log_mean(self) -> float:
        return math.log(self.total) - math.log(float((self.weight * self.s).sum()))

    def excess(self) -> float:
        """sum (x - s mu)^2 - x at the Poisson's mu: twice the slope of l in phi at phi = 0."""
        mean = self.s * math.exp(self.poisson_log_mean)
        return float((self.weight * ((self.x - mean) ** 2 - self.x)).sum())


class Point(NamedTuple):
    """Log likelihood at a = ln mu, b = ln r, its derivatives, and what the E steps need of the same sums.

    Attributes:
        clusters, singles: sum_i E[m_i] and sum_i x_i - E[m_i] of Poisson-Log.
        scaled: (distinct,) s rho.
        log_sum: sum_i ln(1 + s_i rho).
    """

    log_mean: float
    log_inv_disp: float
    value: float
    grad_a: float
    grad_b: float
    hess_aa: float
    hess_ab: float
    hess_bb: float
    clusters: float
    singles: float
    scaled: np.ndarray
    log_sum: float

    @property
    def promise(self) -> float:
        """Nats that Newton's step promises; inf where the log likelihood is not concave."""
        determinant = self.hess_aa * self.hess_bb - self.hess_ab**2
        if determinant <= 0 or self.hess_aa >= 0:
            return math.inf
        slope = self.hess_bb * self.grad_a**2 - 2 * self.hess_ab * self.grad_a * self.grad_b
        return -(slope + self.hess_aa * self.grad_b**2) / determinant / 2


_Step = Callable[[Gene, Point], tuple[float, float]]  # to ln mu, ln r


def pois_gam_step(gene: Gene, at: Point) -> tuple[float, float]:
    """ln mu and ln r after EM with the rates missing."""
    r = math.exp(at.log_inv_disp)
    # in units of mu and from the logarithm of r, as both sides of the last equation vanish for large r
    surprise = (gene.x / r - at.scaled) / (1 + at.scaled)
    log_ratio = math.log1p(float(gene.weight @ surprise) / gene.n_cells)
    gap = log_ratio + (at.log_sum - at.clusters / r) / gene.n_cells + at.log_inv_disp - float(digamma(r))
    return at.log_mean + log_ratio, math.log(shape_of_gap(gap)) if gap > 0 else at.log_inv_disp


def shape_of_gap(gap: float) -> float:
    """r with ln r - psi(r) = gap > 0, by Newton in 1 / r (Minka 2002, "Estimating a Gamma distribution")."""
    r = (3 - gap + math.sqrt((gap - 3) ** 2 + 24 * gap)) / (12 * gap)
    if r > 1e5:  # 1e-10 off, where the differences below are as much off
        return r
    for _ in range(4):  # from 1.5 % off, each squares the error
        r /= 1 + (math.log(r) - float(digamma(r)) - gap) / (1 - r * float(zeta(2, r)))
    return r


def pois_log_step(gene: Gene, at: Point) -> tuple[float, float]:
    """ln mu and ln r after EM with the clusters missing."""
    if not gene.equal:
        r = at.clusters / at.log_sum
        mean = (gene.weight * (gene.x + r) / (1 + at.scaled)).sum() / gene.n_cells  # in units of rho
        return at.log_mean - at.log_inv_disp + math.log(mean), math.log(r)
    scaled = float(at.scaled[0])
    if scaled > 1e-4:
        expected_z = 1 / math.log1p(scaled) - 1 / scaled
    else:  # where these cancel
        expected_z = 1 / 2 - scaled / 12 + scaled**2 / 24
    odds = at.singles / (at.clusters * expected_z)
    r = at.clusters / gene.n_cells / math.log1p(odds)
    return math.log(r * odds / gene.s[0]), math.log(r)


def _newton_in_log_inv_disp(at: Point, longest: float) -> tuple[float, float]:
    step = _uphill(at.grad_a, at.grad_b, at.hess_aa, at.hess_ab, at.hess_bb)
    step *= longest / max(longest, np.abs(step).max())
    return at.log_mean + float(step[0]), at.log_inv_disp + float(step[1])


def _newton_in_disp(at: Point, longest: float) -> tuple[float, float]:
    r = math.exp(at.log_inv_disp)
    bend = r * r * (at.hess_bb + at.grad_b)
    up_a, up_phi = _uphill(at.grad_a, -r * at.grad_b, at.hess_aa, -r * at.hess_ab, bend).tolist()
    growth = min(max(1 + r * up_phi, math.exp(-longest)), math.exp(longest))  # of phi, which stays positive
    return at.log_mean + min(max(up_a, -longest), longest), at.log_inv_disp - math.log(growth)


def _uphill(grad_a: float, grad_c: float, hess_aa: float, hess_ac: float, hess_cc: float) -> np.ndarray:
    """Newton's step in (a, c), with the Hessian's eigenvalues made negative, so that it leads uphill."""
    values, axes = np.linalg.eigh(np.array([[hess_aa, hess_ac], [hess_ac, hess_cc]]))
    size = np.abs(values)
    return axes @ (axes.T @ np.array([grad_a, grad_c]) / np.maximum(size, 1e-12 * size.max()))


def _fit(x: Any, s: Any, max_iters: int, accelerate: bool, em_step: _Step) -> NBFit:
    if max_iters < 1:
        raise InputError(f"max_iters={max_iters} has to be 1 or more")
    gene = Gene.checked(x, s)
    if gene.total == 0:
        return NBFit(-math.inf, math.inf, np.zeros(1))
    poisson = gene.poisson()
    if gene.equal and gene.excess() <= 0:
        return NBFit(gene.poisson_log_mean, math.inf, np.array([poisson]))
    at, trace, ended = _climb(gene, max_iters, accelerate, em_step)
    # where l rises with phi from 0 on, only a fit that was cut short ends below the Poisson
    if poisson >= at.value and (ended or gene.excess() <= 0):
        return NBFit(gene.poisson_log_mean, math.inf, np.array([*trace, poisson]))
    if not ended:
        warnings.warn(
            f"max_iters={max_iters} ended the fit; Newton's step promises {at.promise:.1e} nats more",
            stacklevel=3,
        )
    return NBFit(at.log_mean, at.log_inv_disp, np.array(trace))


def _climb(gene: Gene, max_iters: int, accelerate: bool, em_step: _Step) -> tuple[Point, list[float], bool]:
    """Where the climb comes to, the log likelihoods on the way, and whether it came to its end."""
    starts = (gene.at(gene.poisson_log_mean, log_inv_disp) for log_inv_disp in START_LOG_INV_DISPS)
    at = max(starts, key=lambda point: point.value)
    trace, longest = [at.value], LONGEST_STEP
    for _ in range(max_iters):
        if at.promise <= TOLERANCE:
            return at, trace, True
        steps = [em_step(gene, at)]
        if accelerate:
            steps += [_newton_in_log_inv_disp(at, longest), _newton_in_disp(at, longest)]
        points = [gene.at(*step) for step in steps]
        values = [point.value for point in points]
        best = int(np.argmax(values))
        if not values[best] > at.value:  # as high as rounding allows
            return at, trace, True
        longest = longest / 4 if best == 0 else min(longest * 4, LONGEST_STEP)
        at = points[best]
        trace.append(at.value)
    return at, trace, at.promise <= TOLERANCE

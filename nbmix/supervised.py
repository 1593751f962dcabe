"""Fits given the labels: one distribution of the rate lambda for every label and gene.

x_ij ~ Poisson(s_i lambda_ij), and within label k lambda_ij is drawn from

    point         a point mass at mu_kj: x is Poisson
    gamma         Gamma with mean mu_kj and shape r_kj: x is negative binomial
    point gamma   0 with probability pi_kj, else that Gamma: x is zero-inflated negative binomial

(Sarkar & Stephens 2021, "Separating measurement and expression models clarifies confusion in single-cell
RNA sequencing analysis"). With covariates z_i, mu_kj becomes mu_kj exp(z_i . c_j): the coefficients of a gene
are shared by all labels.

All fits maximise the likelihood within the bounds of ``nbmix.components``. Where a gene is silent in a label
the mean would be 0. It stays at the floor ``lowest_log_mean`` instead, so that a new cell with such a count
has a finite likelihood and the fit can serve as components. The counts then say nothing of the dispersion,
and the fit is the Poisson's: ln r at its upper bound, pi = 0. A label without cells (a category that no cell
has) is silent in every gene; its log likelihoods are 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scipy.special import gammaln
from torch import Tensor
from torch.nn.functional import softplus

from nbmix.checks import check_counts
from nbmix.components import (
    LOG_INV_DISP_RANGE,
    ExpectedLogLikelihood,
    NewtonMStep,
    lowest_log_mean,
    moment_components,
)
from nbmix.errors import InputError
from nbmix.likelihood import check_size_factors
from nbmix.products import WIDEST_SOFTPLUS, Basis, CountLevels, SizeFactorNodes
from nbmix.statistics import SufficientStatistics

TOLERANCE = 1e-10  # nats that a step of the gamma fit without covariates must promise
CLIMB_TOLERANCE = 1e-9  # nats, likewise of the other fits
MAX_STEPS = 200
LONGEST_STEP = 3.0
# Newton is shifted and crawls on the plateau before the upper bound, where genes that are Poisson belong
START_LOG_INV_DISPS = (1.0, LOG_INV_DISP_RANGE[1])
NODE_TOLERANCE = 1e-13  # relative; values are reported, so finer than in the products
SEGMENT, NODES_A_SEGMENT = 0.25, 16  # in ln s; error per zero below 1e-11 down to pi = 1e-4
INFLATED_LOG_INV_DISP, LITTLE_LOGIT_ZERO = 4.0, -3.0  # where point gamma fits begin
FEWEST_ZEROS = 1e-3  # cells; point masses that hold fewer gain less than 5e-7 nats
LEAST_GAIN = 1e-7  # nats, for a point mass to be reported
START_WITH_DESIGN = (-3.0, 5.0)  # bounds of ln r
COLLINEAR = 1e-8  # of a covariate's variation, within labels and beside the others
LARGEST_LOG_RATIO = 30.0  # that one covariate may put between a cell and the mean of its values
NO_MEAN = -300.0  # ln mu of a label without a part in the likelihood
DENSE_AT_ONCE = 2**21  # counts
TINY = torch.finfo(torch.float64).tiny


class PointFit(NamedTuple):
    """Poisson given the label.

    Attributes:
        labels: (labels,) what the rows stand for, sorted, or in the order of their categories.
        log_mean: (labels, genes) float64 ln mu, per unit of size factor.
        log_likelihood: (labels, genes) float64 nats, summed over the label's cells, with -ln G(x + 1).
        coefficients: (covariates, genes) float64, per unit of the covariate.
    """

    labels: np.ndarray
    log_mean: Tensor
    log_likelihood: Tensor
    coefficients: Tensor


class GammaFit(NamedTuple):
    """Negative binomial given the label; as ``PointFit``, and log_inv_disp (labels, genes) ln r."""

    labels: np.ndarray
    log_mean: Tensor
    log_inv_disp: Tensor
    log_likelihood: Tensor
    coefficients: Tensor


class PointGammaFit(NamedTuple):
    """Zero-inflated negative binomial given the label.

    As ``GammaFit``; log_mean is that of the Gamma part alone, and logit_zero (labels, genes) is
    ln(pi / (1 - pi)), -inf where pi = 0: there the fit is the Gamma's.
    """

    labels: np.ndarray
    log_mean: Tensor
    log_inv_disp: Tensor
    logit_zero: Tensor
    log_likelihood: Tensor
    coefficients: Tensor


class GeneComparison(NamedTuple):
    """Log likelihood (labels, genes) of each gene in the cells of each label, nats."""

    labels: np.ndarray
    point: Tensor
    gamma: Tensor

    @property
    def gain(self) -> Tensor:
        """(labels, genes) nats by which the negative binomial is better; 0 where a gene is Poisson."""
        return self.gamma - self.point


def fit_point(counts: Any, labels: Any, size_factors: Any = None, design: Any = None) -> PointFit:
    """Poisson fit of every label and gene: mu_kj = sum_i x_ij / sum_i s_i over the label's cells.

    With a design the means are eliminated, mu_kj = sum_i x_ij / sum_i s_i exp(z_i . c_j), and Newton climbs
    the concave rest in c_j. Where a gene's likelihood rises without end (it is silent wherever a
    covariate is set, say), the coefficient ends at a bound, a factor e^30 between a cell and the average one.
    The floor of a silent gene then holds for the mean over the label's cells.

    Args:
        counts: (cells, genes) raw counts, SciPy sparse or dense.
        labels: (cells,) strings, integers or categories; none missing.
        size_factors: (cells,); default the row sums. 0 only for an empty cell.
        design: (cells, covariates) numbers z, without an intercept: the labels are the intercepts.

    Raises:
        InputError: arguments that do not fit; see ``nbmix.checks.check_counts`` for the counts.

    >>> fit = fit_point(np.array([[1, 3], [3, 1], [0, 8]]), ["a", "a", "b"])
    >>> fit.log_mean.exp()[0]
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    data = _LabelledCounts.checked(counts, labels, size_factors)
    return _fit_point(data) if design is None else _fit_point_with(_Design.checked(design, data), data)


def fit_gamma(counts: Any, labels: Any, size_factors: Any = None, design: Any = None) -> GammaFit:
    """Negative binomial fit of every label and gene, by Newton on the sufficient statistics.

    Without a design the cost of Newton does not depend on the number of cells; with one every step visits all
    cells. Arguments and errors as in ``fit_point``.

    >>> fit = fit_gamma(np.array([[1, 9], [6, 4], [0, 8]]), ["a", "a", "b"])
    >>> fit.log_inv_disp.shape
    torch.Size([2, 2])
    """
    data = _LabelledCounts.checked(counts, labels, size_factors)
    return _fit_gamma(data) if design is None else _fit_gamma_with(_Design.checked(design, data), data)


def fit_point_gamma(counts: Any, labels: Any, size_factors: Any = None, design: Any = None) -> PointGammaFit:
    """Zero-inflated negative binomial fit of every label and gene, by Newton in (ln mu, ln r, logit pi).

    The log likelihood may have several maxima: the best of a few starts is taken, and the gamma fit where no
    point mass gains anything. A design moves the mean of the Gamma part; pi is one number for a label and
    gene. Arguments and errors as in ``fit_point``.

    >>> counts = np.array([[9, 1], [0, 9], [8, 2], [0, 8], [7, 3], [0, 9]])
    >>> fit = fit_point_gamma(counts, ["a"] * 6, size_factors=[10] * 6)
    >>> bool((fit.log_likelihood >= fit_gamma(counts, ["a"] * 6, [10] * 6).log_likelihood).all())
    True
    """
    data = _LabelledCounts.checked(counts, labels, size_factors)
    if design is None:
        return _fit_point_gamma(data)
    return _fit_point_gamma_with(_Design.checked(design, data), data)


def compare_genes(counts: Any, labels: Any, size_factors: Any = None) -> GeneComparison:
    """Log likelihood of every gene and label under its Poisson and its negative binomial fit.

    Arguments and errors as in ``fit_point``.

    >>> compared = compare_genes(np.array([[1, 9], [6, 4], [0, 8]]), ["a", "a", "b"])
    >>> compared.gain.shape
    torch.Size([2, 2])
    """
    data = _LabelledCounts.checked(counts, labels, size_factors)
    point, gamma = _fit_point(data), _fit_gamma(data)
    return GeneComparison(data.values, point.log_likelihood, gamma.log_likelihood)


# ---- input -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LabelledCounts:
    """Checked counts (cells, genes) with size factors (cells,), label values and codes (cells,)."""

    counts: sp.csr_matrix
    sizes: np.ndarray
    values: np.ndarray
    codes: np.ndarray

    @classmethod
    def checked(cls, counts: Any, labels: Any, size_factors: Any) -> _LabelledCounts:
        matrix = check_counts(counts, "counts")
        if size_factors is None:
            sizes = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()
        else:
            sizes = np.asarray(size_factors, dtype=np.float64).ravel()
        check_size_factors(sizes, matrix)
        if np.shape(labels) != (matrix.shape[0],):
            raise InputError(
                f"labels has shape {np.shape(labels)}; give one for each of {matrix.shape[0]} cells"
            )
        categories = pd.Categorical(labels)
        codes = np.asarray(categories.codes, np.int64)
        if (codes < 0).any():
            cell = int(np.argmax(codes < 0))
            raise InputError(f"labels is missing for cell {cell}; leave out cells without a label")
        return cls(matrix, sizes, np.asarray(categories.categories), codes)

    @property
    def n_cells(self) -> int:
        return self.counts.shape[0]

    @property
    def n_genes(self) -> int:
        return self.counts.shape[1]

    @property
    def n_labels(self) -> int:
        return self.values.size

    @property
    def total_size(self) -> float:
        """Sum of the size factors, of which the floor of the means depends; 1 where all cells are empty."""
        return float(self.sizes.sum()) or 1.0

    def of(self, label: int) -> tuple[sp.csr_matrix, np.ndarray]:
        """The cells of one label and their size factors."""
        rows = np.flatnonzero(self.codes == label)
        return self.counts[rows], self.sizes[rows]


# ---- point -------------------------------------------------------------------------------------------


def _fit_point(data: _LabelledCounts) -> PointFit:
    floor = lowest_log_mean(data.total_size)
    rows = []
    for k in range(data.n_labels):
        counts, sizes = data.of(k)
        totals, size = _gene_totals(counts), sizes.sum()
        with np.errstate(divide="ignore"):
            log_mean = np.maximum(np.log(totals) - math.log(size or 1.0), floor)
        log_likelihood = totals * log_mean - size * np.exp(log_mean) + _gene_constants(counts, sizes)
        rows.append((torch.from_numpy(log_mean), torch.from_numpy(log_likelihood)))
    log_mean, log_likelihood = (torch.stack(part) for part in zip(*rows, strict=True))
    return PointFit(data.values, log_mean, log_likelihood, _no_coefficients(data.n_genes))


def _gene_totals(counts: sp.csr_matrix) -> np.ndarray:
    """(genes,) float64 summed counts."""
    return np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()


def _gene_constants(counts: sp.csr_matrix, sizes: np.ndarray) -> np.ndarray:
    """(genes,) sum_i x_ij ln s_i - ln G(x_ij + 1), nats."""
    size = np.repeat(sizes, np.diff(counts.indptr))
    x = counts.data.astype(np.float64)
    return np.bincount(counts.indices, x * np.log(size) - gammaln(x + 1), minlength=counts.shape[1])


def _no_coefficients(n_genes: int) -> Tensor:
    return torch.zeros(0, n_genes, dtype=torch.float64)


# ---- gamma -------------------------------------------------------------------------------------------


def _fit_gamma(data: _LabelledCounts) -> GammaFit:
    rows = [_fit_label_gamma(*data.of(k), data.total_size) for k in range(data.n_labels)]
    log_mean, log_inv_disp, log_likelihood = (torch.stack(part) for part in zip(*rows, strict=True))
    return GammaFit(data.values, log_mean, log_inv_disp, log_likelihood, _no_coefficients(data.n_genes))


def _fit_label_gamma(
    counts: sp.csr_matrix, sizes: np.ndarray, total_size: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ln mu, ln r and log likelihood (genes,) of one label."""
    heard = np.flatnonzero(_gene_totals(counts))
    floor = lowest_log_mean(total_size)
    log_mean = torch.full((counts.shape[1],), floor, dtype=torch.float64)
    log_inv_disp = torch.full_like(log_mean, LOG_INV_DISP_RANGE[1])
    log_likelihood = torch.full_like(log_mean, -math.exp(floor) * sizes.sum())
    if heard.size:
        counts = counts[:, heard]
        basis, statistics = _label_statistics(counts, sizes)
        begin = moment_components(statistics, basis, total_size)
        newton = NewtonMStep(TOLERANCE, MAX_STEPS, LONGEST_STEP)
        starts = [
            begin._replace(log_inv_disp=torch.full_like(begin.log_mean, b)) for b in START_LOG_INV_DISPS
        ]
        fits = [newton(statistics, basis, start, total_size) for start in starts]
        value, best = torch.stack([fit.curvature.value[0] for fit in fits]).max(0)
        at = torch.arange(heard.size)
        log_mean[heard] = torch.stack([fit.components.log_mean[0] for fit in fits])[best, at]
        log_inv_disp[heard] = torch.stack([fit.components.log_inv_disp[0] for fit in fits])[best, at]
        log_likelihood[heard] = value + torch.from_numpy(_gene_constants(counts, sizes))
    return log_mean, log_inv_disp, log_likelihood


def _label_statistics(counts: sp.csr_matrix, sizes: np.ndarray) -> tuple[Basis, SufficientStatistics]:
    """Statistics of one component that owns all these cells, at nodes that leave no error behind."""
    basis = Basis(SizeFactorNodes.spanning(sizes, NODE_TOLERANCE), CountLevels.of(counts))
    weights = basis.nodes.weights(torch.from_numpy(sizes))  # (cells, nodes)
    codes, _ = basis.levels.code(counts, np.arange(counts.shape[0]))
    statistics = SufficientStatistics(
        rate=torch.from_numpy(counts.T @ weights.numpy())[:, None],
        pair=torch.from_numpy(np.bincount(codes, minlength=basis.levels.n_pairs).astype(np.float64))[:, None],
        node=weights.sum(0)[None],
        weight=torch.tensor([float(counts.shape[0])], dtype=torch.float64),
    )
    return basis, statistics


# ---- Newton on many problems ------------------------------------------------------------------------


class _Curve(NamedTuple):
    """Values (problems,), gradients (problems, d) and Hessians (problems, d, d), in nats."""

    value: Tensor
    gradient: Tensor
    hessian: Tensor

    def where(self, mask: Tensor, other: _Curve) -> _Curve:
        return _Curve(
            torch.where(mask, self.value, other.value),
            torch.where(mask[:, None], self.gradient, other.gradient),
            torch.where(mask[:, None, None], self.hessian, other.hessian),
        )


class _Problem(Protocol):
    """Functions of d numbers each, one for every gene."""

    def curve(self, at: Tensor) -> _Curve:
        """At (problems, d)."""
        ...

    def subset(self, keep: Tensor) -> _Problem:
        """Those where the mask ``keep`` (problems,) holds."""
        ...


def _climb(problem: _Problem, start: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Raise every problem's value from ``start`` (problems, d) within bounds; returns the ends and values.

    Newton with the absolute values of the Hessian's eigenvalues, so that all steps lead uphill; one that
    lowers the value is taken back and shortened.
    """
    best = torch.maximum(torch.minimum(start, high), low)
    values = torch.empty(len(start), dtype=torch.float64)
    left, at = torch.arange(len(start)), best.clone()
    now, part = problem.curve(at), torch.ones(len(start), 1, dtype=torch.float64)
    for _ in range(MAX_STEPS):
        step, gain = _newton_step(now, at, low, high)
        going = gain > CLIMB_TOLERANCE
        if not going.all():
            best[left], values[left] = at, now.value
            if not going.any():
                return best, values
            left, at, part, step, low, high = (t[going] for t in (left, at, part, step, low, high))
            problem, now = problem.subset(going), _Curve(*(t[going] for t in now))
        there = torch.maximum(torch.minimum(at + part * step, high), low)
        then = problem.curve(there)
        better = then.value >= now.value
        part = torch.where(better[:, None], (4 * part).clamp(max=1), part / 4)
        at, now = torch.where(better[:, None], there, at), then.where(better, now)
    best[left], values[left] = at, now.value
    return best, values


def _newton_step(now: _Curve, at: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Uphill steps (problems, d), and the rise (problems,) that the quadratic promises."""
    pinned = ((at <= low) & (now.gradient <= 0)) | ((at >= high) & (now.gradient >= 0))
    gradient = torch.where(pinned, 0.0, now.gradient)
    hessian = torch.where(pinned[:, :, None] | pinned[:, None, :], 0.0, -now.hessian)
    bend, axes = torch.linalg.eigh(hessian + torch.diag_embed(pinned.double()))
    bend = bend.abs()
    bend = bend + 1e-12 * bend.amax(1, keepdim=True) + 1e-14
    along = torch.einsum("pij,pi->pj", axes, gradient)
    step = torch.einsum("pij,pj->pi", axes, along / bend)
    gain = (gradient * step).sum(1) / 2
    step = step * (LONGEST_STEP / step.abs().amax(1, keepdim=True)).clamp(max=1)
    # where the value nears an asymptote as e^-|x| Newton goes by 1 for ever
    tail = (hessian.diagonal(dim1=1, dim2=2) / gradient.abs() - 1).abs() < 0.05
    return torch.where(tail, torch.where(gradient > 0, high, low) - at, step), gain


# ---- point gamma -------------------------------------------------------------------------------------


@dataclass
class _ZeroInflated:
    """Log likelihoods of zero-inflated genes, as functions of m, b = ln r and l = logit pi.

    m = ln((1 - pi) mu) belongs to the mean of all cells, which the counts pin down whatever pi is. With
    g(s) = r ln(1 + s rho) a zero adds ln(pi + (1 - pi) e^-g), a positive count ln(1 - pi) and its negative
    binomial. Unlike g the former has branch points near the real axis of ln s, where g = -l + i 3.14: it is
    summed at nodes of its own.

    Attributes:
        positive: the negative binomial part of the positive counts.
        n_positive: (problems,) cells with a positive count.
        log_nodes: (nodes,) ln s.
        zeros: (nodes, problems) weight of the cells without a count.
    """

    positive: ExpectedLogLikelihood
    n_positive: Tensor
    log_nodes: Tensor
    zeros: Tensor

    def subset(self, keep: Tensor) -> _ZeroInflated:
        return _ZeroInflated(
            self.positive.subset(keep), self.n_positive[keep], self.log_nodes, self.zeros[:, keep]
        )

    def curve(self, at: Tensor) -> _Curve:
        """At (problems, 3) m, b, l."""
        m, b, logit = at.T
        a = m + softplus(logit)
        zero, r = torch.sigmoid(logit), torch.exp(b)
        t = self.log_nodes[:, None] + (a - b)  # (nodes, problems)
        share = torch.sigmoid(t)
        g, g_a = r * softplus(t, threshold=WIDEST_SOFTPLUS), r * share
        g_aa = g_a * (1 - share)
        g_b = g - g_a
        inflated = torch.sigmoid(logit + g)  # that a zero is the point mass's
        ours = self.zeros * (1 - inflated)
        mixed = ours * inflated
        seen = self.positive.curvature(a, b)
        n_cells = self.n_positive + self.zeros.sum(0)
        value = seen.value - softplus(logit) * n_cells + (self.zeros * (softplus(logit + g) - g)).sum(0)
        grad_a, grad_b = seen.grad_a - (ours * g_a).sum(0), seen.grad_b - (ours * g_b).sum(0)
        grad_l = (self.zeros * inflated).sum(0) - zero * n_cells
        aa = seen.hess_aa + (mixed * g_a**2 - ours * g_aa).sum(0)
        ab = seen.hess_ab + (mixed * g_a * g_b - ours * (g_a - g_aa)).sum(0)
        bb = seen.hess_bb + (mixed * g_b**2 - ours * (g_b - g_a + g_aa)).sum(0)
        al, bl = (mixed * g_a).sum(0), (mixed * g_b).sum(0)
        ll = mixed.sum(0) - zero * (1 - zero) * n_cells
        # from a to m, of which da / dl = pi
        ll = ll + zero * (2 * al + zero * aa + (1 - zero) * grad_a)
        al, bl, grad_l = al + zero * aa, bl + zero * ab, grad_l + zero * grad_a
        rows = [torch.stack(row, dim=1) for row in ((aa, ab, al), (ab, bb, bl), (al, bl, ll))]
        return _Curve(value, torch.stack([grad_a, grad_b, grad_l], dim=1), torch.stack(rows, dim=1))


def _fit_point_gamma(data: _LabelledCounts) -> PointGammaFit:
    fits = [_fit_label_point_gamma(*data.of(k), data.total_size) for k in range(data.n_labels)]
    log_mean, log_inv_disp, logit_zero, log_likelihood = map(torch.stack, zip(*fits, strict=True))
    nothing = _no_coefficients(data.n_genes)
    return PointGammaFit(data.values, log_mean, log_inv_disp, logit_zero, log_likelihood, nothing)


def _fit_label_point_gamma(
    counts: sp.csr_matrix, sizes: np.ndarray, total_size: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ln mu, ln r, logit pi and log likelihood (genes,) of one label."""
    log_mean, log_inv_disp, log_likelihood = _fit_label_gamma(counts, sizes, total_size)
    logit_zero = torch.full_like(log_mean, -math.inf)
    n_positive = np.bincount(counts.indices, minlength=counts.shape[1])
    mixed = np.flatnonzero((n_positive > 0) & (n_positive < np.count_nonzero(sizes)))
    if mixed.size:
        counts = counts[:, mixed]
        problem = _zero_inflated(counts, sizes)
        constants = torch.from_numpy(_gene_constants(counts, sizes))
        least = math.log(FEWEST_ZEROS / sizes.size)
        limits = torch.tensor([(lowest_log_mean(total_size), 50.0), LOG_INV_DISP_RANGE, (least, -least)])
        low, high = limits.double().T[:, None].expand(2, mixed.size, 3)
        for start in _point_gamma_starts(counts, sizes, log_mean[mixed], log_inv_disp[mixed]):
            at, value = _climb(problem, start, low, high)
            better = value + constants > log_likelihood[mixed] + LEAST_GAIN
            chosen = torch.from_numpy(mixed)[better]
            m, log_inv_disp[chosen], logit_zero[chosen] = at[better].T
            log_mean[chosen] = m + softplus(logit_zero[chosen])
            log_likelihood[chosen] = (value + constants)[better]
    return log_mean, log_inv_disp, logit_zero, log_likelihood


def _zero_inflated(counts: sp.csr_matrix, sizes: np.ndarray) -> _ZeroInflated:
    """The zero-inflated log likelihoods of one label's cells, a problem for each gene."""
    basis, statistics = _label_statistics(counts, sizes)
    seen = counts.astype(bool).astype(np.float64)
    positive = ExpectedLogLikelihood.of(statistics, basis)
    weights = basis.nodes.weights(torch.from_numpy(sizes)).numpy()
    positive.node = torch.from_numpy(np.ascontiguousarray((seen.T @ weights).T))
    log_nodes, spread = _zero_nodes(sizes)
    zeros = np.asarray(spread.sum(axis=0)).reshape(-1, 1) - (spread.T @ seen).toarray()
    return _ZeroInflated(
        positive,
        torch.from_numpy(_gene_totals(seen)),
        torch.from_numpy(log_nodes),
        torch.from_numpy(zeros),
    )


def _zero_nodes(sizes: np.ndarray) -> tuple[np.ndarray, sp.csr_matrix]:
    """ln S of the nodes at which zeros are summed, and interpolation weights (cells, nodes).

    The size factors themselves where these are few, else Chebyshev nodes on short pieces of the axis of ln s.
    """
    filled = np.flatnonzero(sizes)
    log_s = np.log(sizes[filled])
    distinct, place = np.unique(log_s, return_inverse=True)
    piece = np.floor((log_s - log_s.min()) / SEGMENT).astype(np.int64)
    pieces, which = np.unique(piece, return_inverse=True)
    if distinct.size <= pieces.size * NODES_A_SEGMENT:
        weights = sp.csr_matrix((np.ones(filled.size), (filled, place)), shape=(sizes.size, distinct.size))
        return distinct, weights
    step = np.arange(NODES_A_SEGMENT)
    angle = (2 * step + 1) * (math.pi / (2 * NODES_A_SEGMENT))
    centres = log_s.min() + (pieces + 0.5) * SEGMENT
    log_nodes = centres[:, None] + np.cos(angle) * SEGMENT / 2  # (pieces, nodes)
    own = SizeFactorNodes(
        torch.from_numpy(np.cos(angle) * SEGMENT / 2),
        torch.from_numpy((1.0 - 2.0 * (step % 2)) * np.sin(angle)),
    )
    weights = own.weights(torch.from_numpy(np.exp(log_s - centres[which]))).numpy()
    columns = which[:, None] * NODES_A_SEGMENT + step
    rows = np.repeat(filled, NODES_A_SEGMENT)
    shape = (sizes.size, log_nodes.size)
    return log_nodes.ravel(), sp.csr_matrix((weights.ravel(), (rows, columns.ravel())), shape=shape)


def _point_gamma_starts(
    counts: sp.csr_matrix, sizes: np.ndarray, log_mean: Tensor, log_inv_disp: Tensor
) -> list[Tensor]:
    """Where to begin (genes, 3): the gamma fit a little inflated; a narrow Gamma, and the zeros it leaves."""
    average = torch.from_numpy(np.log(_gene_totals(counts) / sizes.sum()))
    little = torch.full_like(log_mean, LITTLE_LOGIT_ZERO)
    steep = torch.full_like(log_mean, INFLATED_LOG_INV_DISP)
    starts = (log_mean, log_inv_disp, little), (average, steep, _zeros_left_by_poisson(counts, sizes))
    return [torch.stack(start, 1) for start in starts]


def _zeros_left_by_poisson(counts: sp.csr_matrix, sizes: np.ndarray) -> Tensor:
    """(genes,) logit of the share of zeros beyond those of a Poisson with the mean of the positive counts.

    Its rate solves lambda / (1 - e^-lambda) = mean of the positive counts.
    """
    n_positive = torch.from_numpy(np.bincount(counts.indices, minlength=counts.shape[1])).double()
    n_cells = max(float(np.count_nonzero(sizes)), 1.0)
    mean = torch.from_numpy(_gene_totals(counts)) / n_positive.clamp(min=1)
    rate = mean
    for _ in range(30):
        rate = mean * -torch.expm1(-rate)
    rate = rate.clamp(min=0.05)
    kept = (n_positive / n_cells / -torch.expm1(-rate)).clamp(0.01, 0.98)
    return torch.logit(1 - kept)


# ---- covariates --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Design:
    """Covariates z (cells, covariates) with mean 0 and variance 1, and those they had before."""

    z: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def checked(cls, design: Any, data: _LabelledCounts) -> _Design:
        try:
            z = np.asarray(design, dtype=np.float64)
        except (TypeError, ValueError):
            raise InputError(
                "design holds something else than numbers; encode categories as 0 and 1"
            ) from None
        if z.ndim != 2 or z.shape[0] != data.n_cells or z.shape[1] == 0:
            raise InputError(f"design has shape {z.shape}; it must be ({data.n_cells} cells, covariates)")
        if not np.isfinite(z).all():
            raise InputError("design holds NaN or infinite values; leave out those cells or covariates")
        mean, spread = z.mean(axis=0), z.std(axis=0)
        if (spread > 0).all():
            z = (z - mean) / spread
            means = [z[data.codes == k].mean(axis=0) for k in np.unique(data.codes)]
            within = z - np.stack(means)[np.unique(data.codes, return_inverse=True)[1]]
            if np.linalg.matrix_rank(within, tol=COLLINEAR * math.sqrt(len(z))) == z.shape[1]:
                return cls(*(torch.from_numpy(t) for t in (z, mean, spread)))
        raise InputError(
            "design: a covariate follows from the others and the labels, which are the intercepts; drop it"
        )

    @property
    def limits(self) -> Tensor:
        """(covariates,) largest coefficient."""
        return LARGEST_LOG_RATIO / self.z.abs().amax(0)

    def original(self, log_mean: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """log_mean (labels, genes) and coefficients (genes, covariates) in the units of the design given."""
        coefficients = (coefficients / self.spread).T
        return log_mean - self.mean @ coefficients, coefficients


@dataclass
class _PoissonProfile:
    """Log likelihood of Poisson genes in their coefficients c, the means eliminated; concave.

    sum_i x_i z_i . c - sum_k X_k ln sum_{i in k} s_i exp(z_i . c), X_k the label's counts.

    Attributes:
        z: (cells, covariates).
        sums: (labels, (1 + covariates)^2, cells) s_i (1, z_i) (1, z_i)', 0 for cells of other labels.
        totals: (labels, problems) X.
        weighted: (labels, problems, covariates) sum_i x_i z_i.
    """

    z: Tensor
    sums: Tensor
    totals: Tensor
    weighted: Tensor

    def subset(self, keep: Tensor) -> _PoissonProfile:
        return replace(self, totals=self.totals[:, keep], weighted=self.weighted[:, keep])

    def sizes(self, at: Tensor) -> Tensor:
        """(labels, problems, 1 + covariates, 1 + covariates) sums of s exp(z . c) (1, z) (1, z)'."""
        grown = torch.exp(self.z @ at.T)  # (cells, problems)
        width = 1 + self.z.shape[1]
        summed = (self.sums.flatten(0, 1) @ grown).view(-1, width * width, len(at))
        return summed.transpose(1, 2).unflatten(2, (width, width))

    def curve(self, at: Tensor) -> _Curve:
        sizes = self.sizes(at)
        size = sizes[..., 0, 0].clamp(min=TINY)
        mean = sizes[..., 0, 1:] / size[..., None]  # (labels, problems, covariates)
        second = sizes[..., 1:, 1:] / size[..., None, None]
        covariance = second - mean[..., :, None] * mean[..., None, :]
        value = (self.weighted.sum(0) * at).sum(1) - (self.totals * torch.log(size)).sum(0)
        gradient = (self.weighted - self.totals[..., None] * mean).sum(0)
        return _Curve(value, gradient, -(self.totals[..., None, None] * covariance).sum(0))


def _fit_point_with(design: _Design, data: _LabelledCounts) -> PointFit:
    blocks = [_fit_point_block(design, data, genes) for genes in _gene_blocks(data)]
    log_mean, log_likelihood, coefficients = (torch.cat(part, dim=1) for part in zip(*blocks, strict=True))
    log_mean, coefficients = design.original(log_mean, coefficients.T)
    return PointFit(data.values, log_mean, log_likelihood, coefficients)


def _gene_blocks(data: _LabelledCounts) -> list[np.ndarray]:
    """Genes, as many at a time as may be dense."""
    width = max(1, DENSE_AT_ONCE // data.n_cells)
    return np.split(np.arange(data.n_genes), np.arange(width, data.n_genes, width))


def _fit_point_block(
    design: _Design, data: _LabelledCounts, genes: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """log_mean, log_likelihood (labels, genes) and coefficients (covariates, genes), z standardised."""
    counts = data.counts[:, genes]
    z = design.z
    member = _membership(data)
    ones = torch.cat([torch.ones(len(z), 1, dtype=torch.float64), z], dim=1)
    squares = (ones[:, :, None] * ones[:, None]).flatten(1).T * torch.from_numpy(data.sizes)
    by_label = [counts[data.codes == k] for k in range(data.n_labels)]
    weighted = [x.T @ z[data.codes == k].numpy() for k, x in enumerate(by_label)]
    totals = torch.from_numpy(np.stack([_gene_totals(x) for x in by_label]))
    problem = _PoissonProfile(z, member[:, None] * squares, totals, torch.from_numpy(np.stack(weighted)))
    high = design.limits.expand(genes.size, -1)
    at, _ = _climb(problem, torch.zeros_like(high), -high, high)
    size = problem.sizes(at)[..., 0, 0]
    log_mean = torch.where(totals > 0, torch.log(totals) - torch.log(size), _silent_log_mean(data, size))
    log_likelihood = totals * log_mean + (problem.weighted * at).sum(2) - size * torch.exp(log_mean)
    return log_mean, log_likelihood + _label_constants(data, genes), at.T


def _silent_log_mean(data: _LabelledCounts, size: Tensor) -> Tensor:
    """(labels, genes) ln mu at the floor in a label's cells on average; ``size`` is sum s exp(z . c)."""
    plain = (_membership(data) @ torch.from_numpy(data.sizes))[:, None]
    return lowest_log_mean(data.total_size) + torch.where(plain > 0, torch.log(plain / size), 0.0)


def _membership(data: _LabelledCounts) -> Tensor:
    """(labels, cells) 1 for the cells of a label."""
    return torch.from_numpy((data.codes == np.arange(data.n_labels)[:, None]).astype(np.float64))


def _label_constants(data: _LabelledCounts, genes: np.ndarray) -> Tensor:
    """(labels, genes) sum_i x_ij ln s_i - ln G(x_ij + 1), nats."""
    parts = [(data.codes == k) for k in range(data.n_labels)]
    rows = [_gene_constants(data.counts[part][:, genes], data.sizes[part]) for part in parts]
    return torch.from_numpy(np.stack(rows))


class _CellTerms(NamedTuple):
    """A term of the log likelihood for every cell and problem, and its derivatives.

    Attributes:
        value: (cells, problems) nats.
        first: (cells, problems) each, in ln of the cell's mean per unit of size factor, in b, ...
        second: likewise, by the two numbers, the smaller first.
    """

    value: Tensor
    first: tuple[Tensor, ...]
    second: dict[tuple[int, int], Tensor]


@dataclass
class _NegativeBinomialDesign:
    """Log likelihood of negative binomial genes in their coefficients and each label's a = ln mu, b = ln r.

    Attributes:
        z: (cells, covariates).
        log_size: (cells,) ln s.
        codes: (cells,) int64 labels.
        member: (labels, cells) 0 and 1.
        x: (cells, problems).
        rising: of all labels and problems, what depends on r alone: sum_i D(x_i, r).
    """

    z: Tensor
    log_size: Tensor
    codes: Tensor
    member: Tensor
    x: Tensor
    rising: ExpectedLogLikelihood

    def subset(self, keep: Tensor) -> _NegativeBinomialDesign:
        n_labels = len(self.member)
        return replace(self, x=self.x[:, keep], rising=self.rising.subset(keep.repeat(n_labels)))

    @property
    def silent(self) -> Tensor:
        """(labels, problems) whether no cell of the label has a count."""
        return self.member @ self.x == 0

    def cells(self, at: Tensor) -> _CellTerms:
        """At (problems, covariates + labels + labels) c, a, b; without what depends on r alone."""
        c, a, b = self.numbers(at)
        eta = self.z @ c + a[self.codes]
        r = torch.exp(b)[self.codes]
        t = self.log_size[:, None] + eta - b[self.codes]
        grown, share = softplus(t, threshold=WIDEST_SOFTPLUS), torch.sigmoid(t)
        both = (self.x + r) * share
        bent = both * (1 - share)
        return _CellTerms(
            self.x * eta - (self.x + r) * grown,
            (self.x - both, both - r * grown),
            {(0, 0): -bent, (0, 1): bent - r * share, (1, 1): 2 * r * share - r * grown - bent},
        )

    def numbers(self, at: Tensor) -> tuple[Tensor, ...]:
        """c (covariates, problems), then a, b and whatever follows (labels, problems)."""
        n_labels = len(self.member)
        further = (at.shape[1] - self.z.shape[1]) // n_labels
        return at.T.split([self.z.shape[1]] + further * [n_labels])

    def by_label(self, at: Tensor) -> Tensor:
        """(labels, problems) values at (problems, covariates + 2 labels)."""
        _, a, b = self.numbers(at)
        return self.member @ self.cells(at).value + self.rising.value(a.flatten(), b.flatten()).view_as(b)

    def curve(self, at: Tensor) -> _Curve:
        return self.summed(self.cells(at), at)

    def summed(self, cells: _CellTerms, at: Tensor) -> _Curve:
        """Sums of the cells' terms in the coefficients and in every label's numbers, and of the rest."""
        n_labels, n_covariates = len(self.member), self.z.shape[1]
        _, a, b, *_ = self.numbers(at)
        rising = self.rising.curvature(a.flatten(), b.flatten())
        value = cells.value.sum(0) + rising.value.view_as(b).sum(0)
        by_label = torch.stack([self.member @ part for part in cells.first])  # (numbers, labels, problems)
        by_label[1] += rising.grad_b.view_as(b)
        gradient = torch.cat([self.z.T @ cells.first[0], by_label.flatten(0, 1)])  # (d, problems)
        squares = (self.z[:, :, None] * self.z[:, None]).flatten(1)
        hessian = torch.zeros(len(at), *(2 * [len(gradient)]), dtype=torch.float64)
        hessian[:, :n_covariates, :n_covariates] = (squares.T @ cells.second[0, 0]).T.unflatten(
            1, 2 * [n_covariates]
        )
        for (p, q), bend in cells.second.items():
            own = self.member @ bend
            if p == q == 1:
                own += rising.hess_bb.view_as(b)
            of_p, of_q = (torch.arange(n_labels) + n_covariates + n_labels * which for which in (p, q))
            hessian[:, of_p, of_q] = hessian[:, of_q, of_p] = own.T
            if p == 0:
                for c in range(n_covariates):
                    hessian[:, c, of_q] = hessian[:, of_q, c] = ((self.member * self.z[:, c]) @ bend).T
        return _Curve(value, gradient.T, hessian)


def _fit_gamma_with(design: _Design, data: _LabelledCounts) -> GammaFit:
    plain = _fit_gamma(data)
    blocks = [_fit_gamma_block(design, data, genes, plain.log_inv_disp) for genes in _gene_blocks(data)]
    parts = (torch.cat(part, dim=1) for part in zip(*blocks, strict=True))
    log_mean, log_inv_disp, log_likelihood, coefficients = parts
    log_mean, coefficients = design.original(log_mean, coefficients.T)
    return GammaFit(data.values, log_mean, log_inv_disp, log_likelihood, coefficients)


def _fit_gamma_block(
    design: _Design, data: _LabelledCounts, genes: np.ndarray, plain: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``_fit_point_block``, with log_inv_disp, which begins at ``plain`` (labels, all genes)."""
    log_mean, _, coefficients = _fit_point_block(design, data, genes)
    problem = _negative_binomials(design, data, genes)
    begin = torch.cat([coefficients, log_mean, plain[:, genes].clamp(*START_WITH_DESIGN)]).T
    end, _ = _climb(problem, begin, *_gamma_bounds(design, problem))
    coefficients, log_mean, log_inv_disp = problem.numbers(end)
    log_likelihood = problem.by_label(end) + _label_constants(data, genes)
    log_mean, log_likelihood = _silent_at_the_floor(data, problem, coefficients, log_mean, log_likelihood)
    return log_mean, log_inv_disp, log_likelihood, coefficients


def _negative_binomials(design: _Design, data: _LabelledCounts, genes: np.ndarray) -> _NegativeBinomialDesign:
    counts = data.counts[:, genes]
    with np.errstate(divide="ignore"):
        log_size = torch.from_numpy(np.log(data.sizes))  # empty cells: their share of every sum is 0
    return _NegativeBinomialDesign(
        design.z,
        log_size,
        torch.from_numpy(data.codes),
        _membership(data),
        torch.from_numpy(counts.toarray().astype(np.float64)),
        _rising_part(counts, data),
    )


def _gamma_bounds(design: _Design, problem: _NegativeBinomialDesign) -> tuple[Tensor, Tensor]:
    """Of c, a and b (problems, covariates + 2 labels); silent labels have no part in the coefficients."""
    silent = problem.silent
    limit = design.limits[:, None].expand(-1, silent.shape[1])
    mean = torch.full(silent.shape, NO_MEAN, dtype=torch.float64)
    low_b, high_b = (torch.full_like(mean, bound) for bound in LOG_INV_DISP_RANGE)
    low = torch.cat([-limit, mean, torch.where(silent, high_b, low_b)]).T
    return low, torch.cat([limit, torch.where(silent, mean, -mean), high_b]).T


def _silent_at_the_floor(
    data: _LabelledCounts,
    problem: _NegativeBinomialDesign,
    coefficients: Tensor,
    log_mean: Tensor,
    log_likelihood: Tensor,
) -> tuple[Tensor, Tensor]:
    """log_mean and log_likelihood (labels, problems) with the floor where a gene is silent in a label."""
    grown = torch.from_numpy(data.sizes)[:, None] * torch.exp(problem.z @ coefficients)
    size = problem.member @ grown
    log_mean = torch.where(problem.silent, _silent_log_mean(data, size), log_mean)
    return log_mean, torch.where(problem.silent, -size * torch.exp(log_mean), log_likelihood)


@dataclass
class _ZeroInflatedDesign:
    """Log likelihood of zero-inflated genes in their coefficients and each label's m, b = ln r, l = logit pi.

    m = ln((1 - pi) mu), as in ``_ZeroInflated``.

    Attributes:
        gamma: the negative binomials.
        empty: (cells, problems) whether the count is 0.
    """

    gamma: _NegativeBinomialDesign
    empty: Tensor

    def subset(self, keep: Tensor) -> _ZeroInflatedDesign:
        return _ZeroInflatedDesign(self.gamma.subset(keep), self.empty[:, keep])

    def of_gamma(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Where the negative binomials are (problems, covariates + 2 labels), and l (labels, problems)."""
        c, m, b, logit = self.gamma.numbers(at)
        return torch.cat([c, m + softplus(logit), b]).T, logit

    def by_label(self, at: Tensor) -> Tensor:
        """(labels, problems) values at (problems, covariates + 3 labels); l may be -inf."""
        place, by_label = self.of_gamma(at)
        logit = by_label[self.gamma.codes]
        return self.gamma.by_label(place) + self.gamma.member @ self._inflation(
            self.gamma.cells(place).value, logit
        )

    def _inflation(self, gamma: Tensor, logit: Tensor) -> Tensor:
        """(cells, problems) what pi adds to the values ``gamma``, which are -g at zeros."""
        return torch.where(self.empty, softplus(logit - gamma), 0.0) - softplus(logit)

    def curve(self, at: Tensor) -> _Curve:
        place, by_label = self.of_gamma(at)
        gamma, logit = self.gamma.cells(place), by_label[self.gamma.codes]
        zero = torch.sigmoid(logit)
        # that a zero is the point mass's
        inflated = torch.where(self.empty, torch.sigmoid(logit - gamma.value), 0.0)
        ours, mixed = 1 - inflated, inflated * (1 - inflated)
        a, b = gamma.first
        aa, ab, bb = (
            ours * bend + mixed * gamma.first[p] * gamma.first[q] for (p, q), bend in gamma.second.items()
        )
        al, bl, ll = -mixed * a, -mixed * b, mixed - zero * (1 - zero)
        a, b = ours * a, ours * b
        # from a to m, of which da / dl = pi
        ll = ll + zero * (2 * al + zero * aa + (1 - zero) * a)
        al, bl = al + zero * aa, bl + zero * ab
        terms = _CellTerms(
            gamma.value + self._inflation(gamma.value, logit),
            (a, b, inflated - zero + zero * a),
            {(0, 0): aa, (0, 1): ab, (1, 1): bb, (0, 2): al, (1, 2): bl, (2, 2): ll},
        )
        return self.gamma.summed(terms, place)


def _fit_point_gamma_with(design: _Design, data: _LabelledCounts) -> PointGammaFit:
    plain = _fit_point_gamma(data)
    blocks = [_fit_point_gamma_block(design, data, genes, plain) for genes in _gene_blocks(data)]
    parts = (torch.cat(part, dim=1) for part in zip(*blocks, strict=True))
    log_mean, log_inv_disp, logit_zero, log_likelihood, coefficients = parts
    log_mean, coefficients = design.original(log_mean, coefficients.T)
    return PointGammaFit(data.values, log_mean, log_inv_disp, logit_zero, log_likelihood, coefficients)


def _fit_point_gamma_block(
    design: _Design, data: _LabelledCounts, genes: np.ndarray, plain: PointGammaFit
) -> tuple[Tensor, ...]:
    """As ``_fit_gamma_block``, with logit_zero third; ``plain`` is the fit without covariates."""
    log_mean, log_inv_disp, log_likelihood, coefficients = _fit_gamma_block(
        design, data, genes, plain.log_inv_disp
    )
    gamma = _negative_binomials(design, data, genes)
    problem = _ZeroInflatedDesign(gamma, gamma.x == 0)
    least = math.log(FEWEST_ZEROS / data.n_cells)
    lowest = torch.full_like(log_mean, least)
    low, high = _gamma_bounds(design, gamma)
    low = torch.cat([low, lowest.T], dim=1)
    high = torch.cat([high, torch.where(gamma.silent, lowest, -lowest).T], dim=1)
    best: tuple[Tensor, ...] = (
        log_mean,
        log_inv_disp,
        torch.full_like(log_mean, -math.inf),
        log_likelihood,
        coefficients,
    )
    begin = torch.cat([coefficients, torch.where(gamma.silent, NO_MEAN, log_mean), log_inv_disp])
    for start in _point_gamma_design_starts(data, genes, begin.T, plain):
        at, _ = _climb(problem, start, low, high)
        # a point mass at its bound holds next to no cell
        others, logit_zero = at.T.split([at.shape[1] - data.n_labels, data.n_labels])
        logit_zero = torch.where(logit_zero <= least, -math.inf, logit_zero)
        at = torch.cat([others, logit_zero]).T
        log_likelihood = problem.by_label(at) + _label_constants(data, genes)
        coefficients, log_mean, log_inv_disp = gamma.numbers(problem.of_gamma(at)[0])
        log_mean, log_likelihood = _silent_at_the_floor(data, gamma, coefficients, log_mean, log_likelihood)
        better = log_likelihood.sum(0) > best[3].sum(0) + LEAST_GAIN
        found = (log_mean, log_inv_disp, logit_zero, log_likelihood, coefficients)
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    return best


def _point_gamma_design_starts(
    data: _LabelledCounts, genes: np.ndarray, gamma: Tensor, plain: PointGammaFit
) -> list[Tensor]:
    """Where to begin (genes, covariates + 3 labels): from the gamma fit c, a, b (genes, ...), or with its c.

    The gamma fit a little inflated; the fit without covariates; narrow Gammas, and the zeros they leave.
    """
    coefficients, log_mean, _ = gamma.split(
        [gamma.shape[1] - 2 * data.n_labels, data.n_labels, data.n_labels], dim=1
    )
    little = torch.full_like(log_mean, LITTLE_LOGIT_ZERO)
    logit = plain.logit_zero[:, genes].T
    logit = torch.where(torch.isinf(logit), little, logit)
    mean = torch.where(log_mean == NO_MEAN, NO_MEAN, plain.log_mean[:, genes].T - softplus(logit))
    of_plain = torch.cat([coefficients, mean, plain.log_inv_disp[:, genes].T, logit], dim=1)
    labelled = [data.of(k) for k in range(data.n_labels)]
    much = torch.stack([_zeros_left_by_poisson(counts[:, genes], sizes) for counts, sizes in labelled], 1)
    steep = torch.full_like(log_mean, INFLATED_LOG_INV_DISP)
    narrow = torch.cat([coefficients, log_mean, steep, much], dim=1)
    return [torch.cat([gamma, little], dim=1), of_plain, narrow]


def _rising_part(counts: sp.csr_matrix, data: _LabelledCounts) -> ExpectedLogLikelihood:
    """sum_i D(x_ij, r) of all labels and genes, without any part of the mean."""
    levels = CountLevels.of(counts)
    codes, _ = levels.code(counts, np.arange(counts.shape[0]))
    at = codes * data.n_labels + np.repeat(data.codes, np.diff(counts.indptr))
    pair = np.bincount(at, minlength=levels.n_pairs * data.n_labels).reshape(-1, data.n_labels)
    nothing = torch.zeros(1, dtype=torch.float64)
    statistics = SufficientStatistics(
        nothing.expand(counts.shape[1], data.n_labels, 1),
        torch.from_numpy(pair.astype(np.float64)),
        nothing.expand(data.n_labels, 1),
        nothing.expand(data.n_labels),
    )
    return ExpectedLogLikelihood.of(statistics, Basis(SizeFactorNodes.spanning(np.ones(1)), levels))

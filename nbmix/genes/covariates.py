"""Fits in which covariates move the means of all labels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn.functional import softplus

from nbmix.core.batch import Basis
from nbmix.core.expected import ExpectedLogLikelihood
from nbmix.core.levels import CountLevels
from nbmix.core.nodes import WIDEST_SOFTPLUS, SizeFactorNodes
from nbmix.core.parameters import LOG_INV_DISP_RANGE, lowest_log_mean
from nbmix.core.statistics import SufficientStatistics
from nbmix.errors import InputError
from nbmix.genes.gamma import fit_gamma_labels
from nbmix.genes.labelled import (
    GammaFit,
    LabelledCounts,
    PointFit,
    PointGammaFit,
    gene_constants,
    gene_totals,
)
from nbmix.genes.newton import Curve, climb
from nbmix.genes.zero_inflated import (
    FEWEST_ZEROS,
    INFLATED_LOG_INV_DISP,
    LEAST_GAIN,
    LITTLE_LOGIT_ZERO,
    fit_point_gamma_labels,
    zeros_left_by_poisson,
)

START_WITH_DESIGN = (-3.0, 5.0)  # bounds of ln r

COLLINEAR = 1e-8  # of a covariate's variation, within labels and beside the others

LARGEST_LOG_RATIO = 30.0  # that one covariate may put between a cell and the mean of its values

NO_MEAN = -300.0  # ln mu of a label without a part in the likelihood

DENSE_AT_ONCE = 2**21  # counts

TINY = torch.finfo(torch.float64).tiny

# ---- covariates --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """Covariates z (cells, covariates) with mean 0 and variance 1, and those they had before."""

    z: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def checked(cls, design: Any, data: LabelledCounts) -> Design:
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

    def curve(self, at: Tensor) -> Curve:
        sizes = self.sizes(at)
        size = sizes[..., 0, 0].clamp(min=TINY)
        mean = sizes[..., 0, 1:] / size[..., None]  # (labels, problems, covariates)
        second = sizes[..., 1:, 1:] / size[..., None, None]
        covariance = second - mean[..., :, None] * mean[..., None, :]
        value = (self.weighted.sum(0) * at).sum(1) - (self.totals * torch.log(size)).sum(0)
        gradient = (self.weighted - self.totals[..., None] * mean).sum(0)
        return Curve(value, gradient, -(self.totals[..., None, None] * covariance).sum(0))


def fit_point_with(design: Design, data: LabelledCounts) -> PointFit:
    blocks = [_fit_point_block(design, data, genes) for genes in _gene_blocks(data)]
    log_mean, log_likelihood, coefficients = (torch.cat(part, dim=1) for part in zip(*blocks, strict=True))
    log_mean, coefficients = design.original(log_mean, coefficients.T)
    return PointFit(data.values, log_mean, log_likelihood, coefficients)


def _gene_blocks(data: LabelledCounts) -> list[np.ndarray]:
    """Genes, as many at a time as may be dense."""
    width = max(1, DENSE_AT_ONCE // data.n_cells)
    return np.split(np.arange(data.n_genes), np.arange(width, data.n_genes, width))


def _fit_point_block(
    design: Design, data: LabelledCounts, genes: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """log_mean, log_likelihood (labels, genes) and coefficients (covariates, genes), z standardised."""
    counts = data.counts[:, genes]
    z = design.z
    member = _membership(data)
    ones = torch.cat([torch.ones(len(z), 1, dtype=torch.float64), z], dim=1)
    squares = (ones[:, :, None] * ones[:, None]).flatten(1).T * torch.from_numpy(data.sizes)
    by_label = [counts[data.codes == k] for k in range(data.n_labels)]
    weighted = [x.T @ z[data.codes == k].numpy() for k, x in enumerate(by_label)]
    totals = torch.from_numpy(np.stack([gene_totals(x) for x in by_label]))
    problem = _PoissonProfile(z, member[:, None] * squares, totals, torch.from_numpy(np.stack(weighted)))
    high = design.limits.expand(genes.size, -1)
    at, _ = climb(problem, torch.zeros_like(high), -high, high)
    size = problem.sizes(at)[..., 0, 0]
    log_mean = torch.where(totals > 0, torch.log(totals) - torch.log(size), _silent_log_mean(data, size))
    log_likelihood = totals * log_mean + (problem.weighted * at).sum(2) - size * torch.exp(log_mean)
    return log_mean, log_likelihood + _label_constants(data, genes), at.T


def _silent_log_mean(data: LabelledCounts, size: Tensor) -> Tensor:
    """(labels, genes) ln mu at the floor in a label's cells on average; ``size`` is sum s exp(z . c)."""
    plain = (_membership(data) @ torch.from_numpy(data.sizes))[:, None]
    return lowest_log_mean(data.total_size) + torch.where(plain > 0, torch.log(plain / size), 0.0)


def _membership(data: LabelledCounts) -> Tensor:
    """(labels, cells) 1 for the cells of a label."""
    return torch.from_numpy((data.codes == np.arange(data.n_labels)[:, None]).astype(np.float64))


def _label_constants(data: LabelledCounts, genes: np.ndarray) -> Tensor:
    """(labels, genes) sum_i x_ij ln s_i - ln G(x_ij + 1), nats."""
    parts = [(data.codes == k) for k in range(data.n_labels)]
    rows = [gene_constants(data.counts[part][:, genes], data.sizes[part]) for part in parts]
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

    def curve(self, at: Tensor) -> Curve:
        return self.summed(self.cells(at), at)

    def summed(self, cells: _CellTerms, at: Tensor) -> Curve:
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
        return Curve(value, gradient.T, hessian)


def fit_gamma_with(design: Design, data: LabelledCounts) -> GammaFit:
    plain = fit_gamma_labels(data)
    blocks = [_fit_gamma_block(design, data, genes, plain.log_inv_disp) for genes in _gene_blocks(data)]
    parts = (torch.cat(part, dim=1) for part in zip(*blocks, strict=True))
    log_mean, log_inv_disp, log_likelihood, coefficients = parts
    log_mean, coefficients = design.original(log_mean, coefficients.T)
    return GammaFit(data.values, log_mean, log_inv_disp, log_likelihood, coefficients)


def _fit_gamma_block(
    design: Design, data: LabelledCounts, genes: np.ndarray, plain: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``_fit_point_block``, with log_inv_disp, which begins at ``plain`` (labels, all genes)."""
    log_mean, _, coefficients = _fit_point_block(design, data, genes)
    problem = _negative_binomials(design, data, genes)
    begin = torch.cat([coefficients, log_mean, plain[:, genes].clamp(*START_WITH_DESIGN)]).T
    end, _ = climb(problem, begin, *_gamma_bounds(design, problem))
    coefficients, log_mean, log_inv_disp = problem.numbers(end)
    log_likelihood = problem.by_label(end) + _label_constants(data, genes)
    log_mean, log_likelihood = _silent_at_the_floor(data, problem, coefficients, log_mean, log_likelihood)
    return log_mean, log_inv_disp, log_likelihood, coefficients


def _negative_binomials(design: Design, data: LabelledCounts, genes: np.ndarray) -> _NegativeBinomialDesign:
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


def _gamma_bounds(design: Design, problem: _NegativeBinomialDesign) -> tuple[Tensor, Tensor]:
    """Of c, a and b (problems, covariates + 2 labels); silent labels have no part in the coefficients."""
    silent = problem.silent
    limit = design.limits[:, None].expand(-1, silent.shape[1])
    mean = torch.full(silent.shape, NO_MEAN, dtype=torch.float64)
    low_b, high_b = (torch.full_like(mean, bound) for bound in LOG_INV_DISP_RANGE)
    low = torch.cat([-limit, mean, torch.where(silent, high_b, low_b)]).T
    return low, torch.cat([limit, torch.where(silent, mean, -mean), high_b]).T


def _silent_at_the_floor(
    data: LabelledCounts,
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

    m = ln((1 - pi) mu), as in ``ZeroInflated``.

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

    def curve(self, at: Tensor) -> Curve:
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


def fit_point_gamma_with(design: Design, data: LabelledCounts) -> PointGammaFit:
    plain = fit_point_gamma_labels(data)
    blocks = [_fit_point_gamma_block(design, data, genes, plain) for genes in _gene_blocks(data)]
    parts = (torch.cat(part, dim=1) for part in zip(*blocks, strict=True))
    log_mean, log_inv_disp, logit_zero, log_likelihood, coefficients = parts
    log_mean, coefficients = design.original(log_mean, coefficients.T)
    return PointGammaFit(data.values, log_mean, log_inv_disp, logit_zero, log_likelihood, coefficients)


def _fit_point_gamma_block(
    design: Design, data: LabelledCounts, genes: np.ndarray, plain: PointGammaFit
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
        at, _ = climb(problem, start, low, high)
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
    data: LabelledCounts, genes: np.ndarray, gamma: Tensor, plain: PointGammaFit
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
    much = torch.stack([zeros_left_by_poisson(counts[:, genes], sizes) for counts, sizes in labelled], 1)
    steep = torch.full_like(log_mean, INFLATED_LOG_INV_DISP)
    narrow = torch.cat([coefficients, log_mean, steep, much], dim=1)
    return [torch.cat([gamma, little], dim=1), of_plain, narrow]


def _rising_part(counts: sp.csr_matrix, data: LabelledCounts) -> ExpectedLogLikelihood:
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

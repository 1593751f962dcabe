"""Fits in which covariates move the means of all labels: a block of genes at a time, by Newton."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from nbmix.core.newton import climb
from nbmix.core.parameters import LOG_INV_DISP_RANGE, lowest_log_mean
from nbmix.genes.design import Design, membership
from nbmix.genes.design_problems import NegativeBinomialWithDesign, PoissonProfile, ZeroInflatedWithDesign
from nbmix.genes.gamma import FAR, fit_gamma_by_label
from nbmix.genes.labelled import (
    GammaFit,
    LabelledCounts,
    PointFit,
    PointGammaFit,
    gene_constants,
)
from nbmix.genes.zero_inflated import (
    FEWEST_ZEROS,
    INFLATED_LOG_INV_DISP,
    LEAST_GAIN,
    LITTLE_LOGIT_ZERO,
    fit_point_gamma_by_label,
    zeros_left_by_poisson,
)

START_WITH_DESIGN = (-3.0, 5.0)  # bounds of ln r

NO_MEAN = -300.0  # ln mu of a label without a part in the likelihood

DENSE_AT_ONCE = 2**21  # counts


def fit_point_with_design(design: Design, data: LabelledCounts) -> PointFit:
    """Poisson fits, the means eliminated."""
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
    problem = PoissonProfile.of(design, data, genes)
    totals = problem.totals
    high = design.limits.expand(genes.size, -1)
    at = climb(problem, torch.zeros_like(high), -high, high, FAR)
    size = problem.sizes(at)[..., 0, 0]
    log_mean = torch.where(totals > 0, torch.log(totals) - torch.log(size), _silent_log_mean(data, size))
    log_likelihood = totals * log_mean + (problem.weighted * at).sum(2) - size * torch.exp(log_mean)
    return log_mean, log_likelihood + _label_constants(data, genes), at.T


def _silent_log_mean(data: LabelledCounts, size: Tensor) -> Tensor:
    """(labels, genes) ln mu at the floor in a label's cells on average; ``size`` is sum s exp(z . c)."""
    plain = (membership(data) @ torch.from_numpy(data.sizes))[:, None]
    return lowest_log_mean(data.total_size) + torch.where(plain > 0, torch.log(plain / size), 0.0)


def _label_constants(data: LabelledCounts, genes: np.ndarray) -> Tensor:
    """(labels, genes) sum_i x_ij ln s_i - ln G(x_ij + 1), nats."""
    parts = [(data.codes == k) for k in range(data.n_labels)]
    rows = [gene_constants(data.counts[part][:, genes], data.sizes[part]) for part in parts]
    return torch.from_numpy(np.stack(rows))


def fit_gamma_with_design(design: Design, data: LabelledCounts) -> GammaFit:
    """Negative binomial fits, from the dispersions of the fit without covariates."""
    plain = fit_gamma_by_label(data)
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
    problem = NegativeBinomialWithDesign.of(design, data, genes)
    begin = torch.cat([coefficients, log_mean, plain[:, genes].clamp(*START_WITH_DESIGN)]).T
    end = climb(problem, begin, *_gamma_bounds(design, problem), FAR)
    coefficients, log_mean, log_inv_disp = problem.numbers(end)
    log_likelihood = problem.by_label(end) + _label_constants(data, genes)
    log_mean, log_likelihood = _silent_at_the_floor(data, problem, coefficients, log_mean, log_likelihood)
    return log_mean, log_inv_disp, log_likelihood, coefficients


def _gamma_bounds(design: Design, problem: NegativeBinomialWithDesign) -> tuple[Tensor, Tensor]:
    """Of c, a and b (problems, covariates + 2 labels); silent labels have no part in the coefficients."""
    silent = problem.silent
    limit = design.limits[:, None].expand(-1, silent.shape[1])
    mean = torch.full(silent.shape, NO_MEAN, dtype=torch.float64)
    low_b, high_b = (torch.full_like(mean, bound) for bound in LOG_INV_DISP_RANGE)
    low = torch.cat([-limit, mean, torch.where(silent, high_b, low_b)]).T
    return low, torch.cat([limit, torch.where(silent, mean, -mean), high_b]).T


def _silent_at_the_floor(
    data: LabelledCounts,
    problem: NegativeBinomialWithDesign,
    coefficients: Tensor,
    log_mean: Tensor,
    log_likelihood: Tensor,
) -> tuple[Tensor, Tensor]:
    """log_mean and log_likelihood (labels, problems) with the floor where a gene is silent in a label."""
    grown = torch.from_numpy(data.sizes)[:, None] * torch.exp(problem.z @ coefficients)
    size = problem.member @ grown
    log_mean = torch.where(problem.silent, _silent_log_mean(data, size), log_mean)
    return log_mean, torch.where(problem.silent, -size * torch.exp(log_mean), log_likelihood)


def fit_point_gamma_with_design(design: Design, data: LabelledCounts) -> PointGammaFit:
    """Zero-inflated fits: the best of a few starts, and the gamma fit where a point mass gains nothing."""
    plain = fit_point_gamma_by_label(data)
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
    problem = ZeroInflatedWithDesign.of(design, data, genes)
    gamma = problem.gamma
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
        at = climb(problem, start, low, high, FAR)
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

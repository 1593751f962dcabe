"""Poisson and negative binomial fits of every label and gene, and how far Newton goes in such fits."""

from __future__ import annotations

import math

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from nbmix.core.batch import Basis
from nbmix.core.levels import CountLevels
from nbmix.core.m_step import NewtonMStep, moment_components
from nbmix.core.newton import NewtonRule
from nbmix.core.nodes import SizeFactorNodes
from nbmix.core.parameters import LOG_INV_DISP_RANGE, lowest_log_mean
from nbmix.core.statistics import SufficientStatistics
from nbmix.genes.labelled import (
    GammaFit,
    LabelledCounts,
    PointFit,
    gene_constants,
    gene_totals,
    no_coefficients,
)

# Newton goes farther than in an M step, since values are reported, and curvatures in one number may be a
# millionth of those in others
FAR = NewtonRule(tolerance=1e-11, max_steps=200, delta=1e-12, to_bounds=True)

TOLERANCE = 1e-10  # nats that a step of the gamma fit without covariates must promise

# Newton is shifted and crawls on the plateau before the upper bound, where genes that are Poisson belong
START_LOG_INV_DISPS = (1.0, LOG_INV_DISP_RANGE[1])

NODE_TOLERANCE = 1e-13  # relative; values are reported, so finer than in the products


def fit_point_by_label(data: LabelledCounts) -> PointFit:
    """Poisson fits in closed form."""
    floor = lowest_log_mean(data.total_size)
    rows = []
    for k in range(data.n_labels):
        counts, sizes = data.of(k)
        totals, size = gene_totals(counts), sizes.sum()
        with np.errstate(divide="ignore"):
            log_mean = np.maximum(np.log(totals) - math.log(size or 1.0), floor)
        log_likelihood = totals * log_mean - size * np.exp(log_mean) + gene_constants(counts, sizes)
        rows.append((torch.from_numpy(log_mean), torch.from_numpy(log_likelihood)))
    log_mean, log_likelihood = (torch.stack(part) for part in zip(*rows, strict=True))
    return PointFit(data.values, log_mean, log_likelihood, no_coefficients(data.n_genes))


def fit_gamma_by_label(data: LabelledCounts) -> GammaFit:
    """Negative binomial fits, each label's by Newton on its sufficient statistics."""
    rows = [fit_gamma_of_cells(*data.of(k), data.total_size) for k in range(data.n_labels)]
    log_mean, log_inv_disp, log_likelihood = (torch.stack(part) for part in zip(*rows, strict=True))
    return GammaFit(data.values, log_mean, log_inv_disp, log_likelihood, no_coefficients(data.n_genes))


def fit_gamma_of_cells(
    counts: sp.csr_matrix, sizes: np.ndarray, total_size: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ln mu, ln r and log likelihood (genes,) of the cells of one label."""
    heard = np.flatnonzero(gene_totals(counts))
    floor = lowest_log_mean(total_size)
    log_mean = torch.full((counts.shape[1],), floor, dtype=torch.float64)
    log_inv_disp = torch.full_like(log_mean, LOG_INV_DISP_RANGE[1])
    log_likelihood = torch.full_like(log_mean, -math.exp(floor) * sizes.sum())
    if heard.size:
        counts = counts[:, heard]
        basis, statistics = statistics_of_cells(counts, sizes)
        begin = moment_components(statistics, basis, total_size)
        newton = NewtonMStep(TOLERANCE, FAR.max_steps)
        starts = [
            begin._replace(log_inv_disp=torch.full_like(begin.log_mean, b)) for b in START_LOG_INV_DISPS
        ]
        fits = [newton(statistics, basis, start, total_size) for start in starts]
        value, best = torch.stack([fit.curvature.value[0] for fit in fits]).max(0)
        at = torch.arange(heard.size)
        log_mean[heard] = torch.stack([fit.components.log_mean[0] for fit in fits])[best, at]
        log_inv_disp[heard] = torch.stack([fit.components.log_inv_disp[0] for fit in fits])[best, at]
        log_likelihood[heard] = value + torch.from_numpy(gene_constants(counts, sizes))
    return log_mean, log_inv_disp, log_likelihood


def statistics_of_cells(counts: sp.csr_matrix, sizes: np.ndarray) -> tuple[Basis, SufficientStatistics]:
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

"""Zero-inflated negative binomial fits of every label and gene."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn.functional import softplus

from nbmix.core.expected_log_likelihood import ExpectedLogLikelihood
from nbmix.core.newton import Curve, climb
from nbmix.core.nodes import WIDEST_SOFTPLUS, SizeFactorNodes
from nbmix.core.parameters import LOG_INV_DISP_RANGE, lowest_log_mean
from nbmix.genes.gamma import FAR, fit_gamma_of_cells, statistics_of_cells
from nbmix.genes.labelled import LabelledCounts, PointGammaFit, gene_constants, gene_totals, no_coefficients

SEGMENT, NODES_A_SEGMENT = 0.25, 16  # in ln s; error per zero below 1e-11 down to pi = 1e-4

INFLATED_LOG_INV_DISP, LITTLE_LOGIT_ZERO = 4.0, -3.0  # where point gamma fits begin

FEWEST_ZEROS = 1e-3  # cells; point masses that hold fewer gain less than 5e-7 nats

LEAST_GAIN = 1e-7  # nats, for a point mass to be reported


@dataclass
class ZeroInflated:
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

    def subset(self, keep: Tensor) -> ZeroInflated:
        return ZeroInflated(
            self.positive.subset(keep), self.n_positive[keep], self.log_nodes, self.zeros[:, keep]
        )

    @property
    def log_inv_disps(self) -> slice:
        return slice(1, 2)

    def curve(self, at: Tensor) -> Curve:
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
        return Curve(value, torch.stack([grad_a, grad_b, grad_l], dim=1), torch.stack(rows, dim=1))


def fit_point_gamma_by_label(data: LabelledCounts) -> PointGammaFit:
    """The best of a few starts, and the gamma fit where a point mass gains nothing."""
    fits = [_fit_point_gamma_of_cells(*data.of(k), data.total_size) for k in range(data.n_labels)]
    log_mean, log_inv_disp, logit_zero, log_likelihood = map(torch.stack, zip(*fits, strict=True))
    nothing = no_coefficients(data.n_genes)
    return PointGammaFit(data.values, log_mean, log_inv_disp, logit_zero, log_likelihood, nothing)


def _fit_point_gamma_of_cells(
    counts: sp.csr_matrix, sizes: np.ndarray, total_size: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ln mu, ln r, logit pi and log likelihood (genes,) of one label."""
    log_mean, log_inv_disp, log_likelihood = fit_gamma_of_cells(counts, sizes, total_size)
    logit_zero = torch.full_like(log_mean, -math.inf)
    n_positive = np.bincount(counts.indices, minlength=counts.shape[1])
    mixed = np.flatnonzero((n_positive > 0) & (n_positive < np.count_nonzero(sizes)))
    if mixed.size:
        counts = counts[:, mixed]
        problem = zero_inflated_genes(counts, sizes)
        constants = torch.from_numpy(gene_constants(counts, sizes))
        least = math.log(FEWEST_ZEROS / sizes.size)
        limits = torch.tensor([(lowest_log_mean(total_size), 50.0), LOG_INV_DISP_RANGE, (least, -least)])
        low, high = limits.double().T[:, None].expand(2, mixed.size, 3)
        for start in _point_gamma_starts(counts, sizes, log_mean[mixed], log_inv_disp[mixed]):
            at = climb(problem, start, low, high, FAR)
            value = problem.curve(at).value
            better = value + constants > log_likelihood[mixed] + LEAST_GAIN
            chosen = torch.from_numpy(mixed)[better]
            m, log_inv_disp[chosen], logit_zero[chosen] = at[better].T
            log_mean[chosen] = m + softplus(logit_zero[chosen])
            log_likelihood[chosen] = (value + constants)[better]
    return log_mean, log_inv_disp, logit_zero, log_likelihood


def zero_inflated_genes(counts: sp.csr_matrix, sizes: np.ndarray) -> ZeroInflated:
    """The zero-inflated log likelihoods of one label's cells, a problem for each gene."""
    basis, statistics = statistics_of_cells(counts, sizes)
    seen = counts.astype(bool).astype(np.float64)
    positive = ExpectedLogLikelihood.of(statistics, basis)
    weights = basis.nodes.weights(torch.from_numpy(sizes)).numpy()
    positive.node = torch.from_numpy(np.ascontiguousarray((seen.T @ weights).T))
    log_nodes, spread = zero_nodes(sizes)
    zeros = np.asarray(spread.sum(axis=0)).reshape(-1, 1) - (spread.T @ seen).toarray()
    return ZeroInflated(
        positive,
        torch.from_numpy(gene_totals(seen)),
        torch.from_numpy(log_nodes),
        torch.from_numpy(zeros),
    )


def zero_nodes(sizes: np.ndarray) -> tuple[np.ndarray, sp.csr_matrix]:
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
    average = torch.from_numpy(np.log(gene_totals(counts) / sizes.sum()))
    little = torch.full_like(log_mean, LITTLE_LOGIT_ZERO)
    steep = torch.full_like(log_mean, INFLATED_LOG_INV_DISP)
    starts = (log_mean, log_inv_disp, little), (average, steep, zeros_left_by_poisson(counts, sizes))
    return [torch.stack(start, 1) for start in starts]


def zeros_left_by_poisson(counts: sp.csr_matrix, sizes: np.ndarray) -> Tensor:
    """(genes,) logit of the share of zeros beyond those of a Poisson with the mean of the positive counts.

    Its rate solves lambda / (1 - e^-lambda) = mean of the positive counts.
    """
    n_positive = torch.from_numpy(np.bincount(counts.indices, minlength=counts.shape[1])).double()
    n_cells = max(float(np.count_nonzero(sizes)), 1.0)
    mean = torch.from_numpy(gene_totals(counts)) / n_positive.clamp(min=1)
    rate = mean
    for _ in range(30):
        rate = mean * -torch.expm1(-rate)
    rate = rate.clamp(min=0.05)
    kept = (n_positive / n_cells / -torch.expm1(-rate)).clamp(0.01, 0.98)
    return torch.logit(1 - kept)

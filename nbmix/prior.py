"""Empirical Bayes: how far components lie apart, learned gene by gene from the components themselves.

With the likelihood of a component's gene seen as a normal one, of curvature H around its maximum at distance
d from the pooled gene, the hierarchy d ~ N(x, 1 / H), x ~ N(0, tau^2) has the EM step

    w = tau^2 H / (1 + tau^2 H),    E[x^2] = (w d)^2 + tau^2 / (1 + tau^2 H),    tau^2 = mean_k E[x^2].

K numbers say little about a variance, so every gene's also sees the typical gene's as one more component.
Genes that differ nowhere end with a variance near zero and stop voting (Efron & Morris 1973; for counts,
Robinson & Smyth 2007).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbmix.components import (
    START_LOG_INV_DISP,
    Fit,
    GenePrior,
    NewtonMStep,
    moment_components,
)
from nbmix.products import Basis
from nbmix.statistics import SufficientStatistics

FIRST_VARIANCE = 0.05  # of ln mu between components: a typical fold change of a fifth
TYPICAL_GENE_WEIGHT = 1.0  # components' worth
ROUNDS = 10  # of EM on the variances, which cost nothing beside an M step
LEAST_INFORMATION = 1e-2  # of ln r in 1 / nats^2; below, a dispersion says nothing about the level of others


def first_prior(seen: SufficientStatistics, basis: Basis, total_size: float) -> GenePrior:
    """Around the pooled gene, before any component is known."""
    pooled = seen.pooled()
    fitted = NewtonMStep()(pooled, basis, moment_components(pooled, basis, total_size), total_size)
    centre = fitted.components.log_mean[0]
    one = torch.ones((), dtype=centre.dtype, device=centre.device)
    return GenePrior(centre, torch.full_like(centre, FIRST_VARIANCE), START_LOG_INV_DISP * one, one)


def update_prior(fit: Fit, prior: GenePrior) -> GenePrior:
    """The variances, and the level of ln r, from components (K, genes) that were fitted under ``prior``."""
    components, curve = fit
    # what the data alone say
    aa = -curve.hess_aa - 1 / prior.log_mean_variance
    ab = -curve.hess_ab
    bb = -curve.hess_bb - 1 / prior.log_inv_disp_variance
    tiny = torch.finfo(aa.dtype).eps
    # information on the one, with the other integrated out
    about_mean = (aa - ab**2 / (bb.clamp(min=0) + 1 / prior.log_inv_disp_variance)).clamp(min=tiny)
    about_disp = (bb - ab**2 / (aa.clamp(min=0) + 1 / prior.log_mean_variance)).clamp(min=tiny)
    off = components.log_mean - prior.log_mean
    variance = _mean_variance(off, about_mean, prior.log_mean_variance)
    level, spread = _disp_level(components.log_inv_disp, about_disp, prior)
    return GenePrior(prior.log_mean, variance, level, spread)


def _mean_variance(off: Tensor, information: Tensor, variance: Tensor) -> Tensor:
    """(genes,) tau^2 from shrunken offsets (K, genes)."""
    own = 1 / information  # variance
    off = off * (1 + own / variance)  # as they were before the prior shrank them
    n_components = off.shape[0]
    for _ in range(ROUNDS):
        weight = variance / (variance + own)
        square = (weight * off) ** 2 + weight * own
        typical = square.mean(0).log().mean().exp()
        variance = (square.sum(0) + TYPICAL_GENE_WEIGHT * typical) / (n_components + TYPICAL_GENE_WEIGHT)
    return variance


def _disp_level(log_inv_disp: Tensor, information: Tensor, prior: GenePrior) -> tuple[Tensor, Tensor]:
    """Level and variance of ln r, common to all genes and components that inform it."""
    level, variance = prior.log_inv_disp, prior.log_inv_disp_variance
    known = information > LEAST_INFORMATION
    if not known.any():
        return level, variance
    information, found = information[known], log_inv_disp[known]
    found = level + (found - level) * (1 + 1 / (variance * information))
    for _ in range(ROUNDS):
        weight = variance * information / (1 + variance * information)
        mean = level + weight * (found - level)
        level = mean.mean()
        variance = ((mean - level) ** 2 + variance / (1 + variance * information)).mean()
    return level, variance

"""Empirical Bayes: how far components lie apart, and how dispersed genes are, learned from the components.

With the likelihood of a component's gene seen as a normal one, of curvature H around its maximum at distance
d from the pooled gene, the hierarchy d ~ N(x, 1 / H), x ~ N(0, tau^2) has the EM step

    w = tau^2 H / (1 + tau^2 H),    E[x^2] = (w d)^2 + tau^2 / (1 + tau^2 H),    tau^2 = mean_k E[x^2].

K numbers say little about a variance, so every gene's also sees the typical gene's as one more component.
Genes that differ nowhere end with a variance near zero and stop voting (Efron & Morris 1973; for counts,
Robinson & Smyth 2007).

Dispersions have one floor more, since a gene is dispersed much alike in all components, and genes of like
means are (McCarthy, Chen & Smyth 2012):

    ln r_kj ~ N(b_j, sigma^2),    b_j ~ N(t_0 + t_1 m_j, omega^2).

What a likelihood of curvature H adds to the marginal one of b_j, with ln r_kj integrated out, has slope
z = (ln r_kj - b_j) / sigma^2 at the fitted ln r_kj, and information w = H / (1 + sigma^2 H). Neither divides
by H, which vanishes where a gene is nearly Poisson. b_j and the trend take Newton's step, variances Fisher's,
sum (z^2 - E z^2) / sum w^2. The trend sees b_j integrated out, too: with W = sum_k w its slope of a gene is
(sum_k z + W (b_j - t_0 - t_1 m_j)) / (1 + omega^2 W).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nbmix.core.batch import Basis
from nbmix.core.kernels.blocks import GENES_AT_ONCE
from nbmix.core.kernels.prior import N_DISPERSION_SUMS, dispersion_rows, expected_square_rows
from nbmix.core.kernels.threads import over_rows
from nbmix.core.m_step import FittedComponents, NewtonMStep, moment_components
from nbmix.core.parameters import LOG_INV_DISP_RANGE, START_LOG_INV_DISP, GenePrior
from nbmix.core.statistics import SufficientStatistics

FIRST_VARIANCE = 0.05  # of ln mu between components: a typical fold change of a fifth

TYPICAL_GENE_WEIGHT = 1.0  # components' worth

EXTRAPOLATIONS = 3  # of EM on tau^2, each from two of its steps

LARGEST_SHARE = 0.95  # of a step of EM that is left in the next, where extrapolation goes by it

ROUNDS = 5  # of steps on dispersions, which cost little beside an M step

LARGEST_FALL = 5.0  # of ln tau^2 in a call

LARGEST_STEP = 1.0  # up of ln tau^2, and of b_j and the trend, in a call

# sigma^2 and omega^2: with less of it components that are still alike, and so dispersed alike, as all cells
# together are, could not part; more of it would follow genes that say nothing
DISP_VARIANCES = (0.1, 4.0)

SLOPE_VARIANCE = 1.0  # of t_1 around 0: with few genes there is no trend


def first_prior(
    seen: SufficientStatistics, basis: Basis, total_size: float, variance: float = FIRST_VARIANCE
) -> GenePrior:
    """Around the pooled gene, before any component is known; ``variance`` is what tau^2 begins at."""
    pooled = seen.pooled()
    fitted = NewtonMStep()(pooled, basis, moment_components(pooled, basis, total_size), total_size)
    centre = fitted.components.log_mean[0]
    one = torch.ones((), dtype=centre.dtype, device=centre.device)
    trend = torch.stack([START_LOG_INV_DISP * one, 0 * one, one])
    return GenePrior(
        centre,
        torch.full_like(centre, variance),
        torch.full_like(centre, START_LOG_INV_DISP),
        one,
        trend,
    )


def of_more_genes(prior: GenePrior, log_mean: Tensor, positions: Tensor) -> GenePrior:
    """A prior of more genes, whose pooled ones are ``log_mean`` (all genes,); its own stand at ``positions``.

    A new gene is as ``of_typical_genes`` says.
    """
    more = of_typical_genes(prior, log_mean)
    for old, new in zip(prior[:3], more[:3], strict=True):
        new[positions] = old
    return more


def of_typical_genes(prior: GenePrior, log_mean: Tensor) -> GenePrior:
    """A prior of other genes, whose pooled ones are ``log_mean`` (other genes,).

    They vary as the typical one does, and are dispersed as the trend says.
    """
    typical = float(prior.log_mean_variance.log().mean().exp())
    line = _line(prior._replace(log_mean=log_mean))
    return GenePrior(log_mean.clone(), torch.full_like(log_mean, typical), line, *prior[3:])


def update_prior(fit: FittedComponents, prior: GenePrior, votes: Tensor | None = None) -> GenePrior:
    """Variances, common dispersions and their trend, from components (K, genes) fitted under ``prior``.

    ``votes`` (K,), at most 1, are what components count in the mean of E[x^2], by default 1 each; the typical
    gene gets what they leave.
    """
    components, curve = fit
    # what the data alone say
    aa = -curve.hess_aa - 1 / prior.log_mean_variance
    ab = -curve.hess_ab
    bb = -curve.hess_bb - 1 / prior.log_inv_disp_variance
    # information on the one, with the other integrated out
    about_mean = aa - ab**2 / (bb.clamp(min=0) + 1 / prior.log_inv_disp_variance)
    about_disp = bb - ab**2 / (aa.clamp(min=0) + 1 / prior.log_mean_variance)
    off = components.log_mean - prior.log_mean
    information = about_mean.clamp(min=torch.finfo(aa.dtype).eps)
    variance = mean_variance(off, information, prior.log_mean_variance, votes)
    return GenePrior(
        prior.log_mean, variance, *dispersion_prior(components.log_inv_disp, about_disp.clamp(min=0), prior)
    )


def mean_variance(off: Tensor, information: Tensor, variance: Tensor, votes: Tensor | None = None) -> Tensor:
    """(genes,) tau^2 from offsets (K, genes) that were shrunken under ``variance``; votes (K,)."""
    own = 1 / information  # variance
    square_off = (off * (1 + own / variance)) ** 2  # as they were before the prior shrank them
    n_components, begin = off.shape[0], variance.log()
    given = float(n_components) if votes is None else float(votes.sum())
    of_typical = TYPICAL_GENE_WEIGHT + n_components - given
    of_components = _on_the_cpu(own, square_off, torch.ones_like(own[:, 0]) if votes is None else votes)

    def em_step(log_variance: Tensor) -> Tensor:
        (now,), squares = _on_the_cpu(torch.exp(log_variance)), np.empty(len(log_variance))
        over_rows(expected_square_rows, len(squares), 4 * GENES_AT_ONCE, now, *of_components, squares)
        total = torch.from_numpy(squares).to(log_variance)
        typical = (total / given).log().mean().exp()
        return ((total + of_typical * typical) / (n_components + TYPICAL_GENE_WEIGHT)).log()

    at, low, high = begin, begin - LARGEST_FALL, begin + LARGEST_STEP
    for _ in range(EXTRAPOLATIONS):
        one = em_step(at)
        two = em_step(one)
        share = torch.where(one == at, 0.0, (two - one) / (one - at)).clamp(0, LARGEST_SHARE)
        at = (two + (two - one) * share / (1 - share)).clamp(low, high)
    return torch.exp(at)


def dispersion_prior(
    log_inv_disp: Tensor, information: Tensor, prior: GenePrior
) -> tuple[Tensor, Tensor, Tensor]:
    """(genes,) b, () sigma^2 and (3,) trend from ln r and the information H on it, (K, genes) each."""
    begin, tiny = prior, torch.finfo(log_inv_disp.dtype).tiny
    # (d - b) H for a likelihood around d, whose H may vanish
    pull = (log_inv_disp - begin.log_inv_disp) * (1 / begin.log_inv_disp_variance + information)
    of_components, sums = _on_the_cpu(pull, information), np.empty((N_DISPERSION_SUMS, pull.shape[1]))
    for _ in range(ROUNDS):
        b, variance = prior.log_inv_disp, prior.log_inv_disp_variance
        t_0, t_1, around = prior.trend
        (moved,) = _on_the_cpu(b - begin.log_inv_disp)
        over_rows(dispersion_rows, len(b), 4 * GENES_AT_ONCE, *of_components, moved, float(variance), sums)
        w, w_squares, z, z_squares, both = torch.from_numpy(sums).to(b)
        information_on_b = w + 1 / around
        step = (z + (_line(prior) - b) / around) / information_on_b
        step = step.clamp(-LARGEST_STEP / ROUNDS, LARGEST_STEP / ROUNDS)
        # z - w step
        b, z, z_squares = b + step, z - w * step, z_squares - step * (2 * both - step * w_squares)
        # that b was fitted to them too takes a part of the spread
        expected = w - w_squares / information_on_b
        variance = _fisher_step(variance, z_squares.sum(), w_squares.sum(), expected.sum())

        shrinkage = 1 / (1 + around * w)  # with b integrated out, too
        w = w * shrinkage
        z = z * shrinkage + w * (b - _line(prior))
        total = w.sum().clamp(min=tiny)
        middle = (w * prior.log_mean).sum() / total
        off = prior.log_mean - middle
        rise = (z.sum() / total).clamp(-LARGEST_STEP / ROUNDS, LARGEST_STEP / ROUNDS)
        tilt = ((z * off).sum() - t_1 / SLOPE_VARIANCE) / ((w * off**2).sum() + 1 / SLOPE_VARIANCE)
        tilt = tilt.clamp(-LARGEST_STEP / ROUNDS, LARGEST_STEP / ROUNDS)
        z = z - w * (rise + tilt * off)
        around = _fisher_step(around, (z**2).sum(), (w**2).sum(), w.sum())
        trend = torch.stack([t_0 + rise - tilt * middle, t_1 + tilt, around])
        prior = prior._replace(log_inv_disp=b, log_inv_disp_variance=variance, trend=trend)
    return prior.log_inv_disp, prior.log_inv_disp_variance, prior.trend


def _line(prior: GenePrior) -> Tensor:
    """(genes,) ln r that the trend expects."""
    return (prior.trend[0] + prior.trend[1] * prior.log_mean).clamp(*LOG_INV_DISP_RANGE)


def _fisher_step(variance: Tensor, squares: Tensor, information: Tensor, expected: Tensor) -> Tensor:
    """() next value of a variance, from sums of z^2, of w^2, and of E z^2."""
    most = 2.0 ** (1 / ROUNDS)
    step = (squares - expected) / information.clamp(min=torch.finfo(squares.dtype).tiny)
    return (variance + step).clamp(variance / most, variance * most).clamp(*DISP_VARIANCES)


def _on_the_cpu(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    """As compiled loops take them; to move float64 from a GPU costs less than many small sums there."""
    return tuple(t.double().cpu().contiguous().numpy() for t in tensors)

"""An encoder that begins near the posterior under given components, where a random one would take many steps.

The log joint of a cell with counts c_j and size factor s is, but for what components share,

    l_k + ln pi_k = sum_j g_kj(c_j) - Z_k(s) + ln pi_k,      Z_k(s) = sum_j r_kj ln(1 + s rho_kj),
    g_kj(c) = c [ln mu_kj - ln(1 + s rho_kj)] + D(c, r_kj)

An encoder of ln(1 + c_j) is told no size factor. So s in g is the median of the cells, Z_k is linear in s
around it, and s there is u x_+ with u the size factor that a count is worth. What a gene then adds,
g_kj(c) - u c Z'_k, is fitted by w_kj ln(1 + c):

    w_kj = sum_c v_c ln(1 + c) [g_kj(c) - u c Z'_k] / sum_c v_c ln(1 + c)^2,     v_c = 1 / c^2

over the counts c that the gene has; v_c stands for how often they occur. Two hidden units of opposite sign
carry each component's sum through the ReLU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nbmix.core.levels import CountLevels
from nbmix.core.parameters import Components
from nbmix.core.special import log_rising_ratio
from nbmix.models.networks import SparseEncoder


@torch.no_grad()
def begin_near_posterior(
    encoder: SparseEncoder,
    components: Components,
    log_weights: Tensor,
    levels: CountLevels,
    size_factor: float,
    size_factor_per_count: float,
) -> bool:
    """Set an encoder to the linear approximation of the log joint; the units that this leaves stay as drawn.

    Args:
        encoder: of K components.
        components: (K, genes) each.
        log_weights: (K,) ln pi.
        levels: the counts that occur.
        size_factor: s, the median of the cells.
        size_factor_per_count: u.

    Returns:
        Whether it has been set: it has two hidden units for each component.
    """
    n_components, n_hidden = len(log_weights), encoder.first_bias.numel()
    if 2 * n_components > n_hidden:
        return False
    log_mean, log_inv_disp = components.log_mean.double(), components.log_inv_disp.double()
    r, grown = log_inv_disp.exp(), torch.log1p(size_factor * (log_mean - log_inv_disp).exp())
    slope = (r * (1 - torch.exp(-grown))).sum(1) / size_factor  # (K,) Z'(s)
    gene, count = levels.gene, levels.count
    feature = torch.log1p(count)

    def by_gene(values: Tensor) -> Tensor:
        """(genes,) sums over counts of v_c ln(1 + c) times values (pairs,)."""
        weighted = values * feature / count.square()
        return weighted.new_zeros(levels.n_genes).index_add_(0, gene, weighted)

    norm = by_gene(feature).clamp(min=torch.finfo(torch.float64).tiny)  # a silent gene has no counts
    weights = []
    for k in range(n_components):
        of_count = (log_mean[k] - grown[k])[gene] - size_factor_per_count * slope[k]
        weights.append(by_gene(count * of_count + log_rising_ratio(count, log_inv_disp[k][gene])) / norm)
    weight = torch.stack(weights)  # (K, genes)
    bias = log_weights.double() - (r * grown).sum(1) + size_factor * slope
    weight, bias = weight - weight.mean(0), bias - bias.mean()
    both = slice(2 * n_components)
    encoder.first[:, both] = torch.cat([weight, -weight]).T.to(encoder.first)
    encoder.first_bias[both] = torch.cat([bias, -bias]).to(encoder.first)
    one = torch.eye(n_components).to(encoder.first)
    encoder.last.weight[:, both] = torch.cat([one, -one], 1)
    encoder.last.bias.zero_()
    return True

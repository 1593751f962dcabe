"""The expected log likelihood Q, which the M step raises, with its derivatives.

For one gene of one component, with a = ln mu, b = ln r and the statistics A_m, B_c, R_m of
``nbmix.core.statistics``,

    Q(a, b) = a sum_m A_m + sum_c B_c D(c, r) - sum_m (A_m + r R_m) ln(1 + S_m e^{a - b}),

whose gradient and 2 x 2 Hessian are sums of the same size. With W_t = sum_{c > t} B_c the counts up to
EXACT_COUNT add sum_t W_t ln(1 + t / r), larger ones the tail of ``nbmix.core.special`` beside. A prior adds
its log density. On the CPU compiled loops sum, ``nbmix.core.kernels.expected``; elsewhere torch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from nbmix.core.batch import Basis, nodes_of_genes
from nbmix.core.kernels.blocks import GENES_AT_ONCE
from nbmix.core.kernels.expected import N_CURVES, ExpectedSums, curvature_rows, slope_rows
from nbmix.core.kernels.threads import over_rows
from nbmix.core.levels import CountLevels
from nbmix.core.newton import Curve
from nbmix.core.nodes import WIDEST_SOFTPLUS
from nbmix.core.parameters import Components, GenePrior
from nbmix.core.special import level_curve, tail_curve
from nbmix.core.statistics import SufficientStatistics
from nbmix.core.tables import LikelihoodTables


class Curvature(NamedTuple):
    """Value, gradient and Hessian of Q at (a, b), elementwise, in nats."""

    value: Tensor
    grad_a: Tensor
    grad_b: Tensor
    hess_aa: Tensor
    hess_ab: Tensor
    hess_bb: Tensor


@dataclass
class ExpectedLogLikelihood:
    """Q of many (gene, component) problems laid out flat, so that converged ones can be dropped.

    Attributes:
        log_nodes: (nodes, 1), or (nodes, problems) where genes have nodes of their own.
        rate, node: (nodes, problems) A_m and R_m.
        low_at, low_level, low_weight: the levels t with a weight: their problem, t, and total weight of
            counts above t.
        high_at, high_count, high_weight: likewise for the larger counts, each with its own weight.
        prior: (4, problems) centre and precision of a, then of b, whose log density is added; or None.
    """

    log_nodes: Tensor
    rate: Tensor
    node: Tensor
    low_at: Tensor
    low_level: Tensor
    low_weight: Tensor
    high_at: Tensor
    high_count: Tensor
    high_weight: Tensor
    prior: Tensor | None = None

    @classmethod
    def of(
        cls, statistics: SufficientStatistics, basis: Basis, prior: GenePrior | None = None
    ) -> ExpectedLogLikelihood:
        """The problems of all components and genes, component by component."""
        n_genes, n_components, n_nodes = statistics.rate.shape
        levels = basis.levels
        node = statistics.node if statistics.node.dim() == 3 else statistics.node[None]
        offset = torch.arange(n_components, device=levels.gene.device) * n_genes
        weight = levels.reaching(statistics.pair) * (levels.level > 0)[:, None]  # (low pairs, K)
        low, low_k = torch.nonzero(weight, as_tuple=True)
        high_weight = statistics.pair[levels.n_low :]
        high, high_k = torch.nonzero(high_weight, as_tuple=True)
        log_nodes = basis.nodes.log_nodes
        return cls(
            log_nodes[:, None] if log_nodes.dim() == 1 else log_nodes.T.repeat(1, n_components),
            statistics.rate.permute(2, 1, 0).reshape(n_nodes, -1),
            node.permute(2, 1, 0).expand(-1, -1, n_genes).reshape(n_nodes, -1),
            levels.gene[low] + offset[low_k],
            levels.level[low],
            weight[low, low_k],
            levels.high_gene[high] + offset[high_k],
            levels.high_count[high],
            high_weight[high, high_k],
            None if prior is None else flat_prior(prior, n_components),
        )

    @classmethod
    def joined(cls, parts: Sequence[ExpectedLogLikelihood]) -> ExpectedLogLikelihood:
        """The problems of all ``parts``, which have the same nodes, one part after another."""
        first, sizes = parts[0], [part.rate.shape[1] for part in parts]
        begins = [sum(sizes[:number]) for number in range(len(parts))]

        def along(name: str, dim: int = 0, *, shifted: bool = False) -> Tensor:
            of_parts = [getattr(part, name) for part in parts]
            if shifted:
                of_parts = [at + begin for at, begin in zip(of_parts, begins, strict=True)]
            return torch.cat(of_parts, dim)

        return cls(
            first.log_nodes if first.log_nodes.shape[1] == 1 else along("log_nodes", 1),
            along("rate", 1),
            along("node", 1),
            along("low_at", shifted=True),
            along("low_level"),
            along("low_weight"),
            along("high_at", shifted=True),
            along("high_count"),
            along("high_weight"),
            None if first.prior is None else along("prior", 1),
        )

    @property
    def log_inv_disps(self) -> slice:
        """Of the two numbers of a problem, those that are ln r."""
        return slice(1, 2)

    def curve(self, at: Tensor) -> Curve:
        """Q with its gradient and Hessian at ``at`` (problems, 2) ln mu and ln r."""
        value, grad_a, grad_b, aa, ab, bb = self.curvature(*at.T)
        hessian = torch.stack([aa, ab, ab, bb], 1).view(-1, 2, 2)
        return Curve(value, torch.stack([grad_a, grad_b], 1), hessian)

    def subset(self, keep: Tensor) -> ExpectedLogLikelihood:
        """The problems where the mask ``keep`` holds, in their order."""
        place = torch.cumsum(keep, 0) - 1
        low, high = keep[self.low_at], keep[self.high_at]
        return ExpectedLogLikelihood(
            self.log_nodes if self.log_nodes.shape[1] == 1 else self.log_nodes[:, keep],
            self.rate[:, keep],
            self.node[:, keep],
            place[self.low_at[low]],
            self.low_level[low],
            self.low_weight[low],
            place[self.high_at[high]],
            self.high_count[high],
            self.high_weight[high],
            None if self.prior is None else self.prior[:, keep],
        )

    def value(self, log_mean: Tensor, log_inv_disp: Tensor) -> Tensor:
        """Q per problem, nats."""
        return self.curvature(log_mean, log_inv_disp).value

    def curvature(self, log_mean: Tensor, log_inv_disp: Tensor) -> Curvature:
        """Q with its gradient and Hessian in (a, b) at flat ``log_mean``, ``log_inv_disp`` (problems,)."""
        a, b = log_mean, log_inv_disp
        r = torch.exp(b)
        z = self.log_nodes + (a - b)  # (nodes, problems)
        grown, share = softplus(z, threshold=WIDEST_SOFTPLUS), torch.sigmoid(z)
        zeros = r * self.node
        both = self.rate + zeros
        total = self.rate.sum(0)
        bent = (both * share * (1 - share)).sum(0)
        zero_share = (zeros * share).sum(0)
        value = a * total - (both * grown).sum(0)
        grad_a = total - (both * share).sum(0)
        grad_b = (both * share).sum(0) - (zeros * grown).sum(0)
        hess_bb = 2 * zero_share - (zeros * grown).sum(0) - bent
        for at, weight, curve in (
            (self.low_at, self.low_weight, level_curve(self.low_level, b[self.low_at])),
            (self.high_at, self.high_weight, tail_curve(self.high_count, b[self.high_at])),
        ):
            value = value.index_add(0, at, weight * curve.value)
            grad_b = grad_b.index_add(0, at, weight * curve.first)
            hess_bb = hess_bb.index_add(0, at, weight * curve.second)
        hess_aa = -bent
        if self.prior is not None:
            centre_a, precision_a, centre_b, precision_b = self.prior
            off_a, off_b = a - centre_a, b - centre_b
            value = value - (precision_a * off_a**2 + precision_b * off_b**2) / 2
            grad_a, grad_b = grad_a - precision_a * off_a, grad_b - precision_b * off_b
            hess_aa, hess_bb = hess_aa - precision_a, hess_bb - precision_b
        return Curvature(value, grad_a, grad_b, hess_aa, bent - zero_share, hess_bb)


def curvature(
    statistics: SufficientStatistics, basis: Basis, components: Components, prior: GenePrior | None = None
) -> Curvature:
    """Q, and the log density of a prior, with gradient and Hessian at ``components``: (K, genes) each."""
    shape = components.log_mean.shape
    if components.log_mean.device.type != "cpu":
        problem = ExpectedLogLikelihood.of(statistics, basis, prior)
        flat = problem.curvature(*(t.double().flatten() for t in components))
        return Curvature(*(t.view(shape) for t in flat))
    out = torch.empty(N_CURVES, *shape, dtype=torch.float64)
    a, b = (t.detach().double().contiguous().numpy() for t in components)
    sums = expected_sums(statistics, basis.levels, nodes_of_genes(basis), prior)
    over_rows(curvature_rows, shape[1], GENES_AT_ONCE, a, b, sums, out.numpy())
    return Curvature(*out)


def slope(
    statistics: SufficientStatistics, basis: Basis, components: Components, tables: LikelihoodTables
) -> tuple[Tensor, Tensor]:
    """Gradient of Q in ln mu and ln r, (K, genes) each, at the components that ``tables`` were made of."""
    if components.log_mean.device.type != "cpu":
        found = curvature(statistics, basis, components)
        return found.grad_a, found.grad_b
    out = torch.empty(2, *components.log_mean.shape, dtype=torch.float64)
    a, b = (t.detach().double().contiguous().numpy() for t in components)
    sums = expected_sums(statistics, basis.levels, nodes_of_genes(basis))
    over_rows(slope_rows, a.shape[1], GENES_AT_ONCE, a, b, sums, tables.grown.numpy(), out.numpy())
    return out[0], out[1]


def expected_sums(
    statistics: SufficientStatistics,
    levels: CountLevels,
    nodes: np.ndarray,
    prior: GenePrior | None = None,
) -> ExpectedSums:
    """What compiled loops take beside the components; nodes: (genes, padded) S_m."""
    of_genes = statistics.node if statistics.node.dim() == 3 else statistics.node[None]
    node = np.zeros((*of_genes.shape[:2], nodes.shape[1]))
    node[:, :, : of_genes.shape[2]] = of_genes.numpy()
    beliefs = np.zeros((4, levels.n_genes)) if prior is None else flat_prior(prior, 1).contiguous().numpy()
    rate, pair = (t.contiguous().numpy() for t in (statistics.rate, statistics.pair))
    return ExpectedSums(nodes, rate, node, pair, levels.places(), beliefs)


def flat_prior(prior: GenePrior, n_components: int) -> Tensor:
    rows = (
        prior.log_mean,
        1 / prior.log_mean_variance,
        prior.log_inv_disp,
        (1 / prior.log_inv_disp_variance).expand_as(prior.log_mean),
    )
    return torch.stack(rows).repeat(1, n_components)


def expected_log_likelihood(statistics: SufficientStatistics, basis: Basis, components: Components) -> Tensor:
    """(K,) nats: sum_ij q_ik ln NB(x_ij), less what no component depends on (the batches' ``constant``)."""
    return curvature(statistics, basis, components).value.sum(1)

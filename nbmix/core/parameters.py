"""The parameters of a mixture: components, what they are drawn from, and their bounds."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG_INV_DISP_RANGE = (-8.0, 12.0)  # from all-or-nothing to Poisson; beyond them the likelihood is flat

FEWEST_COUNTS = 1e-3  # a mean explains at least this many counts in the whole data, so that it stays finite

START_LOG_INV_DISP = 1.0


class Components(NamedTuple):
    """K components: (K, genes) float64 ln mu, per unit of size factor, and ln of the inverse dispersion."""

    log_mean: Tensor
    log_inv_disp: Tensor


class GenePrior(NamedTuple):
    """What components are expected to be: ln mu_kj ~ N(m_j, tau_j^2), ln r_kj ~ N(b_j, sigma^2).

    Attributes:
        log_mean: (genes,) m, the pooled gene's.
        log_mean_variance: (genes,) tau^2.
        log_inv_disp: (genes,) b, what a gene's components have in common.
        log_inv_disp_variance: () sigma^2.
        trend: (3,) t_0, t_1 and omega^2 of b_j ~ N(t_0 + t_1 m_j, omega^2).
    """

    log_mean: Tensor
    log_mean_variance: Tensor
    log_inv_disp: Tensor
    log_inv_disp_variance: Tensor
    trend: Tensor

    @classmethod
    def of_tables(cls, of_genes: Tensor, of_disp: Tensor) -> GenePrior | None:
        """Of what ``tables`` gives; None where it has not been learned, which leaves zeros."""
        log_mean, log_mean_variance, log_inv_disp = of_genes
        return (
            None
            if of_disp[0] == 0
            else cls(log_mean, log_mean_variance, log_inv_disp, of_disp[0], of_disp[1:])
        )

    def tables(self) -> tuple[Tensor, Tensor]:
        """(3, genes) m, tau^2 and b, and (4,) sigma^2 with the trend, as checkpoints hold them."""
        return torch.stack(self[:3]), torch.cat([self.log_inv_disp_variance[None], self.trend])

    def log_density(self, components: Components) -> Tensor:
        """(K, genes) nats, without the normalising constant."""
        from_mean = (components.log_mean - self.log_mean) ** 2 / self.log_mean_variance
        from_disp = (components.log_inv_disp - self.log_inv_disp) ** 2 / self.log_inv_disp_variance
        return -(from_mean + from_disp) / 2


def lowest_log_mean(total_size: float) -> float:
    """Floor of ln mu where a gene is silent in a component: FEWEST_COUNTS over the summed size factors."""
    return math.log(FEWEST_COUNTS / total_size)

"""Nodes of the size factor, between which functions of ln s are interpolated.

What zeros and counts add depends on a cell through ln(1 + s rho) alone, which is smooth in ln s:

    ln(1 + s_i rho) = sum_m w_im ln(1 + S_m rho)        for every rho, to a relative NODE_TOLERANCE

with a few Chebyshev nodes S_m between the smallest and the largest size factor, and weights that do not
depend on rho. So sums over genes are needed at the nodes only.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from nbmix.core.kernels.blocks import LANES
from nbmix.core.kernels.tables import interpolation_weights

NODE_TOLERANCE = 1e-8  # relative error of the interpolation in ln s, for every single cell

WIDEST_SOFTPLUS = 40.0  # above it softplus(z) = z to the last bit of a float64


class SizeFactorNodes(NamedTuple):
    """Chebyshev nodes in ln s and barycentric weights between them.

    Attributes:
        log_nodes: (nodes,) float64, ln S_m; (genes, nodes) where genes have nodes of their own, in M steps
            alone (``nbmix.core.offsets``).
        barycentric: (nodes,) float64, the barycentric weights (Berrut & Trefethen 2004, eq. 5.4).
    """

    log_nodes: Tensor
    barycentric: Tensor

    @classmethod
    def of_genes(cls, low: Tensor, high: Tensor, n_nodes: int) -> SizeFactorNodes:
        """Nodes of every gene's own, between these ln s (genes,)."""
        nodes, barycentric = _chebyshev(n_nodes)
        log_nodes = (low + high)[:, None] / 2 + (high - low)[:, None] / 2 * torch.from_numpy(nodes)
        return cls(log_nodes, torch.from_numpy(barycentric))

    @classmethod
    def spanning(cls, size_factors: np.ndarray, tolerance: float = NODE_TOLERANCE) -> SizeFactorNodes:
        """As few nodes as interpolate ln(1 + s rho), for any rho, between the smallest and largest s > 0."""
        positive = size_factors[size_factors > 0]
        if positive.size == 0:
            return cls(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        low, high = float(np.log(positive.min())), float(np.log(positive.max()))
        half = (high - low) / 2
        if half < 1e-12:
            return cls(torch.tensor([low], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        nodes, barycentric = _chebyshev(fewest_nodes(math.ceil(half * 32) / 32, tolerance))
        return cls(torch.from_numpy((low + high) / 2 + half * nodes), torch.from_numpy(barycentric))

    def to(self, device: torch.device | str) -> SizeFactorNodes:
        return SizeFactorNodes(self.log_nodes.to(device), self.barycentric.to(device))

    def weights(self, size_factors: Tensor) -> Tensor:
        """(cells, nodes) float64 interpolation weights; a row sums to 1, or is 0 where s = 0."""
        if size_factors.device.type == "cpu":
            weights = torch.empty(size_factors.numel(), self.log_nodes.numel(), dtype=torch.float64)
            nodes = (self.log_nodes.numpy(), self.barycentric.numpy())
            interpolation_weights(size_factors.double().numpy(), *nodes, weights.numpy())
            return weights
        log_s = torch.log(size_factors.double())
        gap = log_s[:, None] - self.log_nodes  # (cells, nodes)
        hit = gap == 0
        raw = self.barycentric / torch.where(hit, 1.0, gap)
        raw = torch.where(hit.any(1, keepdim=True), hit.double(), raw)
        weights = raw / raw.sum(1, keepdim=True)
        return torch.where((size_factors > 0)[:, None], weights, 0.0)


def _chebyshev(n_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Chebyshev nodes on [-1, 1] and their barycentric weights."""
    step = np.arange(n_nodes)
    angle = (2 * step + 1) * (math.pi / (2 * n_nodes))
    return np.cos(angle), (1.0 - 2.0 * (step % 2)) * np.sin(angle)


@lru_cache(maxsize=1024)
def fewest_nodes(half: float, tolerance: float) -> int:
    """Nodes that interpolate ln(1 + e^(t + u)) over |t| <= half to a relative ``tolerance``, for every u.

    The largest error is looked up on a grid of t and u; beyond |u| = 20 + half the function is e^(t + u), or
    a line. The error falls like (a + sqrt(1 + a^2))^-M with a = pi / half (Trefethen 2013, theorem 8.2),
    since the function is analytic in the strip |Im t| < pi.
    """
    shifts = np.linspace(-20 - half, 20 + half, 16 * math.ceil(5 + half) + 1)
    n_nodes = 2
    while True:
        nodes, barycentric = _chebyshev(n_nodes)
        points = (np.arange(4 * n_nodes) + 0.5) * (2 / (4 * n_nodes)) - 1
        raw = barycentric / (points[:, None] - nodes)
        weights = raw / raw.sum(1, keepdims=True)
        wanted = np.logaddexp(0, half * points[:, None] + shifts)
        got = weights @ np.logaddexp(0, half * nodes[:, None] + shifts)
        rounding = 16 * np.finfo(float).eps * wanted.max(0)  # no nodes can do better
        if (np.abs(got - wanted) <= tolerance / 2 * wanted + rounding).all():
            return n_nodes
        n_nodes += 1


def node_softplus(nodes: SizeFactorNodes, log_mean: Tensor, log_inv_disp: Tensor) -> Tensor:
    """(*shape, nodes) ln(1 + S_m rho) in nats, rho = exp(log_mean - log_inv_disp)."""
    return softplus(nodes.log_nodes + (log_mean - log_inv_disp)[..., None], threshold=WIDEST_SOFTPLUS)


def padded_nodes(log_nodes: Tensor) -> np.ndarray:
    """(..., nodes) ln S_m on the CPU -> (..., padded) S_m, filled up with 0 to whole vector registers."""
    n_nodes = log_nodes.shape[-1]
    padded = np.zeros((*log_nodes.shape[:-1], -(-n_nodes // LANES) * LANES))
    padded[..., :n_nodes] = np.exp(log_nodes.numpy())
    return padded

"""Log ratios of Gamma functions as sums of logarithms, stable for any inverse dispersion.

The count part of a negative binomial with inverse dispersion r is

    D(c, r) = ln G(c + r) - ln G(r) - c ln r = sum_{t=1}^{c-1} ln(1 + t / r),

zero for c = 0 and c = 1. Nothing cancels in the sum, also where r is 1e8 and the Gamma functions are.
Counts up to ``EXACT_COUNT`` use the sum, larger ones add the Stirling series between EXACT_COUNT and c.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EXACT_COUNT = 20  # Stirling's remainder below is under 2e-15 for arguments from 20 on


class CurveTerms(NamedTuple):
    """A function of b = ln r with its first and second derivative in b."""

    value: Tensor
    first: Tensor
    second: Tensor


def level_terms(level: Tensor, log_inv_disp: Tensor) -> Tensor:
    """ln(1 + t / r) for levels t >= 1 and r = exp(log_inv_disp), elementwise, in nats."""
    return torch.log1p(level * torch.exp(-log_inv_disp))


def level_curve(level: Tensor, log_inv_disp: Tensor) -> CurveTerms:
    """``level_terms`` with d/db = -t / (r + t) and d2/db2 = t r / (r + t)^2."""
    ratio = level * torch.exp(-log_inv_disp)
    share = ratio / (1 + ratio)
    return CurveTerms(torch.log1p(ratio), -share, share * (1 - share))


def _stirling_remainder(z: Tensor) -> Tensor:
    """ln G(z) - [(z - 1/2) ln z - z + ln(2 pi) / 2] for z >= 20 (Abramowitz & Stegun 6.1.41)."""
    w = 1 / (z * z)
    return (1 / 12 - w * (1 / 360 - w * (1 / 1260 - w / 1680))) / z


def _digamma_remainder(z: Tensor) -> Tensor:
    """psi(z) - ln z for z >= 20 (Abramowitz & Stegun 6.3.18)."""
    w = 1 / (z * z)
    return -0.5 / z - w * (1 / 12 - w * (1 / 120 - w * (1 / 252 - w / 240)))


def _trigamma_remainder(z: Tensor) -> Tensor:
    """psi'(z) - 1 / z for z >= 20 (Abramowitz & Stegun 6.4.12)."""
    w = 1 / (z * z)
    return w * (0.5 + (1 / 6 - w * (1 / 30 - w * (1 / 42 - w / 30))) / z)


def tail_terms(count: Tensor, log_inv_disp: Tensor) -> Tensor:
    """sum_{t=T}^{c-1} ln(1 + t / r) with T = EXACT_COUNT, for counts c >= T, in nats."""
    r = torch.exp(log_inv_disp)
    extra = count - EXACT_COUNT
    z = r + EXACT_COUNT
    return (
        (z - 0.5) * torch.log1p(extra / z)
        + extra * (torch.log1p(count / r) - 1)
        + _stirling_remainder(r + count)
        - _stirling_remainder(z)
    )


def tail_curve(count: Tensor, log_inv_disp: Tensor) -> CurveTerms:
    """``tail_terms`` with its derivatives r D_r and r D_r + r^2 D_rr in b = ln r."""
    r = torch.exp(log_inv_disp)
    extra = count - EXACT_COUNT
    z = r + EXACT_COUNT
    first = r * (torch.log1p(extra / z) + _digamma_remainder(r + count) - _digamma_remainder(z)) - extra
    # 1/(r+c) - 1/(r+T) is written as one fraction: the difference itself cancels for large r
    curvature = r * r * (_trigamma_remainder(r + count) - _trigamma_remainder(z)) + extra * (
        1 - (r / z) * (r / (r + count))
    )
    return CurveTerms(tail_terms(count, log_inv_disp), first, first + curvature)


def log_rising_ratio(count: Tensor, log_inv_disp: Tensor) -> Tensor:
    """D(c, r) elementwise for integer counts c >= 0 (broadcast), float64, in nats."""
    count, log_inv_disp = torch.broadcast_tensors(count.double(), log_inv_disp.double())
    total = torch.zeros_like(log_inv_disp)
    for level in range(1, EXACT_COUNT):
        inside = count > level
        total = total + torch.where(inside, level_terms(torch.tensor(float(level)), log_inv_disp), 0.0)
    high = count > EXACT_COUNT
    return total + torch.where(high, tail_terms(count.clamp(min=EXACT_COUNT), log_inv_disp), 0.0)

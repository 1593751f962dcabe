"""How loops are compiled, and the elementary functions that all of them use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

LOW_LEVELS = 20  # EXACT_COUNT of nbmix.core.special, which the compiler must see as a constant


def _compiled(fastmath: set[str]) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that compiles; the machine code is kept where numba finds a folder that can be written to."""

    def compile_it(function: Callable[..., Any]) -> Any:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # there is none, as in a container that is read-only
            return numba.njit(**options)(function)

    return compile_it


# sums keep the order in which they are written; a product may be fused with the sum that it enters
ordered = _compiled({"contract", "nsz"})

# sums over a loop are taken in any order, so that they are vectorised
reordered = _compiled({"contract", "nsz", "reassoc"})


class LogBuffers(NamedTuple):
    """Arguments and results of one ``log1p_and_share``, and what it works in: (values,) each."""

    x: np.ndarray
    grown: np.ndarray
    share: np.ndarray
    y: np.ndarray
    bits: np.ndarray


@ordered
def log_buffers(size):
    x, grown, share, y = np.empty(size), np.empty(size), np.empty(size), np.empty(size)
    return LogBuffers(x, grown, share, y, y.view(np.int64))


@ordered
def log1p_and_share(n, x, grown, share, y, bits):
    """ln(1 + x) and x / (1 + x) of the first n values x >= 0 to 2 ulp; ``bits`` is ``y`` seen as int64.

    ln y = e ln 2 + 2 atanh(s), s = (f - 1) / (f + 1), for y = 2^e f with f in [sqrt(1/2), sqrt(2)). Written
    out since calls to libm are not vectorised.
    """
    for m in range(n):
        y[m] = 1.0 + x[m]
    for m in range(n):
        exponent = (bits[m] - 0x3FE6A09E667F3BCD) >> 52
        bits[m] -= exponent << 52
        grown[m] = float(exponent)
    for m in range(n):
        whole = 1.0 + x[m]
        inverse = 1.0 / whole
        s = (y[m] - 1.0) / (y[m] + 1.0)
        z = s * s
        t = 1.0 / 19.0
        t = t * z + 1.0 / 17.0
        t = t * z + 1.0 / 15.0
        t = t * z + 1.0 / 13.0
        t = t * z + 1.0 / 11.0
        t = t * z + 1.0 / 9.0
        t = t * z + 1.0 / 7.0
        t = t * z + 1.0 / 5.0
        t = t * z + 1.0 / 3.0
        t = t * z + 1.0
        share[m] = x[m] * inverse
        # the last term is what rounding took from 1 + x
        grown[m] = grown[m] * 0.6931471805599453 + 2.0 * s * t + (x[m] - (whole - 1.0)) * inverse


@ordered
def _stirling_remainder(z):
    w = 1.0 / (z * z)
    return (1.0 / 12.0 - w * (1.0 / 360.0 - w * (1.0 / 1260.0 - w / 1680.0))) / z


@ordered
def _digamma_remainder(z):
    w = 1.0 / (z * z)
    return -0.5 / z - w * (1.0 / 12.0 - w * (1.0 / 120.0 - w * (1.0 / 252.0 - w / 240.0)))


@ordered
def _trigamma_remainder(z):
    w = 1.0 / (z * z)
    return w * (0.5 + (1.0 / 6.0 - w * (1.0 / 30.0 - w * (1.0 / 42.0 - w / 30.0))) / z)


@ordered
def tail_of_count(count, r):
    """``nbmix.core.special.tail_curve``: value, first and second derivative in ln r."""
    extra = count - LOW_LEVELS
    z = r + LOW_LEVELS
    value = (
        (z - 0.5) * math.log1p(extra / z)
        + extra * (math.log1p(count / r) - 1.0)
        + _stirling_remainder(r + count)
        - _stirling_remainder(z)
    )
    first = r * (math.log1p(extra / z) + _digamma_remainder(r + count) - _digamma_remainder(z)) - extra
    curvature = r * r * (_trigamma_remainder(r + count) - _trigamma_remainder(z)) + extra * (
        1.0 - (r / z) * (r / (r + count))
    )
    return value, first, first + curvature

"""The dip: how far numbers are from any distribution with one mode (Hartigan & Hartigan 1985).

    dip = min over unimodal G of sup_x |F(x) - G(x)|,    1 / (2n) at least, 1 / 4 at most

with F the empirical distribution of n numbers, and G unimodal where it is convex up to some mode, where it
may jump, and concave after it. The minimum is found as in the paper: on a stretch that holds the mode, G
follows the greatest convex minorant of F to the left and the least concave majorant to the right. The dip is
half of how far F leaves these; where they are farthest apart, the stretch is cut back to the corners between
which the mode has to lie, until they are no farther apart than that.

A uniform distribution has larger dips than others with one mode, so p values under it hold for all of these,
and are too large for most.
"""

from __future__ import annotations

import numpy as np

from nbmix.core.kernels.dip import dip_of_sorted

TIES = 1e-9  # of the range, by which each number is moved from the last: equal ones become a steep rise


SIZES = np.array([4, 5, 6, 7, 8, 10, 14, 20, 30, 50, 100, 200, 400, 800, 1600])

LEVELS = np.array([0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001])

# by ``null_quantiles``, from 1,000,000 draws up to n = 50, 400,000 up to 200, 200,000 above
# fmt: off
QUANTILES = np.array([
    [0.2500, 0.2500, 0.2500, 0.2652, 0.3149, 0.3748, 0.4142, 0.4472, 0.4632, 0.4744, 0.4890],  # 4
    [0.2236, 0.2236, 0.2718, 0.3293, 0.3600, 0.3953, 0.4168, 0.4328, 0.4394, 0.4432, 0.4464],  # 5
    [0.2041, 0.2544, 0.3014, 0.3441, 0.3659, 0.3899, 0.4036, 0.4391, 0.4702, 0.4956, 0.5381],  # 6
    [0.2165, 0.2730, 0.3117, 0.3450, 0.3615, 0.3819, 0.4237, 0.4645, 0.4872, 0.5056, 0.5352],  # 7
    [0.2319, 0.2818, 0.3139, 0.3409, 0.3550, 0.4012, 0.4357, 0.4696, 0.4895, 0.5058, 0.5483],  # 8
    [0.2465, 0.2855, 0.3091, 0.3476, 0.3757, 0.4126, 0.4416, 0.4771, 0.5043, 0.5279, 0.5707],  # 10
    [0.2502, 0.2855, 0.3221, 0.3597, 0.3836, 0.4233, 0.4573, 0.4952, 0.5216, 0.5466, 0.5956],  # 14
    [0.2541, 0.2952, 0.3280, 0.3686, 0.3951, 0.4348, 0.4702, 0.5112, 0.5398, 0.5665, 0.6218],  # 20
    [0.2599, 0.3019, 0.3367, 0.3777, 0.4052, 0.4466, 0.4830, 0.5260, 0.5565, 0.5844, 0.6412],  # 30
    [0.2666, 0.3094, 0.3455, 0.3876, 0.4161, 0.4590, 0.4970, 0.5420, 0.5732, 0.6023, 0.6621],  # 50
    [0.2740, 0.3178, 0.3550, 0.3982, 0.4274, 0.4714, 0.5109, 0.5578, 0.5898, 0.6214, 0.6844],  # 100
    [0.2796, 0.3240, 0.3617, 0.4055, 0.4352, 0.4802, 0.5212, 0.5692, 0.6029, 0.6336, 0.7026],  # 200
    [0.2838, 0.3284, 0.3664, 0.4109, 0.4406, 0.4865, 0.5278, 0.5770, 0.6108, 0.6417, 0.7081],  # 400
    [0.2870, 0.3319, 0.3700, 0.4150, 0.4455, 0.4923, 0.5339, 0.5836, 0.6196, 0.6515, 0.7213],  # 800
    [0.2889, 0.3343, 0.3729, 0.4179, 0.4486, 0.4951, 0.5371, 0.5874, 0.6229, 0.6574, 0.7235],  # 1600
])
# fmt: on


def dip(numbers: np.ndarray) -> float:
    """The dip of numbers (n,), in any order. 1,600 take 0.1 ms."""
    x = np.sort(np.asarray(numbers, dtype=np.float64))
    n = x.size
    if n < 2 or x[0] == x[-1]:
        return 0.5 / max(n, 1)
    return float(dip_of_sorted((x - x[0]) / (x[-1] - x[0]) + TIES * np.arange(n)))


def dip_p_value(statistic: float, n: int) -> float:
    """Chance of a dip of at least ``statistic`` in n numbers of a uniform distribution.

    By ``QUANTILES``: n^1/2 dip is interpolated in ln n. Its square goes nearly linearly with ln p, so ln p is
    interpolated in that, and goes on as from the level of 0.01 to the smallest. 1 for fewer numbers than the
    table has.
    """
    least, found = 0.25 / n, n * statistic**2
    if n < SIZES[0] or found <= least * (1 + 1e-6):
        return 1.0
    quantiles = np.array([np.interp(np.log(n), np.log(SIZES), column) for column in QUANTILES.T])
    squares, logs = np.array([least, *quantiles**2]), np.log([1.0, *LEVELS])
    if found <= squares[-1]:
        return float(np.exp(np.interp(found, squares, logs)))
    slope = (logs[-1] - logs[-3]) / (squares[-1] - squares[-3])
    return float(np.exp(logs[-1] + slope * (found - squares[-1])))


def null_quantiles(n: int, levels: np.ndarray, n_draws: int, generator: np.random.Generator) -> np.ndarray:
    """n^1/2 dip that a share ``levels`` of samples of n uniform numbers exceeds: a row of ``QUANTILES``."""
    drawn = [dip_of_sorted(np.sort(generator.random(n))) for _ in range(n_draws)]
    return np.sqrt(n) * np.quantile(drawn, 1 - levels)

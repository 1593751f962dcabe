"""ln(1 + x) against NumPy, and how loops are compiled."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nbmix.core.kernels.elementary import log1p_and_share, ordered, reordered


def log1p_share(x):
    grown, share, y = np.empty((3, x.size))
    log1p_and_share(x.size, x, grown, share, y, y.view(np.int64))
    return grown, share


AWKWARD = (
    np.array([0.0, 5e-324, 1e-310, 2.0**-53, 2.0**-52, 3.0**-33, 0.5, 1.0, math.sqrt(2) - 1, math.sqrt(2)]),
    np.nextafter(2.0 ** np.arange(1, 60) * math.sqrt(0.5) - 1, np.inf),
    np.nextafter(2.0 ** np.arange(1, 60) - 1, 0),
    2.0 ** np.arange(-60, 60) - 2.0**-61,
)


@pytest.mark.parametrize(
    "x",
    [np.geomspace(1e-300, 1e300, 200_001), np.geomspace(1e-4, 1e4, 200_001), *AWKWARD],
    ids=["everywhere", "around one", "corners", "cuts of the mantissa", "powers of two", "small steps"],
)
def test_log1p_and_share_are_exact_to_a_few_ulp(x):
    grown, share = log1p_share(x)
    want = np.log1p(x)
    assert (np.abs(grown - want) <= 4 * np.spacing(want)).all()
    want = x / (1 + x)
    assert (np.abs(share - want) <= 3 * np.spacing(want)).all()


def test_log1p_never_falls_as_its_argument_grows_by_more_than_its_rounding():
    x = np.geomspace(1e-20, 1e20, 100_001)
    assert (np.diff(log1p_share(x)[0]) > 0).all()


@pytest.mark.parametrize("decorate", [ordered, reordered])
def test_code_that_cannot_be_kept_is_compiled_all_the_same(decorate):
    """As in a container that is read-only; numba has no place for code that is in no file either."""
    twice = eval("lambda x: 2.0 * x")
    assert decorate(twice)(1.5) == 3.0

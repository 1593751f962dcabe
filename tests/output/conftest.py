"""Results of small fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.results import results_of
from tests.helpers.running import small_data


@pytest.fixture(scope="session")
def results():
    """Of 60 labelled cells of two components."""
    return results_of(small_data())


@pytest.fixture(scope="session")
def unlabelled():
    """The same without labels; one cell is empty."""
    data = small_data()
    counts = data.counts.toarray()
    counts[4] = 0
    size_factors = data.size_factors.copy()
    size_factors[4] = 0
    return results_of(replace(data, labels=None, counts=type(data.counts)(counts), size_factors=size_factors))

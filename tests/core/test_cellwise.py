"""The log likelihood cell by cell against SciPy, on any device's operations."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from nbmix.core.cellwise import SharedAxes, cell_log_likelihood, cell_tables
from nbmix.core.parameters import Components
from tests.helpers.elsewhere import back, elsewhere
from tests.helpers.origins import BatchedCells


@pytest.fixture(scope="module")
def cells():
    return BatchedCells(n=80, p=30, g=3)


@pytest.fixture(scope="module")
def components():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 30, generator=generator, dtype=torch.float64)
    return Components(a - 3, b)


def expected(cells, components, shift):
    """(cells, K) by SciPy, of genes whose ln s is moved by ``shift`` (cells, genes)."""
    a, r = components.log_mean.numpy(), np.exp(components.log_inv_disp.numpy())
    mean = cells.s[:, None, None] * np.exp(a + shift[:, None])
    return scipy.stats.nbinom.logpmf(cells.counts.toarray()[:, None], r, 1 / (1 + mean / r)).sum(2)


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_cells_of_several_origins_see_components_each_by_its_offsets(cells, components, share):
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.05, 30)
    offsets = np.where(rng.random((3, 30)) < share, rng.normal(0, 1, (3, 30)), base)
    batch = cells.batch(np.arange(80))
    moved = {"offsets": torch.from_numpy(offsets), "base": torch.from_numpy(base)}
    got = cell_log_likelihood(batch, cells.basis, cell_tables(cells.basis, components, **moved))
    np.testing.assert_allclose(got.numpy(), expected(cells, components, offsets[cells.origins]), rtol=1e-7)
    there = cell_tables(
        cells.basis,
        Components(*map(elsewhere, components)),
        offsets=elsewhere(moved["offsets"]),
        base=elsewhere(moved["base"]),
    )
    torch.testing.assert_close(back(cell_log_likelihood(batch, cells.basis, there)), got, rtol=1e-11, atol=0)


def test_cells_of_no_origin_have_powers_of_depth_alone(cells, components):
    rng = np.random.default_rng(1)
    power, centre = rng.normal(0, 0.1, 30), float(np.log(cells.s).mean())
    levels = torch.zeros(1, 0, dtype=torch.float64)
    axes = SharedAxes(torch.from_numpy(power[:, None].copy()), levels, centre)
    tables = cell_tables(cells.basis, components, axes)
    got = cell_log_likelihood(cells.batch(np.arange(80), known=False), cells.basis, tables).numpy()
    shift = (np.log(cells.s) - centre)[:, None] * power
    np.testing.assert_allclose(got, expected(cells, components, shift), rtol=1e-6)

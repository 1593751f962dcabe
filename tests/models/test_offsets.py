"""A step on the offsets of a mixture, with components and responsibilities as they are."""

from __future__ import annotations

import pytest
import torch

from nbmix.core.likelihood import dense_component_log_likelihood
from nbmix.models.offsets import step_offsets
from tests.helpers.origins import BatchedCells


@pytest.fixture(scope="module")
def cells():
    return BatchedCells(n=400, p=50, k=2, g=3, spread=0.5)


def stepped(cells, n_steps):
    """(mixture, objective before each step and after the last)."""
    mixture = cells.mixture(folds=1)
    mean = torch.from_numpy(cells.counts.toarray()).double()
    sums = cells.q.T @ mean / (cells.q.T @ torch.from_numpy(cells.s))[:, None]
    mixture.log_mean.data[0] = torch.log(sums + 1e-4)
    mixture.log_inv_disp.data[0] = 1.0
    objective = [objective_of(cells, mixture)]
    for _ in range(n_steps):
        variance = mixture.origins.variance[0].clone()
        step_offsets(mixture, cells.batches(folds=1), lambda batch: cells.q[batch.rows])
        objective.append(objective_of(cells, mixture, variance))
    return mixture, objective


def objective_of(cells, mixture, variance=None):
    """sum_ik q_ik l_ik - sum_gj d_gj^2 / (2 tau_j^2), by the textbook form."""
    offsets, total = mixture.origins.offsets[0], 0.0
    for origin in range(cells.n_origins):
        rows = torch.from_numpy(cells.origins == origin)
        of_cells = dense_component_log_likelihood(
            torch.from_numpy(cells.counts.toarray()).double()[rows],
            torch.from_numpy(cells.s)[rows],
            mixture.log_mean.data[0] + offsets[origin],
            mixture.log_inv_disp.data[0],
        )
        total += float((cells.q[rows] * of_cells).sum())
    variance = mixture.origins.variance[0] if variance is None else variance
    return total - float((offsets**2 / variance).sum()) / 2


def test_steps_climb_to_the_offsets_that_cells_were_drawn_by(cells):
    mixture, objective = stepped(cells, 5)
    assert objective == sorted(objective)
    assert objective[-1] - objective[-2] < 0.01 * (objective[1] - objective[0])
    found, drawn = mixture.origins.offsets[0], torch.from_numpy(cells.offsets)
    assert float(torch.corrcoef(torch.stack([found.flatten(), drawn.flatten()]))[0, 1]) > 0.95


def test_offsets_have_no_mean_and_the_average_cell_has_it(cells):
    mixture, _ = stepped(cells, 1)
    n_cells = torch.from_numpy(cells.n_cells).double()
    torch.testing.assert_close(n_cells @ mixture.origins.offsets[0], torch.zeros(50, dtype=torch.float64))


def test_the_strength_of_their_prior_is_learned(cells):
    mixture, _ = stepped(cells, 5)
    assert 0.1 < float(mixture.origins.variance.mean()) < 0.5  # drawn with 0.25
    same = BatchedCells(n=400, p=50, k=2, g=3, spread=0.0)
    assert float(stepped(same, 5)[0].origins.variance.median()) < 0.02

"""Stepwise EM: sums over parts are the sums over all cells, whatever the parts hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import nbmix
from nbmix.core.batch import Basis, CellBatch, Precision
from nbmix.core.expected_log_likelihood import expected_log_likelihood
from nbmix.core.parameters import Components
from nbmix.core.statistics import SufficientStatistics
from nbmix.core.stepwise import RunningStatistics

N_CELLS, N_GENES, K = 90, 30, 3
COUNTS = nbmix.simulate(n=N_CELLS, p=N_GENES, k=K, s=1e3, seed=4).counts
SIZES = np.geomspace(30.0, 9000.0, N_CELLS)  # every part reaches beyond the one before
Q = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(K), N_CELLS))


def with_late_genes():
    """Genes 4 and 9 have no count in the first cells."""
    late = COUNTS.tolil(copy=True)
    late[:40, [4, 9]] = 0
    late[60, 4] = 500  # a count beyond those that have levels of their own
    return late.tocsr()


def in_parts(counts, cuts) -> RunningStatistics:
    running = RunningStatistics.none(N_GENES, K, Precision())
    for rows in np.split(np.arange(N_CELLS), cuts):
        running = running.reaching(counts[rows], SIZES[rows])
        batch = CellBatch.build(counts[rows][:, running.genes], SIZES[rows], running.basis)
        part = running.zeros().add_batch_(batch, running.basis, Q[rows], torch.float64)
        running = running.plus(part, rows.size)
    return running


@pytest.mark.parametrize("cuts", [[], [40], [1, 2, 40, 41, 70]])
def test_sums_over_parts_are_those_of_all_cells_at_once(cuts):
    counts = with_late_genes()
    running = in_parts(counts, cuts)
    np.testing.assert_array_equal(running.genes, np.flatnonzero(counts.sum(0)))
    seen = counts[:, running.genes]
    basis = Basis.of(seen, SIZES)
    whole = SufficientStatistics.collect(CellBatch.build(seen, SIZES, basis), basis, Q, torch.float64)
    assert running.n_cells == N_CELLS
    generator = np.random.default_rng(1)
    components = Components(
        *(torch.from_numpy(generator.normal(mean, 1, (K, running.genes.size))) for mean in (-4, 0))
    )
    found = expected_log_likelihood(running.statistics, running.basis, components)
    torch.testing.assert_close(found, expected_log_likelihood(whole, basis, components), rtol=1e-7, atol=0)
    torch.testing.assert_close(running.statistics.weight, whole.weight)


def test_what_was_met_stays_as_it_was_where_a_part_is_refused():
    running = in_parts(COUNTS[:], [50])
    before = [tensor.clone() for tensor in running.statistics.tensors()]
    running.reaching(1000 * COUNTS, 10 * SIZES)
    assert all(torch.equal(a, b) for a, b in zip(running.statistics.tensors(), before, strict=True))
    assert running.census.deepest == COUNTS.sum(1).max()


def test_plain_values_bring_the_same_sums_back():
    running = in_parts(with_late_genes(), [40])
    again = RunningStatistics.of(running.plain())
    for mine, theirs in zip(again.statistics.tensors(), running.statistics.tensors(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(again.basis.nodes.log_nodes, running.basis.nodes.log_nodes)
    assert torch.equal(again.basis.levels.count, running.basis.levels.count)
    assert (again.n_cells, again.sizes) == (running.n_cells, running.sizes)

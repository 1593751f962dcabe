from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from nbmix.core.batch import CellBatch, pair_product
from nbmix.core.csr import CsrMatrix
from nbmix.core.nodes import NODE_TOLERANCE, node_softplus
from nbmix.core.tables import (
    batch_log_likelihood,
    likelihood_tables,
)
from tests.helpers.pairs import coded

LOG_RHO = np.linspace(-40, 15, 111)


def test_a_batch_survives_the_way_to_its_device(problem):
    prior, labels = np.full((40, 3), 1 / 3), np.arange(40)
    batch = CellBatch.build(
        problem.counts,
        problem.size_factors,
        problem.basis,
        rows=np.arange(40)[::-1].copy(),
        fold=2,
        prior=prior,
        labels=labels,
        keep=True,
    )
    moved = batch.to("cpu")
    assert (moved.fold, moved.n_cells) == (2, 40)
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        assert type(before) is type(after)
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after)
    basis = problem.basis.to("cpu")
    tables = likelihood_tables(basis, problem.log_mean, problem.log_inv_disp)
    assert torch.equal(
        batch_log_likelihood(batch, problem.basis, tables), batch_log_likelihood(moved, basis, tables)
    )


@pytest.mark.parametrize("keep", [False, True])
def test_a_batch_holds_both_orientations_of_its_pairs(problem, keep):
    batch = CellBatch.build(problem.counts, problem.size_factors, problem.basis, keep=keep)
    assert (batch.pairs_t is not None) == keep
    eye = torch.eye(batch.n_cells, dtype=torch.float64)
    used = torch.eye(batch.used.numel(), dtype=torch.float64)
    assert torch.equal(batch.turned().matmul(eye).T, batch.pairs.matmul(used))


def test_a_batch_lists_the_pairs_that_occur_in_its_cells_alone(problem):
    rows = np.array([11, 3, 0])
    batch = CellBatch.build(problem.counts, problem.size_factors, problem.basis, pick=rows)
    marks = coded(problem.basis.levels, problem.counts, rows)
    np.testing.assert_array_equal(batch.used, np.flatnonzero(marks.any(0)))
    used = torch.eye(batch.used.numel(), dtype=torch.float64)
    np.testing.assert_array_equal(batch.pairs.matmul(used), marks[:, batch.used])
    assert batch.deepest == problem.counts[rows].sum(1).max()


@pytest.mark.parametrize("rows", [np.arange(40), np.array([39, 3, 11]), np.array([0]), np.arange(0)])
def test_a_batch_holds_all_of_its_counts(problem, rows):
    batch = CellBatch.build(problem.counts, problem.size_factors, problem.basis, pick=rows)
    levels = problem.basis.levels
    table = torch.zeros(batch.used.numel(), levels.n_genes)
    table[torch.arange(batch.used.numel()), levels.gene[batch.used]] = levels.count[batch.used].float()
    got = pair_product(batch, table)
    np.testing.assert_array_equal(got, problem.counts[rows].toarray())


@pytest.mark.parametrize("rows", [np.arange(40), np.array([39, 3, 11]), np.array([0]), np.arange(0)])
def test_picked_cells_make_the_batch_of_the_matrix_of_those_cells(problem, rows):
    picked = CellBatch.build(problem.counts, problem.size_factors, problem.basis, pick=rows, keep=True)
    cut = CellBatch.build(
        problem.counts[rows], problem.size_factors[rows], problem.basis, rows=rows, keep=True
    )
    for field in fields(CellBatch):
        mine, theirs = getattr(picked, field.name), getattr(cut, field.name)
        if isinstance(mine, CsrMatrix):
            assert (mine.n_rows, mine.n_columns) == (theirs.n_rows, theirs.n_columns)
            mine, theirs = (torch.cat([m.indptr, m.indices]) for m in (mine, theirs))
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


@pytest.mark.parametrize("keep", [False, True])
def test_the_product_with_the_pairs_has_the_gradient_of_its_transpose(problem, keep, generator):
    batch = CellBatch.build(
        problem.counts, problem.size_factors, problem.basis, pick=np.array([0, 5, 9]), keep=keep
    )
    table = torch.rand(batch.used.numel(), 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: pair_product(batch, t), (table,))


def test_cells_of_like_size_factors_need_few_nodes_and_interpolate_as_well(problem):
    order = np.argsort(problem.size_factors)
    rows = order[10:16]
    batch = CellBatch.build(problem.counts, problem.size_factors, problem.basis, pick=rows)
    assert batch.to_own.shape[0] == batch.weights.shape[1] < problem.basis.nodes.log_nodes.numel() / 2
    log_rho = torch.from_numpy(LOG_RHO)
    at_nodes = node_softplus(problem.basis.nodes, log_rho, torch.zeros_like(log_rho))
    got = batch.weights @ (at_nodes @ batch.to_own.T).T
    want = np.log1p(problem.size_factors[rows][:, None] * np.exp(LOG_RHO))
    np.testing.assert_allclose(got, want, rtol=2 * NODE_TOLERANCE)  # to the batch's nodes, and from them


def test_building_a_batch_leaves_the_counts_alone(problem):
    before = problem.counts.copy()
    CellBatch.build(problem.counts, problem.size_factors, problem.basis)
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(problem.counts, part), getattr(before, part))

"""Cells cut out of the counts: any of them in any order, with all that belongs to them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from nbmix.core.batch import Basis
from nbmix.core.minibatch import nonzeros_log_likelihood
from nbmix.data.batches import CellBatches, CellsOnDevice, PreparedBatches, label_codes
from tests.helpers.running import small_data


@pytest.fixture(scope="module")
def data():
    data = small_data()
    prior = np.random.default_rng(0).dirichlet(np.ones(3), data.n_cells)
    return replace(data, prior=prior, labels=np.array(["b", "a", "c"])[np.arange(data.n_cells) % 3])


@pytest.fixture(scope="module")
def cells(data):
    return CellBatches(data, Basis.of(data.counts, data.size_factors))


def counts_in(batch, levels, n_genes):
    codes = batch.used[batch.pairs.indices]
    parts = levels.count[codes].numpy(), levels.gene[codes].numpy(), batch.pairs.indptr.numpy()
    return sp.csr_matrix(parts, shape=(batch.n_cells, n_genes)).toarray()


def test_codes_number_the_sorted_labels(data):
    assert label_codes(data)[:4].tolist() == [1, 0, 2, 1]
    assert label_codes(replace(data, labels=None)) is None


def test_a_batch_holds_its_cells_in_their_order(data, cells):
    rows = np.array([7, 2, 59, 0])
    batch = cells.batch(rows, 3)
    assert batch.fold == 3
    assert batch.rows.tolist() == rows.tolist()
    np.testing.assert_array_equal(
        counts_in(batch, cells.basis.levels, data.n_genes), data.counts[rows].toarray()
    )
    np.testing.assert_array_equal(batch.size_factors.numpy(), data.size_factors[rows])
    np.testing.assert_array_equal(batch.labels.numpy(), label_codes(data)[rows])
    np.testing.assert_allclose(np.exp(batch.log_prior.numpy()), data.prior[rows], rtol=1e-12)


def test_cells_on_a_device_are_cut_as_elsewhere(data, cells):
    data = replace(data, origins=np.arange(data.n_cells) % 2, origin_names=("a", "b"))
    counts = data.counts.copy()
    counts.data[counts.indptr[5] : counts.indptr[6]] = 0  # a cell without counts
    counts.eliminate_zeros()
    data = replace(data, counts=counts)
    basis = Basis.of(data.counts, data.size_factors)
    on_device, elsewhere = CellsOnDevice(data, basis, "cpu"), CellBatches(data, basis)
    generator = torch.Generator().manual_seed(0)
    log_mean, log_inv_disp = (torch.randn(3, data.n_genes, generator=generator).double() for _ in range(2))
    for rows in (np.array([7, 1, 59, 5]), np.array([2]), np.arange(0, 60, 2), np.array([], np.int64)):
        found, wanted = on_device[rows], elsewhere[rows]
        assert found.rows.tolist() == rows.tolist()
        assert found.n_cells == rows.size
        np.testing.assert_array_equal(
            counts_in(found, basis.levels, data.n_genes), counts_in(wanted, basis.levels, data.n_genes)
        )
        for name in ("size_factors", "log_prior", "labels", "origins"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
        values = [
            nonzeros_log_likelihood(log_mean - 9, log_inv_disp, batch, basis.levels)
            for batch in (found, wanted)
        ]
        torch.testing.assert_close(*values, rtol=1e-12, atol=1e-9)


def test_prepared_batches_are_made_once_in_the_order_of_their_blocks(cells):
    blocks = [(2, np.array([4, 5])), (0, np.array([0])), (1, np.array([9, 8, 7]))]
    prepared = PreparedBatches(cells, blocks)
    assert len(prepared) == 3
    assert [(batch.fold, batch.rows.tolist()) for batch in prepared] == [
        (2, [4, 5]),
        (0, [0]),
        (1, [9, 8, 7]),
    ]
    assert all(prepared[i] is batch for i, batch in enumerate(prepared.all()))


def test_batches_that_are_there_already_are_kept(cells):
    blocks = [(0, np.array([0, 1])), (1, np.array([2]))]
    first = PreparedBatches(cells, blocks[:1])
    both = PreparedBatches(cells, blocks)
    both.made = list(first.all())
    assert both[0] is first[0]
    assert both[1].rows.tolist() == [2]

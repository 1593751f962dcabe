"""Cells cut out of the counts: any of them in any order, with all that belongs to them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from nbmix.core.batch import Basis
from nbmix.data.batches import CellBatches, PreparedBatches, label_codes
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

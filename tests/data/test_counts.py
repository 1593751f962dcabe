"""Cells and genes are selected with all that belongs to them."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from nbmix.data.counts import CountData, some_rows

X = np.array([[1, 0, 2], [0, 0, 0], [3, 4, 0], [0, 5, 0]], np.float32)
CELLS, GENES = np.array(["c0", "c1", "c2", "c3"]), np.array(["g0", "g1", "g2"])


@pytest.fixture
def data():
    obs, var = (
        pd.DataFrame({"number": range(4)}, index=CELLS),
        pd.DataFrame({"number": range(3)}, index=GENES),
    )
    return CountData(
        sp.csr_matrix(X),
        X.sum(1).astype(float),
        CELLS,
        GENES,
        labels=np.array(["a", "b", "a", "b"]),
        prior=np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]]),
        gene_symbols=np.array(["G0", "G1", "G2"]),
        annotations=ad.AnnData(obs=obs, var=var),
    )


def test_shape_and_empty_cells(data):
    assert (data.n_cells, data.n_genes) == (4, 3)
    assert data.empty_cells.tolist() == [False, True, False, False]
    assert data.gene_labels.tolist() == ["G0", "G1", "G2"]
    assert replace(data, gene_symbols=None).gene_labels.tolist() == ["g0", "g1", "g2"]
    assert not data.is_backed
    assert data.load() is data


def test_cells(data):
    some = data.select_cells(np.array([3, 0, 2]))
    np.testing.assert_array_equal(some.counts.toarray(), X[[3, 0, 2]])
    assert some.size_factors.tolist() == [5, 3, 7]
    assert some.cell_names.tolist() == ["c3", "c0", "c2"]
    assert some.labels.tolist() == ["b", "a", "a"]
    assert some.prior[:, 0].tolist() == [0.4, 0.1, 0.3]
    assert some.annotations.obs["number"].tolist() == [3, 0, 2]
    assert some.gene_names.tolist() == GENES.tolist()


def test_positions_are_those_in_the_whole(data):
    assert data.positions is data.n_whole is None
    twice = data.select_cells(np.array([3, 0, 2])).select_cells(np.array([0, 2]))
    assert (twice.positions.tolist(), twice.n_whole) == ([3, 2], 4)
    assert twice.cell_names.tolist() == ["c3", "c2"]


def test_genes(data):
    some = data.select_genes(np.array([2, 0]))
    np.testing.assert_array_equal(some.counts.toarray(), X[:, [2, 0]])
    assert some.counts.has_canonical_format
    assert some.gene_names.tolist() == ["g2", "g0"]
    assert some.gene_labels.tolist() == ["G2", "G0"]
    assert some.annotations.var["number"].tolist() == [2, 0]
    assert some.size_factors.tolist() == data.size_factors.tolist()
    assert some.empty_cells.tolist() == [False, True, False, True]


def test_some_rows_are_all_or_a_choice_in_their_order():
    rows = np.arange(10, 40)
    assert some_rows(rows, 30) is rows
    some = some_rows(rows, 7)
    assert len(set(some)) == 7 and set(some) < set(rows)
    assert (np.diff(some) > 0).all()
    np.testing.assert_array_equal(some, some_rows(rows, 7))

"""Counts from arrays in memory."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from nbmix.data.from_arrays import each_cell, make_array_data
from nbmix.errors import InputError

X = np.array([[1, 0, 2], [0, 0, 3]])


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_array, sp.coo_matrix, sp.lil_array])
def test_forms(form):
    data = make_array_data(form(X))
    assert data.counts.toarray().tolist() == X.tolist()  # the silent gene is kept
    assert data.size_factors.tolist() == [3, 3]
    assert (data.cell_names.tolist(), data.gene_names.tolist()) == (["0", "1"], ["0", "1", "2"])
    assert data.labels is None


def test_names_and_size_factors():
    data = make_array_data(X, cell_names=["a", "b"], gene_names=[5, 6, 7], size_factors=[1.0, 2.0])
    assert (data.cell_names.tolist(), data.gene_names.tolist()) == (["a", "b"], ["5", "6", "7"])
    assert data.size_factors.tolist() == [1, 2]


def test_what_is_none_of_a_count():
    with pytest.raises(InputError, match=r"^counts: X holds fractional values"):
        make_array_data(X * 0.5)


def test_one_number_for_all_cells():
    assert each_cell(2, 3).tolist() == [2, 2, 2]
    with pytest.raises(InputError, match="size_factors holds 2 values for 3 cells"):
        each_cell([1, 2], 3)

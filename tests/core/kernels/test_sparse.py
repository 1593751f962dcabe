"""Patterns of sparse matrices against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from nbmix.core.csr import CsrMatrix
from nbmix.core.kernels.sparse import compact_columns
from tests.helpers.elsewhere import back, elsewhere


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (40, 17), (17, 40)])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_the_transpose_is_that_of_scipy_on_any_device(shape, kind):
    matrix = sp.csr_matrix(np.random.default_rng(0).random(shape) < 0.2, dtype=np.float32)
    indptr, indices = (torch.from_numpy(v).to(kind) for v in (matrix.indptr, matrix.indices))
    here = CsrMatrix(indptr, indices, shape[1]).transposed()
    there = CsrMatrix(elsewhere(indptr), elsewhere(indices), shape[1]).transposed()
    want = matrix.T.tocsr()
    want.sort_indices()
    for got in (here, there):
        assert (got.n_rows, got.n_columns) == (shape[1], shape[0])
        assert got.indptr.dtype == got.indices.dtype == kind
        np.testing.assert_array_equal(back(got.indptr), want.indptr)
        np.testing.assert_array_equal(back(got.indices), want.indices)


@pytest.mark.parametrize("size", [0, 1, 200])
def test_compacted_columns_are_numbered_in_their_order(size):
    columns = np.random.default_rng(0).integers(0, 90, size).astype(np.int32)
    used, position = np.unique(columns, return_inverse=True)
    compact = columns.copy()
    np.testing.assert_array_equal(compact_columns(compact, np.zeros(90, np.int32)), used)
    np.testing.assert_array_equal(compact, position)

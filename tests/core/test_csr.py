from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from nbmix.core.csr import CsrMatrix
from tests.helpers.pairs import csr

MATRICES = {
    "plain": [[1, 0, 2], [0, 3, 0], [4, 5, 6]],
    "empty rows at both ends and between": [[0, 0, 0], [1, 2, 0], [0, 0, 0], [0, 0, 7], [0, 0, 0]],
    "no entries": [[0, 0], [0, 0], [0, 0]],
    "one row": [[0, 9, 0, 1]],
    "one column": [[0], [3], [1]],
}


def ones(rows):
    """The pattern of ``rows``, as SciPy's matrix and as ours."""
    matrix = csr(np.asarray(rows) > 0)
    return matrix, CsrMatrix(
        torch.from_numpy(matrix.indptr), torch.from_numpy(matrix.indices), matrix.shape[1]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("name", MATRICES)
def test_matmul_is_the_dense_product(name, width, dtype):
    matrix, wrapped = ones(MATRICES[name])
    dense = torch.from_numpy(np.random.default_rng(0).normal(size=(matrix.shape[1], width))).to(dtype)
    got = wrapped.matmul(dense)
    assert got.dtype == dtype
    assert got.shape == (matrix.shape[0], width)
    want = matrix.toarray().astype(float) @ dense.double().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


def test_float64_matmul_keeps_what_float32_would_lose():
    got = ones([[1, 1, 1]])[1].matmul(torch.tensor([[1e9], [1.0], [-1e9]], dtype=torch.float64))
    assert got.item() == 1.0


def test_matmul_rejects_a_dense_matrix_of_other_height():
    with pytest.raises(ValueError, match="3 columns times 2 rows"):
        ones([[1, 2, 3]])[1].matmul(torch.ones(2, 1))


@pytest.mark.parametrize("name", MATRICES)
def test_transposed_is_the_transpose_of_the_ones(name):
    matrix, wrapped = ones(MATRICES[name])
    turned = wrapped.transposed()
    assert (turned.n_rows, turned.n_columns) == matrix.shape[::-1]
    eye = torch.eye(matrix.shape[0], dtype=torch.float64)
    np.testing.assert_array_equal(turned.matmul(eye), matrix.toarray().T)


def test_the_first_product_of_a_process_prints_no_warning():
    """torch announces once a process that CSR tensors are in beta: nobody here asked for them."""
    program = (
        "import numpy, torch\n"
        "from nbmix.likelihood import component_log_likelihood\n"
        "component_log_likelihood(numpy.eye(3), 1.0, torch.zeros(2, 3), torch.zeros(2, 3))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

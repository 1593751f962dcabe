"""Counts of any container and type in canonical form, and what is no count."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from nbmix.core.raw_counts import check_counts
from nbmix.errors import InputError
from tests.helpers.files import assert_canonical

DENSE = np.array([[0, 2, 1, 0], [3, 0, 0, 0], [0, 0, 5, 0]])


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "make", [np.array, sp.csr_matrix, sp.csc_matrix, sp.coo_matrix, sp.csr_array, sp.lil_array]
)
@pytest.mark.parametrize("dtype", ["u1", "i4", "i8", "u8", "f4", "f8"])
def test_every_container_and_type_gives_the_same(make, dtype):
    counts = check_counts(make(DENSE.astype(dtype)), "X")
    assert_canonical(counts)
    np.testing.assert_array_equal(counts.toarray(), DENSE)


@pytest.mark.parametrize("dtype", ["f2", ">f4", ">i4"])
def test_dense_types_that_no_sparse_matrix_takes(dtype):
    np.testing.assert_array_equal(check_counts(DENSE.astype(dtype), "X").toarray(), DENSE)


def test_disorder_is_mended_and_the_input_left_alone():
    data, indices, indptr = np.array([1, 0, 2, 3.0]), np.array([2, 1, 0, 2]), np.array([0, 4])
    x = sp.csr_matrix((data, indices.copy(), indptr), shape=(1, 4))
    counts = check_counts(x, "X")
    assert_canonical(counts)
    np.testing.assert_array_equal(counts.toarray(), [[2, 0, 4, 0]])
    np.testing.assert_array_equal(x.indices, indices)
    assert x.nnz == 4


@pytest.mark.parametrize(
    "make", [sp.coo_matrix, lambda t, shape: sp.csr_matrix((t[0], t[1][1], [0, 2]), shape)]
)
def test_duplicates_do_not_overflow_a_small_type(make):
    x = make((np.array([200, 100], dtype=np.uint8), ([0, 0], [1, 1])), (1, 2))
    assert check_counts(x, "X").toarray().tolist() == [[0, 300]]


def test_canonical_counts_are_not_copied():
    x = check_counts(DENSE, "X")
    assert np.shares_memory(check_counts(x, "X").data, x.data)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (-1.0, "negative values (first: -1.0"),
        (0.5, "fractional values (first: 0.5"),
        (np.nan, "NaN (first: nan"),
        (np.inf, "infinite values (first: inf"),
        (2.0**24 + 2, "values above 2**24, which float32 cannot hold exactly (first: 16777218.0"),
    ],
)
@pytest.mark.parametrize("make", [np.array, sp.csr_matrix, sp.csc_matrix])
def test_bad_values_are_located(make, value, what):
    x = DENSE.astype(float)
    x[2, 1] = value
    with pytest.raises(InputError) as error:
        check_counts(make(x), "data.path=f: X", cells=["c0", "c1", "c2"], genes=["g0", "CD74", "g2", "g3"])
    assert (
        one_line(error) == f"data.path=f: X holds {what} at cell 'c2', gene 'CD74'); nbmix needs raw counts"
    )


def test_the_largest_exact_count_passes_and_positions_stand_in_for_names():
    assert check_counts(np.array([[2**24]]), "X").data[0] == 2**24
    with pytest.raises(InputError, match="at cell 0, gene 1"):
        check_counts(np.array([[0, -1]]), "X")


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (np.ones(3), "has shape (3,)"),
        (np.ma.masked_equal(DENSE, 0), "has masked values"),
        (np.ones((0, 3)), "has no cells"),
        (sp.csr_matrix((3, 0)), "has no genes"),
        (np.array([["a", "b"]]), "holds values of type <U1"),
        (np.ones((2, 2), dtype=bool), "holds values of type bool"),
        (np.ones((2, 2), dtype=complex), "holds values of type complex128"),
        (pd.DataFrame([[1]]), "is a DataFrame"),
    ],
)
def test_bad_matrices(x, what):
    with pytest.raises(InputError) as error:
        check_counts(x, "adata: X")
    assert one_line(error).startswith(f"adata: X {what}")


def test_other_matrices_are_proposed_that_hold_counts():
    def cannot_be_read():
        raise OSError

    others = {
        "data.layer=a": lambda: DENSE,
        "data.layer=b": lambda: DENSE / 4,
        "data.layer=c": cannot_be_read,
    }
    with pytest.raises(InputError) as error:
        check_counts(DENSE / 2, "X", alternatives=others | {"data.layer=d": lambda: sp.csr_matrix(DENSE)})
    assert one_line(error).endswith("nbmix needs raw counts: set data.layer=a or data.layer=d")

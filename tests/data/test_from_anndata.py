from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from nbmix.data.from_anndata import check_counts, make_count_data
from nbmix.errors import InputError

DENSE = np.array([[0, 2, 1, 0], [3, 0, 0, 0], [0, 0, 5, 0]])  # the last gene is silent


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def example(x=DENSE, **kwargs) -> ad.AnnData:
    x = np.asarray(x)
    return ad.AnnData(
        sp.csr_matrix(x),
        obs=pd.DataFrame(
            {"cell_type": ["a", "b", "a"], "total": [10.0, 20.0, 30.0]}, index=["cell0", "cell1", "cell2"]
        ),
        var=pd.DataFrame(index=["CD3", "CD4", "CD74", "CD8"]),
        **kwargs,
    )


def assert_canonical(x: sp.csr_matrix) -> None:
    assert type(x) is sp.csr_matrix
    assert x.dtype == np.float32
    assert x.indices.dtype == x.indptr.dtype == np.int32
    assert x.has_canonical_format
    assert x.data.all()


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


def test_count_data_of_a_good_matrix():
    adata = example()
    before = adata.copy()
    data = make_count_data(adata, where="adata")
    assert_canonical(data.counts)
    np.testing.assert_array_equal(data.counts.toarray(), DENSE[:, :3])
    np.testing.assert_array_equal(data.size_factors, [3, 3, 5])
    assert data.size_factors.dtype == np.float64
    assert data.labels is not None
    assert data.labels.tolist() == ["a", "b", "a"]
    assert data.gene_names.tolist() == ["CD3", "CD4", "CD74"]
    assert data.cell_names.tolist() == ["cell0", "cell1", "cell2"]
    assert data.prior is None
    assert (adata.X != before.X).nnz == 0


def test_gene_filter_comes_after_the_row_sums():
    data = make_count_data(example(), where="adata", min_counts=3)
    assert data.gene_names.tolist() == ["CD3", "CD74"]
    assert data.size_factors.tolist() == [3, 3, 5]


def test_layer_and_size_factor_column():
    adata = example(DENSE / 2, layers={"counts": DENSE})
    data = make_count_data(adata, where="adata", layer="counts", size_factor_key="total")
    np.testing.assert_array_equal(data.counts.toarray(), DENSE[:, :3])
    assert data.size_factors.tolist() == [10, 20, 30]


def test_fractional_values_point_to_the_layers_with_counts():
    adata = example(DENSE / 2, layers={"log": np.log1p(DENSE), "counts": DENSE, "spliced": DENSE})
    with pytest.raises(InputError) as error:
        make_count_data(adata, where="adata")
    assert one_line(error).endswith(
        "at cell 'cell0', gene 'CD74'); nbmix needs raw counts: set data.layer=counts or data.layer=spliced"
    )


def test_labels_are_optional_by_default_only():
    adata = example()
    assert make_count_data(adata, where="adata", label_key=None).labels is None
    numbers = make_count_data(adata, where="adata", label_key="total").labels
    assert numbers is not None
    assert numbers.tolist() == ["10.0", "20.0", "30.0"]
    del adata.obs["cell_type"]
    assert make_count_data(adata, where="adata").labels is None


def test_categorical_labels_become_strings():
    adata = example()
    adata.obs["cell_type"] = adata.obs["cell_type"].astype("category")
    labels = make_count_data(adata, where="adata").labels
    assert labels is not None
    assert labels.dtype.kind == "U"


def bad_prior(rows, **kwargs) -> ad.AnnData:
    return example(obsm={"w": np.asarray(rows, **kwargs)})


def with_obs(column: str, values: list) -> ad.AnnData:
    adata = example()
    adata.obs[column] = values
    return adata


@pytest.mark.parametrize(
    ("adata", "settings", "what"),
    [
        (example(), {"layer": "raw"}, "no layer 'raw'; set data.layer to one of its layers (none)"),
        (example(layers={"c": DENSE}), {"layer": "raw"}, "one of its layers (c)"),
        (ad.AnnData(obs=pd.DataFrame(index=["a"]), var=pd.DataFrame(index=["g"])), {}, "adata: X is missing"),
        (
            example(),
            {"label_key": "kind"},
            "obs has no column 'kind'; set data.label_key to one of its columns (cell_type, total)",
        ),
        (
            with_obs("cell_type", ["a", None, np.nan]),
            {},
            "obs['cell_type'] misses the label of 2 of 3 cells",
        ),
        (example(), {"size_factor_key": "depth"}, "no column 'depth'; set data.size_factor_key"),
        (example(), {"size_factor_key": "cell_type"}, "obs['cell_type'] holds values of type object"),
        (with_obs("s", [True, True, False]), {"size_factor_key": "s"}, "obs['s'] holds values of type bool"),
        (
            with_obs("s", [1, 0, 1]),
            {"size_factor_key": "s"},
            "obs['s'] is 0.0 at cell 'cell1' (1 such cells)",
        ),
        (with_obs("s", [1, 1, -2]), {"size_factor_key": "s"}, "obs['s'] is -2.0 at cell 'cell2'"),
        (with_obs("s", [np.nan, 1, 1]), {"size_factor_key": "s"}, "obs['s'] is nan at cell 'cell0'"),
        (with_obs("s", [1, np.inf, 1]), {"size_factor_key": "s"}, "obs['s'] is inf at cell 'cell1'"),
        (example(), {"prior_key": "w"}, "obsm has no entry 'w'"),
        (
            bad_prior([[0.5, 0.5], [1, 0], [2, -1]]),
            {"prior_key": "w"},
            "negative weights (first: cell 'cell2')",
        ),
        (bad_prior([[0.5, 0.5], [1, np.nan], [1, 0]]), {"prior_key": "w"}, "NaN or infinite weights"),
        (bad_prior([[0.5, 0.6], [1, 0], [1, 0]]), {"prior_key": "w"}, "rows that do not sum to 1"),
        (bad_prior(np.ones((3, 1, 2))), {"prior_key": "w"}, "has shape (3, 1, 2)"),
        (bad_prior([["x", "y"]] * 3), {"prior_key": "w"}, "does not hold numbers"),
        (example(), {"min_counts": -1}, "data.min_counts=-1: must be 0 or more"),
        (example(), {"min_counts": 7}, "no gene has data.min_counts=7 counts (the largest total is 6)"),
        (example(np.zeros((3, 4))), {}, "adata: every cell is empty"),
    ],
)
def test_bad_fields(adata, settings, what):
    with pytest.raises(InputError) as error:
        make_count_data(adata, where="adata", **settings)
    assert what in one_line(error)


def test_prior_is_renormalised():
    for prior in (
        np.array([[0.5, 0.5004], [1, 0], [0.2, 0.8]]),
        sp.csr_matrix([[0.5, 0.5], [1, 0], [0.2, 0.8]]),
    ):
        data = make_count_data(example(obsm={"w": prior}), where="adata", prior_key="w")
        assert data.prior is not None
        np.testing.assert_allclose(data.prior.sum(axis=1), 1, rtol=1e-15)


def test_empty_cells_are_kept_and_reported(caplog):
    x = DENSE.copy()
    x[1] = 0
    with caplog.at_level(logging.WARNING):
        data = make_count_data(example(x), where="adata")
    assert data.size_factors.tolist() == [3, 0, 5]
    assert data.empty_cells.tolist() == [False, True, False]
    assert "1 of 3 cells have no counts" in caplog.text
    adata = example(x)
    adata.obs["s"] = [1, 0, 1]
    assert make_count_data(adata, where="adata", size_factor_key="s").size_factors.tolist() == [1, 0, 1]


def test_repeated_gene_names_are_numbered(caplog):
    adata = example()
    adata.var_names = ["CD3", "CD3", "CD3-1", "CD8"]
    data = make_count_data(adata, where="adata")
    assert data.gene_names.tolist() == ["CD3", "CD3-2", "CD3-1"]
    assert adata.var_names[1] == "CD3"
    assert "1 gene names are repeated" in caplog.text

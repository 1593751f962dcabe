from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from nbmix.data.from_anndata import make_count_data
from nbmix.errors import InputError
from tests.helpers.files import assert_canonical

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


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_counts_that_are_yet_to_be_computed(form):
    """As anndata's lazy readers give them."""
    array = pytest.importorskip("dask.array")
    adata = example()
    adata.X = array.from_array(DENSE, chunks=(2, -1)).map_blocks(form)
    data = make_count_data(adata, where="adata", min_counts=0)
    np.testing.assert_array_equal(data.counts.toarray(), DENSE)

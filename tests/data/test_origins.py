"""Columns of obs that say which batch a cell comes from."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import nbmix
from nbmix.data.from_anndata import make_count_data
from nbmix.data.origins import check_origins, has_columns, read_origins
from nbmix.errors import InputError

OBS = pd.DataFrame(
    {
        "donor": ["b", "a", "b", "a"],
        "run": pd.Categorical([2, 1, 1, 1]),
        "lane": [1.0, 2.0, 1.0, 2.0],
        "age": [1.5, 2.0, 3.0, 4.0],
        "holes": ["a", None, "b", "a"],
    }
)


def cells(batches, n=40):
    adata = ad.AnnData(nbmix.simulate(n=n, p=20, k=2, seed=1).counts)
    adata.obs["batch"] = batches
    return make_count_data(adata, where="adata", label_key=None, batch_key="batch")


@pytest.mark.parametrize(
    ("key", "codes", "names"),
    [
        ("donor", [1, 0, 1, 0], ("a", "b")),
        ("run", [1, 0, 0, 0], ("1", "2")),
        ("lane", [0, 1, 0, 1], ("1", "2")),
        (["donor", "run"], [2, 0, 1, 0], ("a | 1", "b | 1", "b | 2")),
    ],
)
def test_batches_are_values_of_a_column_or_what_columns_combine_to(key, codes, names):
    found, found_names = read_origins(OBS, "adata", key)
    assert (found.tolist(), found_names) == (codes, names)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("plate", r"no column 'plate'; set data.batch_key to one of its columns \(donor, run"),
        ("age", r"measured numbers \(such as 1.5\)"),
        ("holes", "misses the batch of 1 of 4 cells"),
        ([], "data.batch_key is empty"),
    ],
)
def test_columns_that_are_none_of_batches(key, message):
    with pytest.raises(InputError, match=message):
        read_origins(OBS, "adata", key)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (["a"] * 40, "all 40 cells are of one batch, 'a'"),
        (["a"] * 20 + ["b"] * 19 + ["c"], r"1 of 3 batches have a single cell \(such as 'c'\)"),
        ([str(i // 2) for i in range(40)], "makes 20 batches of 40 cells"),
        ([str(i) for i in range(40)], "makes 40 batches of 40 cells"),
    ],
)
def test_batches_that_cannot_be_fitted(batches, message):
    with pytest.raises(InputError, match=message):
        check_origins(cells(batches))


def test_cells_keep_their_batches():
    data = cells(["a", "b"] * 20)
    check_origins(data)
    assert data.origin_cells.tolist() == [20, 20]
    some = data.select_cells(np.array([1, 3, 4]))
    assert (some.origins.tolist(), some.origin_names) == ([1, 1, 0], ("a", "b"))


def test_columns_that_are_there():
    assert has_columns(OBS, ["donor", "run"]) and has_columns(OBS, None)
    assert not has_columns(OBS, ["donor", "plate"])

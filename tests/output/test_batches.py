"""Groups against batches."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nbmix.output.batches import groups_of_one_batch, splitting_columns


def test_groups_that_come_from_one_batch_nearly_alone():
    table = pd.DataFrame({"a": [50, 99, 5], "b": [50, 1, 0]})  # the last one is too small
    (found,) = groups_of_one_batch(table)
    assert (found.group, found.batch) == (1, "a")
    assert found.line.startswith("Group 1: 99% of its cells are of batch a, which has 75% of all cells.")


def test_a_batch_of_nearly_all_cells_has_most_of_any_group():
    assert groups_of_one_batch(pd.DataFrame({"a": [970, 960], "b": [30, 40]})) == []


@pytest.fixture
def cells():
    """One kind is cut in two by batch, the other is not."""
    batch = np.tile(["x", "y"], 100)
    kind = np.repeat(["t", "b"], 100)
    groups = np.where(kind == "t", (batch == "y").astype(int), 2)
    return batch, kind, groups


def test_a_column_that_cuts_a_kind_is_named(cells):
    batch, kind, groups = cells
    obs = pd.DataFrame({"kind": kind, "plate": batch, "id": np.arange(200)})
    (found,) = splitting_columns(obs, groups, [(0, 1), (1, 2)])
    assert (found.column, found.groups) == ("plate", (0, 1))
    assert found.line.startswith("obs['plate'] tells groups 0 and 1 apart")
    assert "as the batch key (data.batch_key" in found.line


def test_a_column_of_kinds_is_not(cells):
    _, _, groups = cells
    obs = pd.DataFrame({"kind": groups.astype(str)})
    assert splitting_columns(obs, groups, [(0, 1), (1, 2)]) == []

"""The groups that an AnnData holds, as files and selections of cells leave them."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from nbmix.errors import InputError
from nbmix.output.grouping import Grouping, with_labels, write_grouping, write_probabilities
from tests.helpers.clustered import clustered


def many_groups(n_groups=12):
    """Fields as of a fit of 12 groups, in the alphabetical order in which files give them back."""
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.full(n_groups, 0.1), 60)
    adata = ad.AnnData(obs=pd.DataFrame(index=[f"c{i}" for i in range(60)]))
    write_probabilities(adata, "nbmix", q, [str(k) for k in range(n_groups)])
    groups = {label: str(int(label) + 20) for label in sorted(map(str, range(n_groups)))}
    adata.uns["nbmix"] = {"provenance": "{}", "groups": groups}
    return adata


def test_labels_are_in_the_order_of_the_columns():
    grouping = Grouping.of(many_groups(), "nbmix")
    assert grouping.labels == tuple(map(str, range(12)))
    assert list(grouping.components.items())[10] == ("10", "30")
    np.testing.assert_array_equal(grouping.codes, many_groups().obs["nbmix"].cat.codes)


def test_a_selection_of_cells_has_all_groups_still():
    adata = clustered()
    some = adata[adata.obs["nbmix"] == "2"].copy()
    assert some.obs["nbmix"].cat.categories.tolist() == ["2"]
    grouping = Grouping.of(some, "nbmix")
    assert grouping.labels == ("0", "1", "2", "3")
    assert set(grouping.codes) == {2}


def test_what_is_written_is_read():
    adata = many_groups(3)
    before = Grouping.of(adata, "nbmix")
    labels = ["b", "10", "a"]
    write_grouping(adata, before, before.probabilities, labels, None, extra=1)
    after = Grouping.of(adata, "nbmix")
    assert after.labels == tuple(labels)
    assert after.components is None
    assert adata.uns["nbmix"]["extra"] == 1
    assert "groups" not in adata.uns["nbmix"]


def test_fields_that_do_not_fit_together():
    adata = many_groups(3)
    adata.obsm["X_nbmix"] = adata.obsm["X_nbmix"][:, :2]
    with pytest.raises(InputError, match="are not of the same groups; run the function that wrote"):
        Grouping.of(adata, "nbmix")


def test_the_fit_of_a_grouping():
    adata = many_groups(3)
    for key in ("nbmix_groups", "own"):
        write_probabilities(adata, key, adata.obsm["X_nbmix"], ["0", "1", "2"])
        adata.uns[key] = {"0": "20", "1": "21", "2": "22"}
        assert Grouping.of(adata, key).fit == "nbmix"
    adata.uns["nbmix_b"] = {"provenance": "{}"}
    assert Grouping.of(adata, "nbmix_groups").fit == "nbmix"
    with pytest.raises(InputError, match=r"^uns\['own'\] does not say which fit .* there are nbmix, nbmix_b"):
        Grouping.of(adata, "own")


def test_positions_by_labels():
    table = with_labels(pd.DataFrame({"nearest": [1, -1, 0]}), ["a", "b"], ["nearest", "other"])
    assert table["nearest"].astype(object).where(table["nearest"].notna(), None).tolist() == ["b", None, "a"]

"""Components joined to groups: what a fit knows of it, and groups in an AnnData."""

from __future__ import annotations

import json
from itertools import pairwise

import anndata as ad
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

import nbmix
from nbmix.core.joins import Join, JoinTree, PairSeparation
from nbmix.errors import InputError
from nbmix.output.groups import how_many, joins_table, kept_labels, separations_table

TREE = JoinTree(
    (
        Join(3, (0,), (2,), 1.5, 0.2, 0.7, 10),
        Join(2, (0, 2), (1,), 8.0, 0.0, 1e-9, 20),
    ),
    (((0, 1, 2),), ((0, 2), (1,)), ((1,), (2,), (0,))),
)


@pytest.fixture(scope="module")
def adata():
    """Two kinds, of which eight components are joined to two groups."""
    cells = nbmix.simulate(n=300, p=120, k=2, seed=3)
    adata = ad.AnnData(cells.counts)
    adata.obs["kind"] = cells.labels
    nbmix.cluster(adata, 2, start="kmeans")
    return adata


def test_a_table_of_joins():
    table = joins_table(TREE)
    assert table["first"].tolist() == ["0", "0+2"]
    assert table["second"].tolist() == ["2", "1"]
    assert table["gap"].tolist() == [False, True]
    assert table["n_groups"].tolist() == [3, 2]


def test_what_speaks_for_a_number():
    said = how_many(TREE, 2)
    assert said == (
        "2 groups: the next join, to 1, is of a gap (p = 1e-09); the next split, to 3, is of no gap "
        "(p = 0.7); gaps alone make 2"
    )
    unsure = JoinTree((TREE.joins[0]._replace(p_value=0.05), TREE.joins[1]), TREE.cuts)
    assert how_many(unsure, 2).endswith("; gaps alone make 2; nearly as good: 3")
    assert how_many(unsure, 3).endswith("is of no gap (p = 0.05); gaps alone make 2; nearly as good: 2")


def test_a_table_of_separations():
    table = separations_table([PairSeparation(0, 1, 5.0, 1e-3, 30)], 0.01)
    assert table.to_dict("records") == [
        {"first": 0, "second": 1, "separation": 5.0, "p_value": 1e-3, "n_cells": 30, "gap": True}
    ]
    assert list(separations_table([], 0.01)) == list(table)


def test_components_of_one_kind_are_joined_and_kinds_are_not(adata):
    assert adata.obsm["X_nbmix_components"].shape == (300, 8)
    for groups in (adata.obs["nbmix"], nbmix.regroup(adata, copy=True).obs["nbmix_groups"]):
        assert adjusted_rand_score(adata.obs["kind"], groups) == 1


@pytest.mark.parametrize("n_groups", [1, 2, 3])
def test_groups_are_sums_of_components(adata, n_groups):
    found = nbmix.regroup(adata, n_groups, key_added="some", copy=True)
    assert "some" not in adata.obs
    q, of_components = found.obsm["X_some"], adata.obsm["X_nbmix_components"]
    assert q.shape == (300, n_groups)
    np.testing.assert_allclose(q.sum(1), 1)
    for column, label in enumerate(found.obs["some"].cat.categories):
        members = [int(k) for k in found.uns["some"][label].split("+")]
        np.testing.assert_allclose(q[:, column], of_components[:, members].sum(1))
    np.testing.assert_array_equal(found.obs["some"].cat.codes, q.argmax(1))
    np.testing.assert_array_equal(found.obs["some_probability"], q.max(1))


def test_as_many_groups_as_in_the_fit_are_those_of_the_fit(adata):
    found = nbmix.regroup(adata, 2, copy=True)
    np.testing.assert_array_equal(found.obs["nbmix_groups"], adata.obs["nbmix"])
    np.testing.assert_allclose(found.obsm["X_nbmix_groups"], adata.obsm["X_nbmix"])
    assert found.uns["nbmix_groups"] == adata.uns["nbmix"]["groups"]


def test_groups_keep_their_labels_where_one_is_split(adata):
    found = nbmix.regroup(adata, 3, copy=True)
    both = found.obs["nbmix"].astype(str) + ">" + found.obs["nbmix_groups"].astype(str)
    assert set(both) in ({"0>0", "0>2", "1>1"}, {"0>0", "1>1", "1>2"})


@pytest.mark.parametrize(
    ("groups", "earlier", "labels"),
    [
        ([0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0]),
        ([0, 1, 1, 2], [0, 0, 0, 1], [2, 0, 1]),  # 0 is split, and its larger part keeps its label
        ([0, 0, 0, 0], [0, 0, 1, 2], [0]),
        ([0, 0, 2, 2], [0, 0, 1, 1], [0, 2, 1]),  # one without cells
    ],
)
def test_labels_that_are_kept(groups, earlier, labels):
    n_groups, n_earlier = max(groups) + 1, max(earlier) + 1
    assert kept_labels(np.array(groups), np.array(earlier), n_groups, n_earlier) == labels


def test_every_pair_of_groups_has_a_separation(adata):
    (pair,) = adata.uns["nbmix"]["separations"].to_dict("records")
    assert (pair["first"], pair["second"], pair["gap"]) == (0, 1, True)
    smaller = adata.obs["nbmix"].value_counts().min()
    assert abs(pair["n_cells"] - smaller) <= 2  # cells between copies


def test_labels_of_groups_that_were_left_out_are_not_given_to_others(adata):
    some = adata[adata.obs["nbmix"] == "0"].copy()
    found = nbmix.regroup(some, 3, copy=True)
    assert "1" not in set(found.obs["nbmix_groups"])


def test_what_cannot_be_regrouped(adata):
    for taken in ("nbmix", "nbmix_components"):
        with pytest.raises(InputError, match=f"^key_added={taken}: is what the fit itself has written"):
            nbmix.regroup(adata, 2, key_added=taken)
    some = adata.copy()
    some.uns["nbmix_groups"] = some.uns["nbmix"]
    with pytest.raises(InputError, match=r"^key_added=nbmix_groups: is another fit"):
        nbmix.regroup(some, 2)
    del some.obsm["X_nbmix_components"]
    with pytest.raises(InputError, match=r"^adata: lacks obsm\['X_nbmix_components'\]"):
        nbmix.regroup(some, 2)
    with pytest.raises(InputError, match=r"^adata is a list; give the AnnData of a fit"):
        nbmix.regroup([1], 2)


def test_as_many_groups_as_were_asked_for_although_fewer_have_cells():
    adata = ad.AnnData(nbmix.simulate(n=150, p=60, k=3, seed=1).counts)
    nbmix.cluster(adata, 12)
    n_groups = len(adata.uns["nbmix"]["groups"])
    assert n_groups == 12
    found = nbmix.regroup(adata, 12, copy=True)
    np.testing.assert_allclose(found.obsm["X_nbmix_groups"], adata.obsm["X_nbmix"])


def test_cuts_are_nested(adata):
    cuts = json.loads(adata.uns["nbmix"]["cuts"])
    for fewer, more in pairwise(cuts):
        assert all(any(set(group) <= set(whole) for whole in fewer) for group in more)


def test_it_goes_through_a_file(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    again = ad.read_h5ad(tmp_path / "cells.h5ad")
    found = [nbmix.regroup(one, "auto", copy=True).obs["nbmix_groups"].tolist() for one in (adata, again)]
    assert found[0] == found[1]


@pytest.mark.parametrize("n_groups", [0, 9, "many", 1.5])
def test_so_many_groups_are_not_to_be_had(adata, n_groups):
    with pytest.raises(InputError, match=rf"^n_groups={n_groups}: this fit can be cut into 1 to \d groups"):
        nbmix.regroup(adata, n_groups)


def test_a_fit_without_joins():
    adata = ad.AnnData(nbmix.simulate(n=100, p=60, k=2, seed=1).counts)
    nbmix.cluster(adata, 2, start="kmeans", folds=1)
    assert "joins" not in adata.uns["nbmix"]
    with pytest.raises(InputError, match=r"holds no joins of components; run nbmix.cluster with folds"):
        nbmix.regroup(adata, 2)


def test_a_mixture_is_cut(tmp_path):
    cells = nbmix.simulate(n=300, p=120, k=2, seed=3)
    mixture = nbmix.NBMixture(5, start="kmeans").fit(cells.counts)
    groups = mixture.cut(2)
    assert adjusted_rand_score(cells.labels, groups.argmax(1)) == 1
    assert groups.argmax(1).tolist().count(0) >= 150  # 0 is the largest
    assert mixture.joins_["n_groups"].is_monotonic_decreasing
    mixture.save(tmp_path / "five.ckpt")
    loaded = nbmix.NBMixture.load(tmp_path / "five.ckpt")
    np.testing.assert_allclose(loaded.cut(2, cells.counts), mixture.cut(2, cells.counts))
    np.testing.assert_allclose(loaded.weights_, mixture.weights_)
    with pytest.raises(InputError, match="does not know the cells of its fit; give X"):
        loaded.cut(2)
    for bad in (20, None, 2.0, True):
        with pytest.raises(InputError, match=f"^n_groups={bad}: this fit can be cut into 1 to"):
            mixture.cut(bad)
    assert mixture.cut("auto").shape == (300, 2)
    assert loaded.components_per_group == "auto"

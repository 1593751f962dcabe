"""One group clustered again in its place."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

import nbmix
from nbmix.errors import InputError
from tests.helpers.clustered import clustered, read_back, unlike_kinds
from tests.helpers.origins import BatchedCells

FAST = {"start": "kmeans", "folds": 3}


@pytest.fixture(scope="module")
def mixed():
    """Two of the four kinds are one group, "both"."""
    adata = clustered()
    nbmix.merge(adata, ["1", "3"], name="both")
    assert unlike_kinds(adata) > 50
    return adata


@pytest.fixture(scope="module")
def parted(mixed):
    return nbmix.recluster(mixed, "both", 2, copy=True, **FAST)


def test_kinds_of_a_group_are_told_apart(mixed, parted):
    assert adjusted_rand_score(parted.obs["nbmix"], parted.obs["kind"]) == 1
    place = mixed.obs["nbmix"].cat.categories.get_loc("both")
    labels = mixed.obs["nbmix"].cat.categories.tolist()
    labels[place : place + 1] = ["both.0", "both.1"]
    assert parted.obs["nbmix"].cat.categories.tolist() == labels
    assert parted.obs["nbmix"].value_counts()["both.0"] >= parted.obs["nbmix"].value_counts()["both.1"]


def test_probabilities_multiply(mixed, parted):
    labels, before = list(parted.uns["nbmix"]["labels"]), list(mixed.uns["nbmix"]["labels"])
    q, earlier = parted.obsm["X_nbmix"], mixed.obsm["X_nbmix"]
    np.testing.assert_allclose(q.sum(1), 1)
    sums = q[:, labels.index("both.0")] + q[:, labels.index("both.1")]
    np.testing.assert_allclose(sums, earlier[:, before.index("both")], atol=1e-12)
    for label in ("0", "2"):
        np.testing.assert_array_equal(q[:, labels.index(label)], earlier[:, before.index(label)])


def test_means_weights_and_markers_are_those_of_the_new_groups(mixed, parted):
    labels = list(parted.uns["nbmix"]["labels"])
    assert np.logaddexp.reduce(parted.uns["nbmix"]["log_weights"]) == pytest.approx(0, abs=1e-6)
    x, new = parted.X.toarray(), ["both.0", "both.1"]
    counts = [x[(parted.obs["nbmix"] == label).to_numpy()].sum(0) + 0.5 for label in new]
    observed = np.log([of_group / of_group.sum() for of_group in counts])
    found = parted.varm["nbmix_log_mean"][:, [labels.index(label) for label in new]].T
    away = np.abs(found[:, None] - observed).mean(2)  # (new groups, observed ones)
    assert (4 * np.diag(away) < np.diag(away[::-1])).all()
    assert np.isfinite(parted.varm["nbmix_log_mean"]).all()
    assert set(parted.uns["nbmix"]["markers"]["component"].astype(str)) == set(labels)
    best = parted.uns["nbmix"]["markers"].query("rank == 1").set_index("component")["gene"]
    found = nbmix.compare(parted, "both.0", "both.1").set_index("gene")
    assert found.loc[best["both.0"], "ln_fc"] > 0 > found.loc[best["both.1"], "ln_fc"]


def test_joins_of_the_first_fit_are_no_more(mixed, parted):
    with pytest.raises(InputError, match=r"holds no joins .* \(nbmix.recluster takes them away\)$"):
        nbmix.regroup(parted, 2)
    assert "X_nbmix_components" not in parted.obsm
    pairs = parted.uns["nbmix"]["separations"][["first", "second"]].astype(str).to_numpy().tolist()
    assert pairs == [["0", "2"]]


def test_what_follows_works_on(mixed, parted, tmp_path):
    again = read_back(parted, tmp_path)
    nbmix.rename(again, {"both.0": "B"})
    nbmix.merge(again, ["B", "both.1"], name="both")
    labels = list(again.uns["nbmix"]["labels"])
    np.testing.assert_allclose(
        again.obsm["X_nbmix"][:, labels.index("both")],
        mixed.obsm["X_nbmix"][:, list(mixed.uns["nbmix"]["labels"]).index("both")],
        atol=1e-12,
    )
    twice = nbmix.recluster(again, "both", 2, copy=True, **FAST)
    assert adjusted_rand_score(twice.obs["nbmix"], twice.obs["kind"]) == 1


def test_only_cells_of_the_group_are_fitted(mixed, parted):
    """Other counts elsewhere change nothing within."""
    labels = list(parted.uns["nbmix"]["labels"])
    places = [labels.index("both.0"), labels.index("both.1")]
    inside = (mixed.obs["nbmix"] == "both").to_numpy()
    other = mixed.copy()
    counts = other.X.tolil()
    counts[np.flatnonzero(~inside)[:20]] = 1
    other.X = counts.tocsr()
    found = nbmix.recluster(other, "both", 2, copy=True, **FAST).obsm["X_nbmix"][:, places]
    np.testing.assert_array_equal(found[inside], parted.obsm["X_nbmix"][inside][:, places])


def test_a_group_without_a_gap_stays_one(mixed):
    adata = mixed.copy()
    with pytest.warns(UserWarning, match="^recluster: the cells of '0' show no gap; it stays one group"):
        nbmix.recluster(adata, "0", **FAST)
    pd.testing.assert_frame_equal(adata.obs, mixed.obs)
    assert "joins" in adata.uns["nbmix"]


def test_of_a_single_kind_no_group_without_cells_is_made(mixed):
    adata = mixed.copy()
    with pytest.warns(UserWarning, match="^recluster: '0' stays one group: of 2 new groups only one would"):
        nbmix.recluster(adata, "0", 2, **FAST)
    pd.testing.assert_frame_equal(adata.obs, mixed.obs)
    assert "joins" in adata.uns["nbmix"]


def test_groups_beyond_those_with_cells_are_left_out(mixed, parted):
    """The others share what the missing ones would have had."""
    with pytest.warns(UserWarning, match="^recluster: of 4 new groups 2 have cells; the others are left out"):
        found = nbmix.recluster(mixed, "both", 4, copy=True, **FAST)
    labels, before = list(found.uns["nbmix"]["labels"]), list(mixed.uns["nbmix"]["labels"])
    assert labels == list(parted.uns["nbmix"]["labels"])
    assert found.obs["nbmix"].value_counts().min() > 0
    assert adjusted_rand_score(found.obs["nbmix"], found.obs["kind"]) == 1
    places, place = [labels.index("both.0"), labels.index("both.1")], before.index("both")
    sums = found.obsm["X_nbmix"][:, places].sum(1)
    np.testing.assert_allclose(sums, mixed.obsm["X_nbmix"][:, place], atol=1e-12)
    log_weight = np.logaddexp.reduce(found.uns["nbmix"]["log_weights"][places])
    assert log_weight == pytest.approx(float(mixed.uns["nbmix"]["log_weights"][place]), abs=1e-6)
    assert found.varm["nbmix_log_mean"].shape == parted.varm["nbmix_log_mean"].shape


def test_groups_of_regroup_leave_the_fit_as_it_is(tmp_path):
    adata = clustered()
    nbmix.regroup(adata, 3, key_added="three")
    mixed_one = next(
        label
        for label in adata.obs["three"].cat.categories
        if adata.obs.loc[adata.obs["three"] == label, "kind"].nunique() == 2
    )
    fit = adata.copy()
    nbmix.recluster(adata, mixed_one, 2, key="three", **FAST)
    assert adjusted_rand_score(adata.obs["three"], adata.obs["kind"]) == 1
    pd.testing.assert_series_equal(adata.obs["nbmix"], fit.obs["nbmix"])
    again = read_back(adata, tmp_path)
    nbmix.rename(again, {f"{mixed_one}.0": "x"}, key="three")
    assert nbmix.compare(again, "x", f"{mixed_one}.1", key="three").shape[0] == adata.n_vars
    nbmix.regroup(again, 2)
    assert again.obs["nbmix_groups"].nunique() == 2


def test_batches_are_known_within_the_group():
    cells = BatchedCells(n=240, p=40, k=3, spread=0.8, seed=3)
    index = pd.Index([f"c{i}" for i in range(240)])
    donors = np.array(["a", "b"])[cells.origins]
    adata = ad.AnnData(cells.counts, obs=pd.DataFrame({"donor": donors, "kind": cells.kinds}, index=index))
    nbmix.cluster(adata, 3, batch_key="donor", **FAST)
    assert adjusted_rand_score(adata.obs["nbmix"], adata.obs["kind"]) > 0.95
    nbmix.merge(adata, ["0", "1"], name="both")
    nbmix.recluster(adata, "both", 2, **FAST)
    assert adjusted_rand_score(adata.obs["nbmix"], adata.obs["kind"]) > 0.95


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_genes_that_are_called_alike_on_disk(mixed, tmp_path):
    expected = nbmix.recluster(mixed, "both", 2, copy=True, **FAST)
    adata = mixed.copy()
    adata.var_names = ["g", "g", *adata.var_names[2:]]
    adata.write_h5ad(tmp_path / "a.h5ad")
    on_disk = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    found = nbmix.recluster(on_disk, "both", 2, copy=True, **FAST)
    on_disk.file.close()
    for name in ("nbmix_log_mean", "nbmix_log_inv_disp"):
        np.testing.assert_array_equal(found.varm[name], expected.varm[name])
    pd.testing.assert_frame_equal(found.obs, expected.obs)


def test_what_cannot_be_clustered_again(mixed):
    with pytest.raises(InputError, match=r"^nbmix has no group '1'"):
        nbmix.recluster(mixed, "1", 2)
    with pytest.raises(
        TypeError, match=r"^recluster\(\) got an unexpected keyword argument 'n_group'; did you"
    ):
        nbmix.recluster(mixed, "both", n_group=2)
    with pytest.raises(TypeError, match=r"'size_factor_key'"):
        nbmix.recluster(mixed, "both", 2, size_factor_key="x")
    some = mixed[mixed.obs["nbmix"] != "both"].copy()
    with pytest.raises(InputError, match=r"^recluster: 'both' has no cells"):
        nbmix.recluster(some, "both", 2)

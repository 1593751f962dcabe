"""Fold changes between groups of a fit that is there already."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import nbmix
from nbmix.errors import InputError
from tests.helpers.clustered import clustered, observed_ln_fc, read_back
from tests.helpers.origins import BatchedCells
from tests.helpers.running import NO_PICTURES, TINY, run_here

COLUMNS = ["log_mean", "log_mean_se", "share", "share_reference", "ln_fc", "ln_fc_se", "log2_fc", "lfsr"]


@pytest.fixture(scope="module")
def adata():
    return clustered()


def like_markers(markers: pd.DataFrame, group: str, reference: str) -> pd.DataFrame:
    """Rows of a group, by gene, with the columns of ``compare``."""
    own = markers[markers["component"].astype(str) == group].set_index("gene")
    names = {"ln_fc": "ln_fc_{}", "ln_fc_se": "ln_fc_{}_se", "log2_fc": "log2_fc_{}", "lfsr": "lfsr_{}"}
    names["share_reference"] = "share_{}"
    return own.rename(columns={old.format(reference): new for new, old in names.items()})[COLUMNS]


def assert_same_numbers(found: pd.DataFrame, wanted: pd.DataFrame, **tolerance: float) -> None:
    found = found.set_index("gene").loc[wanted.index, COLUMNS]
    np.testing.assert_allclose(found, wanted, **({"rtol": 1e-4, "atol": 1e-6} | tolerance))


def test_a_group_against_the_rest_and_against_another_as_in_the_markers(adata):
    markers = adata.uns["nbmix"]["markers"]
    for group in "0123":
        found = nbmix.compare(adata, group)
        assert found["gene"].nunique() == adata.n_vars
        wanted = like_markers(markers, group, "rest")
        assert_same_numbers(found, wanted)
        assert found["gene"].head(len(wanted)).tolist() == wanted.index.tolist()
        own = markers[markers["component"].astype(str) == group]
        assert_same_numbers(
            nbmix.compare(adata, group, str(own["nearest"].iloc[0])), like_markers(markers, group, "nearest")
        )


def test_several_groups_are_seen_as_one(adata):
    found = nbmix.compare(adata, ["0", "1"], ["2", "3"]).set_index("gene").loc[adata.var_names]
    observed = observed_ln_fc(adata, ["0", "1"], ["2", "3"])
    counted = np.asarray(adata.X.sum(0)).ravel() > 200
    off = (found["ln_fc"] - observed)[counted] / found["ln_fc_se"][counted]
    assert counted.sum() > 20
    assert np.abs(off).max() < 2  # shrunk, but by no more than what is not known
    rest = nbmix.compare(adata, ["0", "1"])
    np.testing.assert_allclose(rest.set_index("gene").loc[adata.var_names]["ln_fc"], found["ln_fc"])


def test_the_other_way_round_signs_are_turned(adata):
    one, other = nbmix.compare(adata, "0", "1"), nbmix.compare(adata, "1", "0")
    one, other = one.set_index("gene"), other.set_index("gene").loc[one["gene"]]
    np.testing.assert_allclose(one["ln_fc"], -other["ln_fc"])
    np.testing.assert_allclose(one["ln_fc_se"], other["ln_fc_se"])
    np.testing.assert_allclose(one["share"], other["share_reference"])
    assert one["rank"].tolist() == list(range(1, len(one) + 1))
    assert one["ln_fc"].iloc[0] > 0 > one["ln_fc"].iloc[-1]


def test_of_a_file_that_was_read_back_and_of_counts_in_a_layer(adata, tmp_path):
    wanted = nbmix.compare(adata, "0", "2")
    pd.testing.assert_frame_equal(nbmix.compare(read_back(adata, tmp_path), "0", "2"), wanted)
    moved = adata.copy()
    moved.layers["molecules"] = moved.X
    moved.X = moved.X.log1p()
    pd.testing.assert_frame_equal(nbmix.compare(moved, "0", "2", layer="molecules"), wanted)
    with pytest.raises(InputError, match=r"^adata: X holds fractional values .* layer='molecules'"):
        nbmix.compare(moved, "0", "2")
    clustered_in_layer = ad.AnnData(moved.X, obs=adata.obs[["kind"]], layers={"molecules": adata.X})
    nbmix.cluster(clustered_in_layer, 4, start="kmeans", folds=3, layer="molecules")
    np.testing.assert_array_equal(nbmix.compare(clustered_in_layer, "0", "2")["ln_fc"], wanted["ln_fc"])


def test_of_some_cells_and_of_some_genes(adata):
    some = adata[adata.obs["nbmix"].isin(["0", "3"])].copy()
    found = nbmix.compare(some, "0", "3").set_index("gene")
    whole = nbmix.compare(adata, "0", "3").set_index("gene").loc[found.index]
    assert np.abs(found["ln_fc"] - whole["ln_fc"]).max() < whole["ln_fc_se"].max()
    genes = nbmix.compare(adata[:, :60].copy(), "0", "3").set_index("gene")
    # by the size factors of the fit, of all genes
    off = np.abs(genes["log_mean"] - whole.loc[genes.index, "log_mean"])
    assert (off < 0.3 * genes["log_mean_se"]).all()


def test_the_groups_of_regroup(adata):
    regrouped = nbmix.regroup(adata, 3, key_added="three", copy=True)
    both = [
        label
        for label, parts in regrouped.uns["three"].items()
        if parts not in adata.uns["nbmix"]["groups"].values()
    ]
    assert len(both) == 1
    members = set(regrouped.uns["three"][both[0]].split("+"))
    of_fit = [k for k, parts in adata.uns["nbmix"]["groups"].items() if set(parts.split("+")) <= members]
    found = nbmix.compare(regrouped, both[0], key="three").set_index("gene")
    wanted = nbmix.compare(adata, of_fit).set_index("gene").loc[found.index]
    off = np.abs(found["ln_fc"] - wanted["ln_fc"]) / wanted["ln_fc_se"]
    assert off.quantile(0.95) < 0.3  # the prior was learned of other groups


@pytest.mark.parametrize("settings", [{}, {"pseudo_cells": 2}, {"folds": 1}], ids=str)
def test_as_in_the_markers_where_each_group_is_a_component(settings):
    adata = ad.AnnData(nbmix.simulate(n=200, p=60, k=3, s=2000, seed=3).counts)
    nbmix.cluster(adata, 3, components_per_group=1, start="kmeans", **settings)
    markers = adata.uns["nbmix"]["markers"]
    assert_same_numbers(nbmix.compare(adata, "1"), like_markers(markers, "1", "rest"))
    nbmix.rename(adata, {"1": "B"})
    assert_same_numbers(nbmix.compare(adata, "B"), like_markers(markers, "1", "rest"))


def test_fold_changes_are_within_batches():
    cells = BatchedCells(n=400, p=60, spread=1.0, seed=1)
    rng = np.random.default_rng(0)
    rare = (cells.kinds == 1) & (cells.origins == 0) & (rng.random(400) < 0.8)
    donors = np.array(["a", "b"])[cells.origins]
    index = pd.Index([f"c{i}" for i in range(400)])
    adata = ad.AnnData(cells.counts, obs=pd.DataFrame({"donor": donors}, index=index))
    adata.obs["kind"] = cells.kinds
    adata = adata[~rare].copy()  # the second kind is mostly of one batch
    nbmix.cluster(adata, 2, batch_key="donor", start="kmeans", folds=3)
    found = nbmix.compare(adata, "1", "0")
    assert_same_numbers(
        nbmix.compare(adata, "1"), like_markers(adata.uns["nbmix"]["markers"], "1", "rest"), rtol=1e-3
    )
    of_genes = found.set_index("gene").loc[adata.var_names]
    x, groups = adata.X.toarray(), adata.obs["nbmix"].to_numpy()
    within = []
    for donor in "ab":
        of_donor = adata.obs["donor"].to_numpy() == donor
        sums = [x[of_donor & (groups == group)].sum(0) + 0.5 for group in "10"]
        within.append(np.log(sums[0] / sums[0].sum()) - np.log(sums[1] / sums[1].sum()))
    raw = observed_ln_fc(adata, ["1"], ["0"])
    off_within, off_raw = (np.abs(of_genes["ln_fc"] - v).median() for v in (np.mean(within, 0), raw))
    assert off_within < off_raw / 2
    adata.obs["donor"] = np.where(adata.obs["donor"] == "a", "a", "new")
    with pytest.raises(InputError, match=r"^adata: the fit has not seen the batch 'new' of some cells"):
        nbmix.compare(adata, "1", "0")


def test_of_the_file_of_a_run(tmp_path):
    run_here(tmp_path, *TINY, NO_PICTURES)
    adata, markers = ad.read_h5ad(tmp_path / "result.h5ad"), pd.read_csv(tmp_path / "markers.csv")
    assert_same_numbers(nbmix.compare(adata, "1"), like_markers(markers, "1", "rest"))


@pytest.mark.parametrize(
    ("groups", "reference", "message"),
    [
        ("7", "rest", r"^nbmix has no group '7'; its groups are 0, 1, 2, 3$"),
        (["0", "1"], "1", r"^compare: group '1' is on both sides; leave it out of one$"),
        (["0", "0"], "1", r"^groups=\['0', '0'\]: name one group or several, each once$"),
        ([], "1", r"^groups=\[\]: name one group or several, each once$"),
        ("rest", "rest", r"^compare: both sides are the rest; name the groups of one$"),
        (["0", "1", "2", "3"], "rest", r"^compare: the rest has no cells, which says nothing of its genes$"),
    ],
)
def test_what_cannot_be_compared(adata, groups, reference, message):
    with pytest.raises(InputError, match=message):
        nbmix.compare(adata, groups, reference)


def test_a_group_without_cells_is_not_compared(adata):
    some = adata[adata.obs["nbmix"] != "1"].copy()
    with pytest.raises(InputError, match=r"^compare: 1 has no cells"):
        nbmix.compare(some, "1", "0")


def test_without_a_fit():
    with pytest.raises(InputError, match=r"^adata: lacks obs\['nbmix'\], .*; run nbmix.cluster"):
        nbmix.compare(ad.AnnData(np.ones((3, 2))), "0")
    with pytest.raises(InputError, match=r"^adata is a list; give the AnnData of a fit"):
        nbmix.compare([1], "0")

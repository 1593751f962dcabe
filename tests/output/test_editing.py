"""Groups of a fit, merged and renamed: all that names them follows."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

import nbmix
from nbmix.errors import InputError
from tests.helpers.clustered import clustered, read_back, unlike_kinds


@pytest.fixture
def adata():
    return clustered()


def assert_whole(adata, labels, key="nbmix"):
    """All fields of a fit are of these groups, in this order."""
    q, own = adata.obsm[f"X_{key}"], adata.uns[key]
    assert q.shape == (adata.n_obs, len(labels))
    np.testing.assert_allclose(q.sum(1), 1)
    for name in (key, f"{key}_second"):
        assert adata.obs[name].cat.categories.tolist() == labels
    order = np.argsort(-q, axis=1, kind="stable")
    np.testing.assert_array_equal(adata.obs[key].cat.codes, order[:, 0])
    np.testing.assert_array_equal(adata.obs[f"{key}_second"].cat.codes, order[:, 1])
    np.testing.assert_array_equal(adata.obs[f"{key}_probability"], q.max(1))
    np.testing.assert_array_equal(adata.obs[f"{key}_ambiguous"], adata.obs[f"{key}_margin"] < np.log(9))
    assert list(own["labels"]) == labels
    assert own["log_weights"].shape == (len(labels),)
    assert np.logaddexp.reduce(own["log_weights"]) == pytest.approx(0, abs=1e-9)
    for name in ("log_mean", "log_inv_disp"):
        assert adata.varm[f"{key}_{name}"].shape == (adata.n_vars, len(labels))
    assert set(own["markers"]["component"].astype(str)) == set(labels)
    assert set(own["markers"]["nearest"].astype(str)) <= set(labels)


def test_merged_groups(adata):
    before, q = adata.copy(), adata.obsm["X_nbmix"]
    nbmix.merge(adata, ["1", "3"])
    larger = before.obs["nbmix"].value_counts()[["1", "3"]].idxmax()
    labels = ["0", larger, "2"] if larger == "1" else ["0", "2", larger]
    assert_whole(adata, labels)
    place = labels.index(larger)
    np.testing.assert_allclose(adata.obsm["X_nbmix"][:, place], q[:, 1] + q[:, 3])
    pi = np.exp(before.uns["nbmix"]["log_weights"])
    means = np.exp(before.varm["nbmix_log_mean"])
    wanted = (pi[1] * means[:, 1] + pi[3] * means[:, 3]) / (pi[1] + pi[3])
    np.testing.assert_allclose(np.exp(adata.varm["nbmix_log_mean"][:, place]), wanted)
    groups = before.uns["nbmix"]["groups"]
    both = sorted("+".join([groups["1"], groups["3"]]).split("+"), key=int)
    assert adata.uns["nbmix"]["groups"] == {"0": groups["0"], "2": groups["2"], larger: "+".join(both)}
    pairs = adata.uns["nbmix"]["separations"]
    assert pairs[["first", "second"]].astype(str).to_numpy().tolist() == [["0", "2"]]
    for name in ("log_likelihood", "misfit", "fits_no_group"):  # of the mixture
        pd.testing.assert_series_equal(adata.obs[f"nbmix_{name}"], before.obs[f"nbmix_{name}"])


def test_markers_of_merged_groups_are_found_anew(adata):
    nbmix.merge(adata, ["1", "3"], name="both")
    markers = adata.uns["nbmix"]["markers"]
    own = markers[markers["component"] == "both"].set_index("gene")
    found = nbmix.compare(adata, "both").set_index("gene").loc[own.index]
    np.testing.assert_allclose(own["ln_fc_rest"], found["ln_fc"], rtol=1e-4)
    assert own["rank"].tolist() == found["rank"].tolist() == list(range(1, 26))


def test_regroup_cuts_the_same_joins_after_a_merge(adata):
    before = [nbmix.regroup(adata, n, copy=True) for n in (2, 5)]
    nbmix.merge(adata, ["1", "3"], name="both")
    for earlier, n in zip(before, (2, 5), strict=True):
        found = nbmix.regroup(adata, n, copy=True)
        assert adjusted_rand_score(found.obs["nbmix_groups"], earlier.obs["nbmix_groups"]) == 1
        known = [label for label in found.uns["nbmix_groups"] if not label.isdecimal()]
        assert known in (["both"], [])
    same = nbmix.regroup(adata, 3, copy=True)
    np.testing.assert_array_equal(same.obs["nbmix_groups"], adata.obs["nbmix"])
    assert same.uns["nbmix_groups"] == adata.uns["nbmix"]["groups"]


def test_of_a_file_that_was_read_back(adata, tmp_path):
    nbmix.merge(adata, ["1", "3"], name="T")
    nbmix.rename(adata, {"0": "monocytes"})
    again = read_back(adata, tmp_path)
    assert_whole(again, list(adata.uns["nbmix"]["labels"]))
    nbmix.merge(again, ["2", "monocytes"], name="x")
    nbmix.merge(adata, ["2", "monocytes"], name="x")
    assert_whole(again, list(adata.uns["nbmix"]["labels"]))
    np.testing.assert_allclose(again.obsm["X_nbmix"], adata.obsm["X_nbmix"])
    pd.testing.assert_frame_equal(nbmix.compare(again, "x"), nbmix.compare(adata, "x"))


def test_without_counts_there_are_no_markers_any_more(adata):
    adata.X = adata.X.log1p()
    with pytest.warns(UserWarning, match=r"^uns\['nbmix'\] has no markers any more: adata: X holds"):
        nbmix.merge(adata, ["1", "3"])
    assert "markers" not in adata.uns["nbmix"]
    assert adata.obsm["X_nbmix"].shape[1] == 3


def test_renamed_groups(adata):
    before = adata.copy()
    names = {"0": "CD4 T", "2": "1", "1": "B"}
    nbmix.rename(adata, names)
    assert_whole(adata, ["CD4 T", "B", "1", "3"])
    np.testing.assert_array_equal(adata.obsm["X_nbmix"], before.obsm["X_nbmix"])
    of = lambda label: names.get(str(label), str(label))  # noqa: E731 - one line
    own, earlier = adata.uns["nbmix"], before.uns["nbmix"]
    assert own["groups"] == {of(label): parts for label, parts in earlier["groups"].items()}
    for table, columns in (("markers", ("component", "nearest")), ("separations", ("first", "second"))):
        for column in columns:
            assert own[table][column].astype(str).tolist() == list(map(of, earlier[table][column]))
        rest = [name for name in own[table] if name not in columns]
        pd.testing.assert_frame_equal(own[table][rest], earlier[table][rest])
    found = nbmix.compare(adata, "CD4 T", ["B", "1"])
    pd.testing.assert_frame_equal(found, nbmix.compare(before, "0", ["1", "2"]))


def test_regroup_takes_the_new_names(adata):
    nbmix.rename(adata, {"0": "CD4 T", "1": "B"})
    same = nbmix.regroup(adata, 4, copy=True)
    np.testing.assert_array_equal(same.obs["nbmix_groups"], adata.obs["nbmix"])
    split = nbmix.regroup(adata, 5, copy=True)
    labels = split.obs["nbmix_groups"].cat.categories.tolist()
    assert labels == ["CD4 T", "B", "2", "3", "4"]
    both = pd.crosstab(split.obs["nbmix_groups"], adata.obs["nbmix"])
    for label in ("CD4 T", "B", "2", "3"):
        assert both.loc[label].idxmax() == label


def test_groups_of_regroup_are_merged_and_renamed_too(adata):
    nbmix.regroup(adata, 5, key_added="five")
    fit = adata.copy()
    nbmix.merge(adata, ["3", "4"], name="new", key="five")
    nbmix.rename(adata, {"0": "first"}, key="five")
    labels = adata.obs["five"].cat.categories.tolist()
    assert sorted(labels) == ["1", "2", "first", "new"]
    assert adata.obsm["X_five"].shape == (adata.n_obs, 4)
    assert set(adata.uns["five"]) == set(labels)
    parts = "+".join([fit.uns["five"]["3"], fit.uns["five"]["4"]]).split("+")
    assert sorted(adata.uns["five"]["new"].split("+")) == sorted(parts)
    pd.testing.assert_series_equal(adata.obs["nbmix"], fit.obs["nbmix"])
    assert adata.uns["nbmix"].keys() == fit.uns["nbmix"].keys()
    assert nbmix.compare(adata, "new", key="five").shape[0] == adata.n_vars


def test_a_copy_leaves_what_was_there(adata):
    before = adata.copy()
    merged = nbmix.merge(adata, ["0", "1"], copy=True)
    renamed = nbmix.rename(adata, {"0": "x"}, copy=True)
    assert merged.obsm["X_nbmix"].shape[1] == 3
    assert renamed.obs["nbmix"].cat.categories[0] == "x"
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert adata.uns["nbmix"]["groups"] == before.uns["nbmix"]["groups"]
    pd.testing.assert_frame_equal(adata.uns["nbmix"]["markers"], before.uns["nbmix"]["markers"])


def test_of_a_file_that_stays_on_disk(adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    on_disk = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    merged = nbmix.merge(on_disk, ["0", "1"], name="both", copy=True)
    assert not merged.isbacked
    assert_whole(merged, ["both", "2", "3"])
    assert nbmix.regroup(on_disk, 2, copy=True).obs["nbmix_groups"].nunique() == 2
    some = on_disk[:100]
    assert nbmix.rename(some, {"0": "x"}, copy=True).obs["nbmix"].cat.categories[0] == "x"
    for change in (lambda: nbmix.rename(some, {"0": "x"}), lambda: nbmix.regroup(some, 2)):
        with pytest.raises(InputError, match=r"^adata is a view of a file, .* or set copy=True"):
            change()
    nbmix.merge(on_disk, ["0", "1"], name="both")
    assert_whole(on_disk, ["both", "2", "3"])
    on_disk.file.close()


def test_kinds_that_a_fit_has_split_are_whole_again_after_a_merge(adata):
    assert unlike_kinds(adata) == 0
    nbmix.regroup(adata, 5, key_added="five")
    split = [k for k in adata.obs["five"].cat.categories if k not in adata.obs["nbmix"].cat.categories]
    table = pd.crosstab(adata.obs["five"], adata.obs["kind"])
    kind = table.loc[split[0]].idxmax()
    halves = [k for k in table.index if table.loc[k].idxmax() == kind]
    nbmix.merge(adata, halves, key="five")
    assert adjusted_rand_score(adata.obs["five"], adata.obs["kind"]) == 1


def ranked(groupby, method):
    """As scanpy writes it, of two groups."""
    names = np.rec.fromarrays([["g1", "g2"], ["g3", "g4"]], dtype=[("0", object), ("1", object)])
    return {"names": names, "params": {"groupby": groupby, "method": method}}


def test_ranked_genes_in_scanpys_form_have_the_new_names(adata, tmp_path):
    adata.uns["theirs"] = ranked("nbmix", "wilcoxon")
    adata.uns["ours"] = ranked("nbmix", "nbmix")
    adata.uns["other"] = ranked("kind", "nbmix")
    nbmix.rename(adata, {"0": "1", "1": "B"})
    again = read_back(adata, tmp_path)
    for name in ("theirs", "ours"):
        assert again.uns[name]["names"].dtype.names == ("1", "B")
        assert again.uns[name]["names"]["B"].tolist() == ["g3", "g4"]
    assert again.uns["other"]["names"].dtype.names == ("0", "1")
    nbmix.merge(again, ["1", "2"])
    # of groups that are other ones it is found anew
    assert set(again.uns["ours"]["names"].dtype.names) == set(again.obs["nbmix"].unique())
    assert {"theirs", "other"} < set(again.uns)


@pytest.mark.parametrize("name", ["", "  ", "CD4/CD8", "rest", 3])
def test_names_that_cannot_be(adata, name):
    message = r"must be a text without '/', which files cannot have in names, and not 'rest'"
    with pytest.raises(InputError, match=message):
        nbmix.rename(adata, {"0": name})
    with pytest.raises(InputError, match=message):
        nbmix.merge(adata, ["0", "1"], name=name)
    assert adata.obs["nbmix"].cat.categories.tolist() == ["0", "1", "2", "3"]


def test_what_cannot_be_merged_or_renamed(adata):
    with pytest.raises(InputError, match=r"^nbmix has no group '9'; its groups are 0, 1, 2, 3"):
        nbmix.merge(adata, ["0", "9"])
    with pytest.raises(InputError, match=r"^groups=\['0'\]: name two groups or more to merge"):
        nbmix.merge(adata, ["0"])
    with pytest.raises(InputError, match=r"^name='2': two groups would have it; .* nbmix.merge$"):
        nbmix.merge(adata, ["0", "1"], name="2")
    with pytest.raises(InputError, match=r"^name='2': two groups would have it"):
        nbmix.rename(adata, {"0": "2"})
    nbmix.rename(adata, {"0": "monocytes"})
    with pytest.raises(InputError, match=r"^nbmix has no group 'monocyte'; .*; did you mean monocytes\?$"):
        nbmix.rename(adata, {"monocyte": "M"})

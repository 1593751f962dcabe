"""nbmix.cluster: scanpy's habits, and the fields of train.py."""

from __future__ import annotations

import json
from collections.abc import Mapping

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import nbmix
from nbmix import NBMixture, cluster
from nbmix.errors import InputError
from nbmix.output.report import TOP_MARKERS
from nbmix.starts.clusters import KMeansStart
from tests.helpers.estimators import COUNTS, EM, annotated
from tests.helpers.files import write_tenx_folder
from tests.helpers.running import TINY, run_here


@pytest.fixture(scope="module")
def fitted() -> NBMixture:
    return NBMixture(**EM).fit(COUNTS)


def test_the_markers_of_train(tmp_path):
    run_here(tmp_path, *TINY, "data.validation_share=0")
    result = ad.read_h5ad(tmp_path / "result.h5ad")
    adata = ad.AnnData(result.X, var=result.var)
    adata.var["symbol"] = [f"S{j}" for j in range(adata.n_vars)]
    cluster(adata, 2, start="kmeans")
    table = pd.read_csv(tmp_path / "markers.csv")
    expected = table[table["rank"] <= TOP_MARKERS].reset_index(drop=True)
    markers = adata.uns["nbmix"]["markers"]
    assert len(markers) == 2 * TOP_MARKERS
    groups = adata.obs["nbmix"].cat.categories
    for name in ("component", "nearest"):
        expected[name] = pd.Categorical.from_codes(expected[name], groups)
    pd.testing.assert_frame_equal(markers.drop(columns="symbol"), expected, rtol=1e-4)
    assert adata.var.loc[markers["gene"], "symbol"].tolist() == markers["symbol"].tolist()


def flat(adata):
    """Names and values of all fields."""
    for column in adata.obs:
        yield f"obs/{column}", adata.obs[column]
    slots = ("X", "layers", "obsm", "varm", "obsp", "uns")
    waiting = [(slot, getattr(adata, slot)) for slot in slots]
    while waiting:
        name, value = waiting.pop(0)
        if isinstance(value, Mapping):
            waiting = [(f"{name}/{key}", value[key]) for key in sorted(value)] + waiting
        else:
            yield name, value


def same_value(one, other, name):
    if sp.issparse(one):
        one, other = one.toarray(), other.toarray()
    if getattr(one, "dtype", None) is not None and one.dtype.names:
        one, other = pd.DataFrame(one), pd.DataFrame(other)
    if isinstance(one, pd.DataFrame | pd.Series):
        (pd.testing.assert_frame_equal if one.ndim == 2 else pd.testing.assert_series_equal)(one, other)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(one, other, err_msg=name)
    else:
        assert one == other, name


def test_the_fields_of_train(tmp_path):
    """Of a file of one's own: the same names, types and numbers."""
    adata = annotated()
    adata.layers["counts"], adata.X = adata.X, adata.X.log1p()
    adata.obs["lane"] = pd.Categorical(np.arange(120) % 2)
    adata.write_h5ad(tmp_path / "a.h5ad")
    settings = ("data=h5ad", f"data.path={tmp_path}/a.h5ad", "data.layer=counts", "data.validation_share=0")
    settings += ("model.n_components=2", "start=kmeans", "data.batch_key=lane", "evaluation.max_umap_cells=0")
    settings += ("model.tolerance=0.1",)
    run_here(tmp_path / "run", *settings, "evaluation.pictures=[nbmix.output.pictures.objective_trace]")
    ours = ad.read_h5ad(tmp_path / "run" / "result.h5ad")
    cluster(adata, 2, layer="counts", start="kmeans", batch_key="lane", tol=0.1, max_umap_cells=0)
    adata.write_h5ad(tmp_path / "b.h5ad")
    theirs = ad.read_h5ad(tmp_path / "b.h5ad")
    made_by = [x.uns["nbmix"].pop("provenance") for x in (ours, theirs)]
    assert made_by[0] != made_by[1]
    arguments = [json.loads(x.uns["nbmix"]["fit"].pop("arguments")) for x in (ours, theirs)]
    assert arguments[0].items() <= arguments[1].items()
    for one, other in zip(flat(ours), flat(theirs), strict=True):
        assert one[0] == other[0]
        same_value(one[1], other[1], one[0])


def test_counts_that_are_still_in_their_file(fitted, tmp_path):
    ad.AnnData(COUNTS).write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    cluster(backed, 2, start="kmeans", folds=3)
    np.testing.assert_array_equal(backed.obsm["X_nbmix"], fitted.responsibilities_)
    backed.file.close()


def test_cluster_writes_what_result_h5ad_holds(tmp_path):
    adata = annotated()
    assert cluster(adata, 2, start="kmeans", folds=3) is None
    mixture = NBMixture(**EM).fit(annotated())
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    assert again.obs["nbmix"].cat.categories.tolist() == ["0", "1"]
    np.testing.assert_array_equal(again.obs["nbmix"].astype(int), mixture.labels_)
    np.testing.assert_array_equal(again.obs["nbmix_probability"], mixture.responsibilities_.max(1))
    np.testing.assert_array_equal(again.obs["nbmix_log_likelihood"], mixture.log_likelihoods_)
    np.testing.assert_array_equal(again.obsm["X_nbmix"], mixture.responsibilities_)
    np.testing.assert_array_equal(again.varm["nbmix_log_mean"], mixture.log_mean_.T)
    np.testing.assert_array_equal(again.varm["nbmix_log_inv_disp"], mixture.log_inv_disp_.T)
    np.testing.assert_array_equal(again.uns["nbmix"]["objective"], mixture.lower_bounds_)
    np.testing.assert_allclose(np.exp(again.uns["nbmix"]["log_weights"]), mixture.weights_)
    assert again.uns["nbmix"]["markers"]["gene"].tolist() == adata.uns["nbmix"]["markers"]["gene"].tolist()
    assert "choice" not in again.uns["nbmix"]
    provenance = json.loads(again.uns["nbmix"]["provenance"])
    assert provenance["config"]["random_state"] == 0
    assert provenance["versions"]["nbmix"] == nbmix.__version__


def test_cluster_with_the_number_of_components_left_open(tmp_path):
    adata = annotated()
    cluster(adata, "1-3", start="kmeans", components_per_group=1)
    adata.write_h5ad(tmp_path / "a.h5ad")
    choice = ad.read_h5ad(tmp_path / "a.h5ad").uns["nbmix"]["choice"]
    assert choice.loc[choice["recommended"], "n_components"].tolist() == [2]
    assert adata.obs["nbmix"].cat.categories.tolist() == ["0", "1"]


def test_as_many_groups_as_have_gaps():
    adata = annotated()
    cluster(adata, "auto", start="kmeans")
    joins = adata.uns["nbmix"]["joins"]
    assert adata.obs["nbmix"].cat.categories.tolist() == ["0", "1"]
    assert joins.loc[joins["gap"], "n_groups"].iloc[0] == 2
    assert "choice" not in adata.uns["nbmix"]


def test_a_folder_of_cell_ranger_in_three_lines(tmp_path):
    write_tenx_folder(tmp_path / "filtered_feature_bc_matrix", x=COUNTS.astype(int))
    adata = nbmix.read_10x(tmp_path / "filtered_feature_bc_matrix")
    cluster(adata, n_components=2, start="kmeans", folds=3)
    np.testing.assert_array_equal(adata.obs["nbmix"].astype(int), NBMixture(**EM).fit_predict(COUNTS))
    assert adata.var.loc["ENSG1", "symbol"] == "S1"
    with pytest.raises(InputError, match=r"^path=.*none: no such file"):
        nbmix.read_10x(tmp_path / "none")
    with pytest.raises(InputError, match=r"^genome=hg19: a folder has none to choose from; set genome=None$"):
        nbmix.read_10x(tmp_path / "filtered_feature_bc_matrix", genome="hg19")


def test_counts_in_raw_are_given_as_an_anndata_of_their_own():
    adata = ad.AnnData(COUNTS)
    adata.raw = adata
    with pytest.raises(InputError, match=r"^adata: no layer 'raw\.X'; .*, or give adata\.raw\.to_adata\(\)$"):
        cluster(adata, 2, layer="raw.X")


def test_cluster_names_a_column_that_cuts_a_kind(caplog):
    """Three kinds, the last of which has another protein in each of two plates."""
    rng = np.random.default_rng(0)
    kinds, plate = np.repeat([0, 1, 2], 80), np.tile([0, 1], 120)
    mean = np.exp(rng.normal(0, 1, (3, 40)))[kinds]
    mean[:, :10] *= np.where((kinds == 2) & (plate == 1), 8.0, 1.0)[:, None]
    adata = ad.AnnData(sp.csr_matrix(rng.poisson(mean).astype(np.float32)))
    adata.obs["plate"] = pd.Categorical(np.array(["x", "y"])[plate])
    adata.obs["kind"] = pd.Categorical(kinds.astype(str))
    cluster(adata, 4, start="kmeans", components_per_group=1, folds=2)
    (line,) = adata.uns["nbmix"]["remarks"]
    assert line.startswith("obs['plate'] tells groups")
    assert line in caplog.text
    cluster(adata, 3, start="kmeans", components_per_group=1, folds=2, batch_key="plate")
    assert "remarks" not in adata.uns["nbmix"]
    adata.obs["older_second"] = adata.obs.pop("plate")  # of groups that an earlier fit has left
    adata.obs["older"], adata.obs["older_probability"] = adata.obs["older_second"], 1.0
    cluster(adata, 4, start="kmeans", components_per_group=1, folds=2)
    assert "remarks" not in adata.uns["nbmix"]


def test_cluster_names_and_copies():
    adata = annotated()
    before = adata.X.copy()
    copied = cluster(adata, 2, key_added="mine", copy=True, start=KMeansStart(n_init=2))
    assert set(adata.obs) == {"molecules"}
    assert (before != adata.X).nnz == 0
    assert {"mine", "mine_probability", "mine_log_likelihood"} < set(copied.obs)
    assert "X_mine" in copied.obsm
    assert {"mine_log_mean", "mine_log_inv_disp"} == set(copied.varm)
    assert "KMeansStart(" in json.loads(copied.uns["mine"]["provenance"])["config"]["start"]
    with pytest.raises(InputError, match="adata is a csr_matrix; for other data use"):
        cluster(COUNTS)


def test_a_file_that_is_open(tmp_path):
    """What cannot be written to in the end is found before the fit, or copied."""
    annotated().write_h5ad(tmp_path / "a.h5ad")
    adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    expected = NBMixture(**EM).fit_predict(annotated())
    copied = cluster(adata, 2, copy=True, start="kmeans", folds=3)
    assert not copied.isbacked and "nbmix" not in adata.obs
    np.testing.assert_array_equal(copied.obs["nbmix"].astype(int), expected)
    part = adata[: adata.n_obs // 2]
    with pytest.raises(InputError, match=r"^adata is a view of a file.*to_memory\(\), or set copy=True$"):
        cluster(part, 2, max_iter=-1)  # which would be refused by the fit
    assert "nbmix" in cluster(part, 2, copy=True, start="kmeans", folds=3).obs
    cluster(adata, 2, start="kmeans", folds=3)
    np.testing.assert_array_equal(adata.obs["nbmix"].astype(int), expected)
    adata.file.close()


@pytest.mark.parametrize("key", ["a/b", "", 3])
def test_names_that_no_file_can_have(key):
    with pytest.raises(InputError, match="key_added="):
        cluster(annotated(), 2, key_added=key)


def test_counts_in_a_layer():
    adata = annotated()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    with pytest.raises(
        InputError,
        match=r"^adata: X holds fractional values \(.*; nbmix needs raw counts: set layer='counts'$",
    ):
        cluster(adata)
    cluster(adata, 2, layer="counts", start="kmeans", folds=3)
    np.testing.assert_array_equal(adata.obs["nbmix"].astype(int), NBMixture(**EM).fit_predict(annotated()))

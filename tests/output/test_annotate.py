"""The fields of an AnnData that a fit fills."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from nbmix.output.annotate import add_fields, annotate
from nbmix.output.report import TOP_MARKERS
from nbmix.output.results import Results, named_markers
from nbmix.starts.choice import Choice
from tests.helpers.results import results_of
from tests.helpers.running import small_data


@pytest.fixture
def adata(results):
    """The cells of the results; their genes stand between two others."""
    names = ["first", *results.data.data.gene_names, "last"]
    cells = results.data.data.cell_names
    return ad.AnnData(obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=names))


def test_fields(results, adata):
    genes = np.arange(1, adata.n_vars - 1)
    add_fields(adata, "mix", results, genes)
    q = results.responsibilities
    of_groups = ["", "_probability", "_second", "_margin", "_ambiguous"]
    of_cells = ["_log_likelihood", "_misfit", "_fits_no_group", "_held_out", "_size_factor"]
    assert list(adata.obs) == [f"mix{name}" for name in (*of_groups, *of_cells)]
    assert adata.obs["mix"].cat.categories.tolist() == ["0", "1"]
    assert np.array_equal(adata.obs["mix"].astype(int), q.argmax(1))
    assert np.array_equal(adata.obs["mix_probability"], q.max(1))
    assert np.array_equal(adata.obs["mix_log_likelihood"], results.cells.log_likelihood)
    assert np.array_equal(adata.obsm["X_mix"], q)
    for name, values in results.profiles._asdict().items():
        found = adata.varm[f"mix_{name}"]
        assert np.array_equal(found[genes].T, values)
        assert np.isnan(found[[0, -1]]).all()
    own = adata.uns["mix"]
    assert own["model"] == "em"
    assert np.array_equal(own["log_weights"], results.model.mixture.log_weights.data[-1])
    assert own["groups"] == {"0": "0", "1": "1"}
    assert own["objective"].tolist() == results.model.objective
    assert json.loads(own["provenance"]) == {"config": {"seed": 0}}


def test_what_an_earlier_fit_has_written_goes(adata):
    results, genes = results_of(small_data(), max_umap_cells=0), np.arange(1, adata.n_vars - 1)
    adata.obsm["X_nbmix_umap"] = adata.obsm["X_umap"] = np.ones((60, 2))
    adata.varm["nbmix_batch_offsets"] = np.ones((82, 2))
    adata.obs["nbmix_groups"] = "theirs"
    annotate(adata, "nbmix", results, genes)
    assert set(adata.obsm) == {"X_nbmix", "X_nbmix_components", "X_nbmix_pca"}
    assert "nbmix_batch_offsets" not in adata.varm
    assert "nbmix_groups" in adata.obs
    adata.uns["nbmix_groups"], adata.obsm["X_nbmix_groups"] = {"0": "0+1"}, np.ones((60, 1))  # by regroup
    annotate(adata, "nbmix", results, genes)
    for slot in (adata.obs, adata.obsm, adata.uns):
        assert not any("nbmix_groups" in name for name in slot)


def test_cells_that_no_picture_shows_have_no_place(adata):
    results = results_of(small_data())
    results.shown_rows = np.arange(0, 60, 2)  # in place of a random choice of many cells
    annotate(adata, "nbmix", results, np.arange(1, adata.n_vars - 1))
    shown = np.isfinite(adata.obsm["X_nbmix_umap"]).all(1)
    assert np.array_equal(np.flatnonzero(shown), results.shown_rows)


def test_groups_without_cells_and_a_single_one_have_no_ranks(adata):
    genes = np.arange(1, adata.n_vars - 1)
    many = results_of(small_data(), n_components=12, folds=1)
    annotate(adata, "nbmix", many, genes, embed=False)
    filled = tuple(str(k) for k in np.unique(many.assignments))
    assert adata.uns["rank_genes_groups"]["names"].dtype.names == filled
    annotate(adata, "nbmix", results_of(small_data(), n_components=1, folds=1), genes, embed=False)
    assert "rank_genes_groups" not in adata.uns
    assert adata.uns["nbmix"]["markers"]["nearest"].isna().all()


def test_what_fails_is_left_out(adata, caplog):
    class Broken(Results):
        @property
        def embedding(self):
            raise ValueError("no room")

    results = results_of(small_data())
    results = Broken(results.data, results.model, results.cells)
    annotate(adata, "nbmix", results, np.arange(1, adata.n_vars - 1))
    assert "embedding: left out of the fields of the AnnData: ValueError: no room" in caplog.text
    assert "X_umap" not in adata.obsm and "markers" in adata.uns["nbmix"]


def test_what_cluster_adds(adata):
    results, genes = results_of(small_data()), np.arange(1, adata.n_vars - 1)
    annotate(adata, "other", results, genes)
    assert "choice" not in adata.uns["other"]
    choice = Choice(np.array([1, 2]), np.array([-3.0, -2.0]), np.array([0.0, 0.1]), 2, None)
    results.model.choice = choice.plain
    annotate(adata, "nbmix", results, genes)
    own = adata.uns["nbmix"]
    assert own["n_iterations"] == 2
    table = named_markers(results)
    best = table[table["rank"] <= TOP_MARKERS].reset_index(drop=True)
    for name in ("component", "nearest"):
        assert own["markers"][name].dtype == adata.obs["nbmix"].dtype
        assert own["markers"][name].tolist() == best[name].astype(str).tolist()
    numbers = best.columns.drop(["component", "nearest"])
    pd.testing.assert_frame_equal(own["markers"][numbers], best[numbers])
    assert np.array_equal(adata.obsm["X_nbmix_umap"], results.embedding.coordinates)
    assert adata.uns["rank_genes_groups"] is adata.uns["other_rank_genes_groups"]  # where it came first
    pd.testing.assert_frame_equal(own["choice"], choice.table())

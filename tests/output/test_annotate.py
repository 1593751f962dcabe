"""The fields of an AnnData that a fit fills."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from nbmix.output.annotate import add_fields, annotate
from nbmix.output.report import TOP_MARKERS
from nbmix.output.results import named_markers
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
    of_cells = ["_log_likelihood", "_misfit", "_fits_no_group", "_size_factor"]
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
    pd.testing.assert_frame_equal(own["markers"], table[table["rank"] <= TOP_MARKERS].reset_index(drop=True))
    pd.testing.assert_frame_equal(own["choice"], choice.table())

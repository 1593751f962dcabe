"""Markers as scanpy has them."""

from __future__ import annotations

import numpy as np

from nbmix.output.rank_genes import rank_genes_groups
from nbmix.output.results import named_markers
from tests.helpers.results import results_of
from tests.helpers.running import small_data


def test_they_are_those_of_the_table(results):
    names = np.array(["first", *results.data.data.gene_names, "last"], dtype=object)
    found = rank_genes_groups(results, "mix", names, np.arange(1, len(names) - 1))
    table = named_markers(results)
    assert found["params"]["groupby"] == "mix"
    for k in (0, 1):
        rows = table[table["component"] == k]
        assert found["names"][str(k)].tolist() == [*rows["gene"], "first", "last"]
        for name, column, unknown in (
            ("logfoldchanges", "log2_fc_rest", 0.0),
            ("pvals", "lfsr_rest", 0.5),
            ("pvals_adj", "lfsr_rest", 0.5),
        ):
            wanted = [*rows[column], unknown, unknown]
            np.testing.assert_allclose(found[name][str(k)], wanted, rtol=1e-6, atol=0)
        scores = found["scores"][str(k)]
        assert (np.diff(scores) <= 0).all() and (scores[-2:] == scores.min()).all()


def test_groups_without_cells_are_left_out_and_one_group_has_none():
    data = small_data()
    alone = results_of(data, n_components=1, folds=1)
    assert rank_genes_groups(alone, "nbmix", data.gene_names) is None
    many = results_of(data, n_components=12, folds=1)
    found = rank_genes_groups(many, "nbmix", data.gene_names)
    assert found["names"].dtype.names == tuple(str(k) for k in np.unique(many.assignments))

"""Markers as scanpy has them."""

from __future__ import annotations

import numpy as np

from nbmix.output.rank_genes import rank_genes_groups
from nbmix.output.results import named_markers
from tests.helpers.results import results_of
from tests.helpers.running import small_data


def test_they_are_those_of_the_table(results):
    names = np.array(["first", *results.data.data.gene_names, "last"], dtype=object)
    genes = np.arange(1, len(names) - 1)
    found = rank_genes_groups(results.markers, {0: "0", 1: "B cells"}, "mix", names, genes)
    table = named_markers(results)
    assert found["params"]["groupby"] == "mix"
    for k, label in enumerate(("0", "B cells")):
        rows = table[table["component"] == k]
        assert found["names"][label].tolist() == [*rows["gene"], "first", "last"]
        for name, column, unknown in (
            ("logfoldchanges", "log2_fc_rest", 0.0),
            ("pvals", "lfsr_rest", 0.5),
            ("pvals_adj", "lfsr_rest", 0.5),
        ):
            wanted = [*rows[column], unknown, unknown]
            np.testing.assert_allclose(found[name][label], wanted, rtol=1e-6, atol=0)
        scores = found["scores"][label]
        assert (np.diff(scores) <= 0).all() and (scores[-2:] == scores.min()).all()


def test_one_group_of_several():
    data = small_data()
    markers = results_of(data, n_components=3, folds=1).markers
    found = rank_genes_groups(markers, {2: "2"}, "nbmix", data.gene_names)
    assert found["names"].dtype.names == ("2",)
    assert sorted(found["names"]["2"]) == sorted(data.gene_names)

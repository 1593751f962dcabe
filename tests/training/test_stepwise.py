"""A fit that goes on with parts: genes by name, genes that are new, and sums that a file has kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import nbmix
from nbmix.core.settings import MixtureSettings
from nbmix.data.from_arrays import make_array_data
from nbmix.errors import InputError
from nbmix.training.stepwise import running_of, with_genes

COUNTS = nbmix.simulate(n=200, p=40, k=2, s=1e3, seed=3).counts


def part_of(counts, names=None):
    return make_array_data(counts, gene_names=names)


def test_genes_come_in_the_order_of_the_fit():
    names = np.array([f"g{j}" for j in range(40)])
    turned = part_of(COUNTS[:, ::-1], names[::-1])
    found = with_genes(turned, names, True)
    np.testing.assert_array_equal(found.counts.toarray(), COUNTS.toarray())
    np.testing.assert_array_equal(found.gene_names, names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"g{j}" for j in range(39)] + ["other"], "1 genes of the first part are missing, such as 'g39'"),
        ([f"g{j}" for j in range(40)] + ["other"], "1 genes are none of the first part, such as 'other'"),
    ],
)
def test_other_genes_are_named(names, message):
    counts = np.ones((5, len(names)))
    with pytest.raises(InputError, match=message):
        with_genes(part_of(counts, names), np.array([f"g{j}" for j in range(40)]), True)


def test_genes_that_had_no_count_say_nothing_of_the_cells_they_come_with():
    first, later = COUNTS[:120].tolil(copy=True), COUNTS[120:].tolil(copy=True)
    first[:, :7] = 0
    mixture = nbmix.NBMixture(2, start="kmeans", folds=3).partial_fit(first.tocsr())
    sizes = np.full(80, 700.0)
    with_them = mixture.predict_proba(later.tocsr(), size_factors=sizes)
    mixture.partial_fit(later.tocsr(), size_factors=sizes)
    np.testing.assert_allclose(mixture.responsibilities_, with_them, atol=1e-5)
    assert np.isfinite(mixture.component_log_mean_).all()
    assert MixtureSettings(2, folds=3).learns_prior  # which new genes have a part in


def test_damaged_sums_are_refused():
    with pytest.raises(InputError, match=r"a\.ckpt: the sums of its parts are damaged"):
        running_of({"census": {}, "statistics": [torch.zeros(2)]}, "a.ckpt")

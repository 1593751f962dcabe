"""Components joined to groups: what a fit knows of it, and groups in an AnnData."""

from __future__ import annotations

import json
from itertools import pairwise

import anndata as ad
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

import nbmix
from nbmix.core.joins import Join, JoinTree
from nbmix.errors import InputError
from nbmix.models.amortized import AmortizedMixture
from nbmix.models.mixture_em import MixtureEM
from nbmix.output.groups import JoinEvidence, joins_table
from tests.helpers.running import fit, small_data

TREE = JoinTree(
    (
        Join(3, (0,), (2,), 1.5, 0.2, 0.7, 10),
        Join(2, (0, 2), (1,), 8.0, 0.0, 1e-9, 20),
    ),
    (((0, 1, 2),), ((0, 2), (1,)), ((1,), (2,), (0,))),
)


@pytest.fixture(scope="module")
def adata():
    """Two kinds that are cut into five components."""
    cells = nbmix.simulate(n=300, p=120, k=2, seed=3)
    adata = ad.AnnData(cells.counts)
    adata.obs["kind"] = cells.labels
    nbmix.cluster(adata, 5, start="kmeans")
    return adata


def test_a_table_of_joins():
    table = joins_table(TREE)
    assert table["first"].tolist() == ["0", "0+2"]
    assert table["second"].tolist() == ["2", "1"]
    assert table["gap"].tolist() == [False, True]
    assert table["n_groups"].tolist() == [3, 2]


def test_components_of_one_kind_are_joined_and_kinds_are_not(adata):
    nbmix.regroup(adata)
    assert adjusted_rand_score(adata.obs["kind"], adata.obs["nbmix_groups"]) == 1


@pytest.mark.parametrize("n_groups", [1, 2, 3])
def test_groups_are_sums_of_components(adata, n_groups):
    found = nbmix.regroup(adata, n_groups, key_added="some", copy=True)
    assert "some" not in adata.obs
    q, of_components = found.obsm["X_some"], adata.obsm["X_nbmix"]
    assert q.shape == (300, n_groups)
    np.testing.assert_allclose(q.sum(1), 1)
    labels = found.obs["some"].cat.categories.tolist()
    for column, label in enumerate(labels):
        members = [int(k) for k in found.uns["some"][label].split("+")]
        np.testing.assert_allclose(q[:, column], of_components[:, members].sum(1))
        sizes = np.bincount(of_components.argmax(1), minlength=5)
        assert int(label) == max(members, key=lambda k: sizes[k])  # its largest component
    np.testing.assert_array_equal(found.obs["some"].cat.codes, q.argmax(1))
    np.testing.assert_array_equal(found.obs["some_probability"], q.max(1))


def test_cuts_are_nested(adata):
    cuts = json.loads(adata.uns["nbmix"]["cuts"])
    for fewer, more in pairwise(cuts):
        assert all(any(set(group) <= set(whole) for whole in fewer) for group in more)


def test_it_goes_through_a_file(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    again = ad.read_h5ad(tmp_path / "cells.h5ad")
    for one in (adata, again):
        nbmix.regroup(one, "auto")
    assert again.obs["nbmix_groups"].tolist() == adata.obs["nbmix_groups"].tolist()


@pytest.mark.parametrize("n_groups", [0, 9, "many", 1.5])
def test_so_many_groups_are_not_to_be_had(adata, n_groups):
    with pytest.raises(InputError, match=rf"^n_groups={n_groups}: this fit can be cut into 1 to \d groups"):
        nbmix.regroup(adata, n_groups)


def test_a_fit_without_joins():
    adata = ad.AnnData(nbmix.simulate(n=100, p=60, k=2, seed=1).counts)
    nbmix.cluster(adata, 2, start="kmeans", folds=1)
    assert "joins" not in adata.uns["nbmix"]
    with pytest.raises(InputError, match=r"holds no joins of components; run nbmix.cluster with model='em'"):
        nbmix.regroup(adata, 2)


def test_only_cells_that_were_not_seen_are_evidence():
    data = small_data()
    crossed = MixtureEM(data.gene_names, n_components=2, folds=3)
    module, cells = fit(crossed, data, epochs=2)
    evidence = JoinEvidence.of(module, crossed, cells)
    q = np.exp(evidence.log_joint - np.logaddexp.reduce(evidence.log_joint, axis=1, keepdims=True))
    assert np.abs(q - cells.responsibilities.numpy()).max() < 0.2  # copies differ in their weights alone
    plain = MixtureEM(data.gene_names, n_components=2, folds=1)
    assert JoinEvidence.of(*_placed(fit(plain, data, epochs=2), plain)) is None
    encoder = AmortizedMixture(data.gene_names, n_components=2, encoder_epochs=1)
    assert JoinEvidence.of(*_placed(fit(encoder, data, epochs=1), encoder)) is None


def _placed(fitted, model):
    module, cells = fitted
    return module, model, cells


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
    with pytest.raises(InputError, match="does not know the cells of its fit; give X"):
        loaded.cut(2)
    with pytest.raises(InputError, match="can be cut into 1 to"):
        mixture.cut(9)

"""Starts from a partition: labels, k-means, topics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.metrics import adjusted_rand_score

from nbmix.core.settings import MixtureSettings
from nbmix.errors import InputError
from nbmix.starts.clusters import KMeansStart, LabelsStart, TopicsStart
from tests.helpers.running import small_data


def generator():
    return np.random.default_rng(0)


@pytest.mark.parametrize("make", [KMeansStart(), TopicsStart()], ids=["kmeans", "topics"])
def test_finds_the_groups_of_a_simulation(make):
    data = small_data(n_cells=80, n_components=3)
    q = make(data, MixtureSettings(3), generator()).responsibilities
    np.testing.assert_allclose(q.sum(1).numpy(), 1, rtol=1e-12)
    assert adjusted_rand_score(data.labels, q.argmax(1).numpy()) == 1


def test_topics_as_means_are_in_the_unit_of_the_size_factors():
    data = small_data()
    relative = replace(data, size_factors=data.size_factors / data.size_factors.mean())
    for cells in (data, relative):
        means = TopicsStart("means")(cells, MixtureSettings(2), generator()).components.log_mean.exp()
        expected = means.sum(1).mean().item() * cells.size_factors.sum()
        assert expected == pytest.approx(data.counts.sum(), rel=1e-6)


@pytest.mark.parametrize(
    "make", [KMeansStart(), TopicsStart(), TopicsStart("means")], ids=["kmeans", "topics", "topics-means"]
)
def test_labels_are_not_seen(make):
    data = small_data()
    first = make(data, MixtureSettings(2), generator())
    second = make(replace(data, labels=None), MixtureSettings(2), generator())
    for a, b in zip(first, second, strict=True):
        assert a is b is None or all(map(torch.equal, a, b))


def test_topics_are_distributions_that_give_the_mean_of_each_cell():
    data = small_data()
    weights, topics = TopicsStart(iterations=300).fit(data, 2, generator())
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(topics.sum(1), 1, rtol=1e-12)
    # a fixed point of the Poisson likelihood gives back every gene's total
    totals = (data.size_factors[:, None] * (weights @ topics)).sum(0)
    np.testing.assert_allclose(totals, np.asarray(data.counts.sum(0)).ravel(), rtol=1e-3, atol=0.5)


def test_topics_as_means():
    data = small_data()
    start = TopicsStart("means")(data, MixtureSettings(2), generator())
    _, topics = TopicsStart().fit(data, 2, generator())
    assert start.responsibilities is None
    shared = topics > 1e-6
    np.testing.assert_allclose(start.components.log_mean.exp().numpy()[shared], topics[shared], rtol=1e-9)
    assert torch.isfinite(start.components.log_mean).all()


def test_an_empty_cell_has_no_topic():
    data = small_data()
    counts = sp.vstack([data.counts[:-1], sp.csr_matrix((1, data.n_genes), dtype=np.float32)], format="csr")
    q = TopicsStart()(replace(data, counts=counts), MixtureSettings(2), generator()).responsibilities
    assert q[-1].tolist() == [0.5, 0.5]


def test_topics_by_another_name():
    with pytest.raises(InputError, match=r"start\.use=z: choose responsibilities or means"):
        TopicsStart("z")


def test_spare_components_begin_empty():
    data = small_data(n_cells=6)
    same = replace(data, counts=sp.vstack([data.counts[0]] * 6, format="csr"), size_factors=np.full(6, 5.0))
    q = KMeansStart()(same, MixtureSettings(3), generator()).responsibilities
    assert sorted(q.sum(0).tolist()) == [0, 0, 6]


def test_labels_are_the_responsibilities():
    data = small_data()
    q = LabelsStart()(data, MixtureSettings(2), generator()).responsibilities
    values = np.unique(data.labels)
    assert np.array_equal(values[q.argmax(1).numpy()], data.labels)
    assert set(q.unique().tolist()) == {0.0, 1.0}


def test_as_many_components_as_labels():
    with pytest.raises(InputError, match=r"there are 2 labels; set model\.n_components=2"):
        LabelsStart()(small_data(), MixtureSettings(3), generator())


def test_no_labels():
    with pytest.raises(InputError, match=r"no labels; set data\.label_key"):
        LabelsStart()(replace(small_data(), labels=None), MixtureSettings(2), generator())


@pytest.mark.parametrize("use", ["responsibilities", "means"])
def test_topics_of_cells_of_several_batches_are_refused(use):
    data = replace(small_data(), origins=np.arange(60) % 2, origin_names=("a", "b"))
    with pytest.raises(
        InputError, match=r"start=topics: .*batches \(data\.batch_key\).* choose start=random"
    ):
        TopicsStart(use)(data, MixtureSettings(2), generator())

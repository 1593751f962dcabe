"""Leiden on graphs whose communities are known, and scanpy's path on real counts."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.metrics import adjusted_rand_score

from nbmix.data.read import read_h5ad
from nbmix.data.zheng import MIXTURES
from nbmix.errors import InputError
from nbmix.evaluation.baselines.base import require
from nbmix.evaluation.baselines.kmeans import gaussian_mixture, kmeans
from nbmix.evaluation.baselines.leiden import NeighborGraph, leiden, leiden_with, scanpy_graph
from tests.helpers.running import ROOT, small_data

PBMC = ROOT / "../shared/data/pbmc_facs.h5ad"


@pytest.fixture
def packages():
    """Skips where the extra is not installed; imports it quietly, as scanpy warns of its own future."""
    try:
        require("scanpy", "igraph", "leidenalg")
    except InputError as error:
        pytest.skip(str(error))


def cliques(sizes, bridge=0.0):
    """Complete graphs of weight 1, neighbouring cliques joined by one edge of weight ``bridge``."""
    graph = sp.block_diag([np.ones((n, n)) - np.eye(n) for n in sizes], format="lil")
    ends = np.cumsum(sizes)[:-1]
    for end in ends if bridge else ():
        graph[end - 1, end] = graph[end, end - 1] = bridge
    return NeighborGraph(np.zeros((sum(sizes), 1), np.float32), graph.tocsr())


def test_cliques_are_communities(packages):
    sizes = [12, 10, 8]
    found = leiden(cliques(sizes, bridge=0.1))
    assert found.n == 3
    np.testing.assert_array_equal(found.codes, np.repeat([0, 1, 2], sizes))  # 0 is the largest


@pytest.mark.parametrize("wanted", [1, 2, 4])
def test_the_resolution_for_a_number(packages, wanted):
    # pairs of cliques that are bound more strongly than the pairs are
    graph = cliques([10, 10, 10, 10]).connectivities.tolil()
    for a, b, weight in ((9, 10, 8.0), (29, 30, 8.0), (19, 20, 2.0)):
        graph[a, b] = graph[b, a] = weight
    graph = NeighborGraph(np.zeros((40, 1), np.float32), graph.tocsr())
    found = leiden_with(graph, wanted)
    assert found.n == wanted
    again = leiden(graph, found.resolution)
    np.testing.assert_array_equal(found.codes, again.codes)
    np.testing.assert_array_equal(found.codes == found.codes[0], np.arange(40) < 40 // wanted)


def test_the_nearest_number_where_none_is_hit(packages):
    assert leiden_with(cliques([5, 5, 5]), 1).n == 3  # parts that nothing joins


@pytest.mark.parametrize("wanted", [0, 31])
def test_a_number_that_cannot_be(wanted):
    with pytest.raises(InputError, match=f"n_communities={wanted}: must be from 1 to the 30 cells"):
        leiden_with(cliques([12, 10, 8]), wanted)


@pytest.mark.parametrize("missing", ["scanpy", "igraph", "leidenalg"])
def test_what_is_not_installed(packages, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf"{missing} is not installed.*pip install 'nbmix\[benchmarks\]'"):
        leiden(cliques([3, 3]))


def test_too_few_cells(packages):
    with pytest.raises(InputError, match="2 cells x 80 genes: Leiden needs three"):
        scanpy_graph(small_data().select_cells(np.arange(2)))


@pytest.mark.slow
def test_groups_of_a_simulation(packages):
    data = small_data(n_cells=90, n_components=3)
    before = data.counts.copy()
    graph = scanpy_graph(data)
    assert adjusted_rand_score(data.labels, leiden_with(graph, 3).codes) == 1
    assert (data.counts != before).nnz == 0
    unlabelled = scanpy_graph(replace(data, labels=None))
    np.testing.assert_array_equal(graph.pcs, unlabelled.pcs)


@pytest.mark.slow
@pytest.mark.skipif(not PBMC.is_file(), reason="needs the shared data")
def test_what_scanpy_users_get_on_four_sorted_populations(packages):
    # adjusted Rand indices that its README has: Leiden (6 communities), at the true K, k-means, normals
    data = read_h5ad(PBMC, populations=MIXTURES["mix4"])
    graph = scanpy_graph(data)
    default, searched = leiden(graph), leiden_with(graph, 4)
    scores = [
        adjusted_rand_score(data.labels, codes)
        for codes in (
            default.codes,
            searched.codes,
            kmeans(graph.pcs, 4),
            gaussian_mixture(graph.pcs, 4).argmax(1),
        )
    ]
    assert (default.n, searched.n) == (6, 4)
    np.testing.assert_allclose(scores, [0.758, 0.986, 0.992, 0.996], atol=0.01)

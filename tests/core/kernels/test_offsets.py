"""Offsets of genes, and statistics that are moved to other nodes by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbmix.core.kernels.blocks import LANES
from nbmix.core.kernels.offsets import JudgedBy, SeenCells, SharedNodes, offset_rows
from nbmix.core.nodes import SizeFactorNodes

FOLDS, K, NODES = 2, 2, 5


@pytest.mark.parametrize("n_levels", [1, 3])
def test_moved_statistics_integrate_polynomials_of_moved_nodes(n_levels):
    rng = np.random.default_rng(0)
    # gene 0 has rows for both origins, gene 1 none, gene 2 for the second
    first, origin, gene = np.array([0, 2, 2, 3]), np.array([0, 1, 1]), [0, 0, 2]
    log_nodes, width = np.linspace(-1, 1, NODES), K * n_levels * NODES
    rate, node = rng.random((FOLDS, 3, width)), rng.random((2, 2, width))
    rate[:, 2] = 0.0
    cells = SeenCells(first, origin, rate, node, np.array([1, -1]), log_nodes)
    base = rng.normal(0, 0.1, (2, 3))
    offset = np.array([[0.0, 0.4, -0.3], [0.2, 0.0, 0.1]])
    offset[1, 1] = base[1, 0]  # it stays where it is
    reach = torch.full((3,), 2.0, dtype=torch.float64)
    to_nodes, barycentric = (t.numpy() for t in SizeFactorNodes.of_genes(-reach, reach, LANES))
    shared = SharedNodes(to_nodes, barycentric, *np.zeros((2, 2, 3, K * n_levels * LANES)), True)
    none = np.empty((2, 0, 0))
    never = np.zeros((2, 3), dtype=bool)
    judged = JudgedBy(none, none, none, none[0], np.ones((2, 3)), base, never, 0.0, 3.0, 0.0)
    begun = offset.copy()
    offset_rows(0, 3, cells, judged, offset, np.zeros((2, 3)), shared)
    np.testing.assert_array_equal(offset, begun)
    assert not shared.rate[:, 1].any() and not shared.rate[:, 2].any()
    seen = np.stack([rate[0], rate.sum(0)])
    for power in range(LANES):
        for copy in range(2):
            moved, of_node = np.zeros((2, 3))
            for row in range(3):
                to = (log_nodes + offset[copy, row]) ** power
                change = np.tile(to - (log_nodes + base[copy, gene[row]]) ** power, K * n_levels)
                moved[gene[row]] += seen[copy, row] @ change
                of_node[gene[row]] += node[copy, origin[row]] @ change
            to = np.tile(to_nodes**power, K * n_levels)
            np.testing.assert_allclose((shared.rate[copy] * to).sum(1), moved, atol=1e-10)
            np.testing.assert_allclose((shared.node[copy] * to).sum(1), of_node, atol=1e-10)

"""Statistics that are moved to other nodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbmix.core.kernels.blocks import LANES
from nbmix.core.kernels.offsets import shifted_rows
from nbmix.core.nodes import SizeFactorNodes


@pytest.mark.parametrize("n_levels", [1, 3])
def test_moved_statistics_integrate_polynomials_of_moved_nodes(n_levels):
    rng = np.random.default_rng(0)
    log_nodes, offset = np.linspace(-1, 1, 5), np.array([0.0, 0.4, -0.3])
    reach = torch.full((3,), 2.0, dtype=torch.float64)
    to_nodes, barycentric = (t.numpy() for t in SizeFactorNodes.of_genes(-reach, reach, LANES))
    rate, node = rng.random((3, 2, 5 * n_levels)), rng.random((1, 2, 5 * n_levels))
    rate[2] = 0.0
    to_rate, to_node = np.zeros((2, 3, 2, LANES * n_levels))
    nodes, seen, total = (log_nodes, to_nodes, barycentric), (rate, node), (to_rate, to_node)
    none, base = np.empty(0), np.array([0.0, 0.1, -0.3])
    # as with the base, and then moved from there
    shifted_rows(0, 3, np.arange(3), base, none, nodes, n_levels, seen, total)
    shifted_rows(0, 3, np.arange(3), offset, base, nodes, n_levels, seen, total)
    for power in range(LANES):
        for j in range(3):
            moved = np.tile((log_nodes + offset[j]) ** power, n_levels)
            to = np.tile(to_nodes[j] ** power, n_levels)
            np.testing.assert_allclose(to_rate[j] @ to, rate[j] @ moved, atol=1e-10)
            np.testing.assert_allclose(to_node[j] @ to, node[0] @ moved, atol=1e-10)

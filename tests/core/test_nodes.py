from __future__ import annotations

import numpy as np
import pytest
import torch

from nbmix.core.nodes import NODE_TOLERANCE, SizeFactorNodes, node_softplus

RANGES = {
    "one cell": np.array([1234.5]),
    "all equal": np.full(7, 1e4),
    "equal but for rounding": 1e4 * (1 + 1e-13 * np.arange(5)),
    "very close": 1e4 * (1 + 1e-10 * np.arange(5)),
    "close": np.linspace(9_990, 10_010, 50),
    "usual": np.geomspace(800, 30_000, 200),
    "unusually wide": np.geomspace(10, 1e6, 300),
    "around one": np.geomspace(0.05, 20, 100),
}
LOG_RHO = np.linspace(-40, 15, 111)


@pytest.mark.parametrize("name", RANGES)
def test_interpolation_holds_its_tolerance_for_every_cell_and_rho(name):
    s = RANGES[name]
    nodes = SizeFactorNodes.spanning(s)
    log_rho = torch.from_numpy(LOG_RHO)
    at_nodes = node_softplus(nodes, log_rho, torch.zeros_like(log_rho))  # (rhos, nodes)
    got = nodes.weights(torch.from_numpy(s)) @ at_nodes.T
    want = np.log1p(s[:, None] * np.exp(LOG_RHO))
    np.testing.assert_allclose(got, want, rtol=NODE_TOLERANCE)


@pytest.mark.parametrize("name", RANGES)
def test_interpolation_weights_of_a_cell_sum_to_one(name):
    s = RANGES[name]
    weights = SizeFactorNodes.spanning(s).weights(torch.from_numpy(s))
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)


def test_a_looser_tolerance_takes_fewer_nodes_and_is_held_too():
    s = RANGES["usual"]
    loose, tight = SizeFactorNodes.spanning(s, 1e-3), SizeFactorNodes.spanning(s, 1e-10)
    assert loose.log_nodes.numel() < tight.log_nodes.numel()
    log_rho = torch.from_numpy(LOG_RHO)
    got = loose.weights(torch.from_numpy(s)) @ node_softplus(loose, log_rho, torch.zeros_like(log_rho)).T
    np.testing.assert_allclose(got, np.log1p(s[:, None] * np.exp(LOG_RHO)), rtol=1e-3)


def test_a_size_factor_on_a_node_takes_that_node_alone():
    nodes = SizeFactorNodes.spanning(RANGES["usual"])
    s = torch.exp(nodes.log_nodes)
    on_node = torch.log(s) == nodes.log_nodes  # exp and log round
    assert on_node.any()
    weights = nodes.weights(s)
    assert torch.isfinite(weights).all()
    assert torch.equal(weights[on_node], torch.eye(len(s), dtype=torch.float64)[on_node])
    np.testing.assert_allclose(weights, np.eye(len(s)), atol=1e-11)


@pytest.mark.parametrize("others", [[50.0, 7e3], [50.0], []])
def test_a_zero_size_factor_has_a_row_of_zeros(others):
    s = np.array([0.0, *others, 0.0])
    weights = SizeFactorNodes.spanning(s).weights(torch.from_numpy(s))
    assert (weights[[0, -1]] == 0).all()
    np.testing.assert_allclose(weights[1:-1].sum(1), 1, rtol=1e-12)

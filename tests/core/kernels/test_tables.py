"""Compiled tables against those of other devices."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.kernels.blocks import GENES_AT_ONCE
from nbmix.core.nodes import SizeFactorNodes, node_softplus
from nbmix.core.tables import (
    likelihood_tables,
    pair_table,
    split_table,
    step_table,
)
from tests.helpers.cases import CASES, Case, random_components
from tests.helpers.elsewhere import back, elsewhere
from tests.helpers.problems import make_problem


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("n_genes", [1, 25, GENES_AT_ONCE, 2 * GENES_AT_ONCE + 7])
def test_compiled_tables_are_those_of_other_devices(n_genes):
    problem = make_problem(30, max(n_genes, 2), 4, seed=2)
    a, b = (t[:, :n_genes] for t in random_components(4, n_genes, 2))
    got = likelihood_tables(problem.basis, a, b) if n_genes > 1 else None
    nodes = problem.basis.nodes
    wanted = node_softplus(nodes, a.T, b.T)
    if got is None:
        basis = Basis.of(problem.counts[:, :1], problem.size_factors)
        got = likelihood_tables(basis, a, b)
    torch.testing.assert_close(got.grown, wanted, rtol=1e-14, atol=0)
    torch.testing.assert_close(got.zero, torch.einsum("jkm,kj->km", wanted, torch.exp(b)), rtol=1e-13, atol=0)


def test_tables_of_other_devices_give_the_same_log_likelihood():
    problem = make_problem(seed=1)
    here = likelihood_tables(problem.basis, problem.log_mean, problem.log_inv_disp, torch.float64)
    there = likelihood_tables(
        problem.basis, elsewhere(problem.log_mean), elsewhere(problem.log_inv_disp), torch.float64
    )
    for mine, theirs in zip(here[:4], there[:4], strict=True):
        torch.testing.assert_close(mine, back(theirs), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize("make", [step_table, split_table])
def test_tables_for_float32_are_the_same_on_other_devices(make, sizes):
    problem = make_problem(seed=1)
    s = problem.size_factors if sizes == "unequal" else np.full_like(problem.size_factors, 1e3)
    basis = Basis.of(problem.counts, s)
    batch = CellBatch.build(problem.counts, s, basis)
    tables = likelihood_tables(basis, problem.log_mean, problem.log_inv_disp)
    rate = tables.log_mean[:, :, None] - tables.grown @ batch.to_own.T
    here, there = (make(batch, basis, r, tables.pair, 2.0**-6) for r in (rate, elsewhere(rate)))
    torch.testing.assert_close(here, back(there), rtol=1e-6, atol=1e-9)  # the compiler fuses products


def test_the_compiled_pair_table_is_that_of_torch(case):
    for seed in range(3):
        _, b = random_components(case.n_components, case.n_genes, seed)
        got, want = pair_table(case.basis.levels, b), back(pair_table(case.basis.levels, elsewhere(b)))
        # torch takes differences of running sums over all genes
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12 * float(want.max()))


@pytest.mark.parametrize("log_rho", [-700.0, -40.0, 0.0, 40.0, 600.0])
def test_compiled_tables_hold_any_ratio_of_mean_and_dispersion(log_rho):
    nodes = SizeFactorNodes.spanning(np.array([10.0, 1e6]))
    basis = Basis(nodes, Basis.of(sp.csr_matrix(np.ones((1, 3), np.float32)), np.ones(1)).levels)
    a = torch.full((2, 3), log_rho, dtype=torch.float64)
    got = likelihood_tables(basis, a, torch.zeros_like(a))
    want = np.logaddexp(0, nodes.log_nodes.numpy() + log_rho)
    np.testing.assert_allclose(got.grown, np.broadcast_to(want, (3, 2, len(want))), rtol=1e-12)

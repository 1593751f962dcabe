"""Small counts with every awkward shape in them, and the slow reference that the fast forms are held to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.special import gammaln

from nbmix.core.batch import Basis, CellBatch


def reference_log_likelihood(x, size_factors, log_mean, log_inv_disp):
    """(cells, K) float64 sum over genes of ln NB, by SciPy on dense (cells, genes) counts, K one by one."""
    x = np.asarray(x, dtype=np.float64)
    s = np.broadcast_to(np.asarray(size_factors, dtype=np.float64).reshape(-1, 1), (x.shape[0], 1))
    columns = []
    for a, b in zip(np.asarray(log_mean, float), np.asarray(log_inv_disp, float), strict=True):
        r, rho = np.exp(b), np.exp(a - b)
        log_scaled = np.log(np.where(s > 0, s, 1.0)) + a - b
        terms = gammaln(x + r) - gammaln(r) - gammaln(x + 1) + x * log_scaled - (x + r) * np.log1p(s * rho)
        columns.append(terms.sum(axis=1))
    return np.stack(columns, axis=1)


class Problem(NamedTuple):
    """Counts of ``cells`` x ``genes`` with K arbitrary components, that need not fit them."""

    counts: sp.csr_matrix
    size_factors: np.ndarray
    log_mean: torch.Tensor
    log_inv_disp: torch.Tensor
    basis: Basis
    batch: CellBatch


def make_problem(
    n_cells=40, n_genes=25, n_components=3, seed=0, size_factors=(1e2, 1e5), deepest=1e4
) -> Problem:
    """Cell 0 is empty, gene 0 is silent, gene 1 holds counts above 20; means differ by e^9 between genes."""
    rng = np.random.default_rng(seed)
    s = np.exp(rng.uniform(*np.log(size_factors), n_cells))
    mean = s[:, None] * np.exp(rng.uniform(-14, -5, n_genes))
    x = rng.poisson(mean * rng.gamma(1.0, 1.0, (n_cells, n_genes)))
    x[:, 1] = rng.integers(0, 60, n_cells)
    x[-1, 1] = 40
    x = np.minimum(x, int(deepest))
    x[0] = 0
    x[:, 0] = 0
    counts = sp.csr_matrix(x.astype(np.float32))
    log_mean = torch.from_numpy(rng.uniform(-14, -5, (n_components, n_genes)))
    log_inv_disp = torch.from_numpy(rng.uniform(-3, 6, (n_components, n_genes)))
    basis = Basis.of(counts, s)
    return Problem(counts, s, log_mean, log_inv_disp, basis, CellBatch.build(counts, s, basis))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine make tensors of this size forty times slower."""
    torch.set_num_threads(1)


@pytest.fixture
def problem() -> Problem:
    return make_problem()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)

"""The encoder on CSR counts is the dense network of the source."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch

from nbmix.core.batch import Basis, CellBatch
from nbmix.models.networks import SparseEncoder


def run(encoder, counts):
    sizes = np.asarray(counts.sum(1), np.float64).ravel()
    basis = Basis.of(counts, sizes)
    return encoder(CellBatch.build(counts, sizes, basis), basis.levels)


def test_equals_the_dense_network():
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.5, (7, 12)).astype(np.float32)
    counts[3] = 0
    torch.manual_seed(0)
    encoder = SparseEncoder(12, 3, n_hidden=5)
    hidden = torch.relu(torch.log1p(torch.from_numpy(counts)) @ encoder.first + encoder.first_bias)
    dense = torch.log_softmax(encoder.last(hidden), 1)
    torch.testing.assert_close(run(encoder, sp.csr_matrix(counts)), dense)


def test_cells_without_counts():
    torch.manual_seed(0)
    encoder = SparseEncoder(12, 3)
    log_q = run(encoder, sp.csr_matrix((2, 12), dtype=np.float32))
    assert torch.equal(log_q[0], log_q[1])
    torch.testing.assert_close(log_q.exp().sum(1), torch.ones(2))


def test_a_batch_without_counts_still_depends_on_every_weight():
    encoder = SparseEncoder(12, 3)
    run(encoder, sp.csr_matrix((2, 12), dtype=np.float32)).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert encoder.first.grad.abs().sum() == 0

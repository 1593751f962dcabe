"""Networks on sparse counts against dense ones, normals against torch's, and the decoder's pieces."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
import torch
from torch.distributions import Normal as TorchNormal
from torch.distributions import kl_divergence

from nbmix.core.batch import Basis, CellBatch
from nbmix.models.networks import Decoder, Normal, SparseCells, SparseEncoder, SparseTrunk, normal_kl


def run(encoder, counts):
    sizes = np.asarray(counts.sum(1), np.float64).ravel()
    basis = Basis.of(counts, sizes)
    return encoder(CellBatch.build(counts, sizes, basis), basis.levels)


def test_encoder_is_the_dense_network():
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


def test_trunk_is_the_dense_network(problem):
    torch.manual_seed(0)
    trunk = SparseTrunk(problem.counts.shape[1], 5).double()
    dense = torch.log1p(torch.from_numpy(problem.counts.toarray()).double()) @ trunk.first + trunk.first_bias
    expected = torch.relu(torch.nn.functional.layer_norm(dense, (5,)))
    torch.testing.assert_close(trunk(problem.batch, problem.basis.levels), expected)


def test_genes_that_are_left_out_count_as_silent():
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(0.5, (7, 12)).astype(np.float32))
    kept = np.r_[2:9]
    silent = sp.csr_matrix(counts.toarray() * np.isin(np.arange(12), kept))
    torch.manual_seed(0)
    encoder = SparseEncoder(12, 3, n_hidden=5)
    expected = run(encoder, silent)
    encoder.restrict_genes(torch.from_numpy(kept))
    torch.testing.assert_close(run(encoder, counts[:, kept].tocsr()), expected)


def test_normals_are_those_of_torch():
    q = Normal.of(torch.randn(4, 3, 10, dtype=torch.float64))
    p = Normal.of(torch.randn(3, 10, dtype=torch.float64))
    mine, theirs = (TorchNormal(n.mean, n.log_sd.exp()) for n in (q, p))
    torch.testing.assert_close(normal_kl(q, p), kl_divergence(mine, theirs).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q.entropy(), mine.entropy().sum(-1), rtol=1e-12, atol=1e-12)
    value = q.sample(torch.randn(4, 3, 5, dtype=torch.float64))
    torch.testing.assert_close(q.log_density(value), mine.log_prob(value).sum(-1), rtol=1e-12, atol=1e-12)


def test_nonzero_counts_in_blocks(problem):
    cells = SparseCells.of(problem.batch, problem.basis.levels)
    whole = problem.counts.toarray()
    for rows in (slice(0, 40), slice(0, 7), slice(7, 39), slice(0, 1)):
        part = cells.block(rows)
        dense = np.zeros((rows.stop - rows.start, whole.shape[1]))
        dense[part.row, part.gene] = part.count
        np.testing.assert_array_equal(dense, whole[rows])


def test_weights_of_rare_genes_start_at_nothing():
    decoder = Decoder(7, 2, 3)
    z = torch.randn(4, 2)
    assert torch.equal(decoder.log_mean(z), decoder.log_mean(z[:1]).expand(4, -1))


def test_a_layer_is_told_the_origin_of_its_cells(problem):
    """As one more input, one-hot, that is nothing at first."""
    torch.manual_seed(0)
    trunk = SparseTrunk(problem.counts.shape[1], 5).double()
    untold = trunk(problem.batch, problem.basis.levels)
    trunk.know_origins(3)
    trunk.double()
    of_origin = [None, *(torch.full((problem.batch.n_cells,), origin) for origin in range(3))]
    batches = [replace(problem.batch, origins=origins) for origins in of_origin]
    for batch in batches:
        torch.testing.assert_close(trunk(batch, problem.basis.levels), untold)
    torch.nn.init.normal_(trunk.of_origin.weight)
    counts = torch.log1p(torch.from_numpy(problem.counts.toarray()).double())
    for batch, one_hot in zip(batches, [torch.full((3,), 1 / 3.0), *torch.eye(3)], strict=True):
        inputs = torch.cat([counts, one_hot.double().expand(len(counts), -1)], 1)
        hidden = inputs @ torch.cat([trunk.first, trunk.of_origin.weight]) + trunk.first_bias
        expected = torch.relu(torch.nn.functional.layer_norm(hidden, (5,)))
        torch.testing.assert_close(trunk(batch, problem.basis.levels), expected)
    assert [trunk.knows(origin) for origin in (-1, 0, 2, 3)] == [False, True, True, False]


def test_a_decoder_is_told_the_origin_of_its_cells():
    torch.manual_seed(0)
    decoder = Decoder(6, 2, 5).double()
    torch.nn.init.normal_(decoder.out.weight)
    decoder.know_origins(2)
    decoder.double()
    torch.nn.init.normal_(decoder.of_origin.weight)
    decoder.offsets.normal_()
    z = torch.randn(4, 2, dtype=torch.float64)
    for origin, one_hot in enumerate(torch.eye(2, dtype=torch.float64)):
        hidden = (
            torch.cat([z, one_hot.expand(4, -1)], 1)
            @ torch.cat([decoder.hidden.weight, decoder.of_origin.weight.T], 1).T
        )
        logits = decoder.out(torch.relu(hidden + decoder.hidden.bias)) + decoder.offsets[origin]
        torch.testing.assert_close(decoder.log_mean(z, origin), torch.log_softmax(logits, 1))

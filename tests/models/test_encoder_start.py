"""An encoder that begins near the posterior."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.likelihood import component_log_likelihood
from nbmix.core.parameters import Components
from nbmix.models.encoder_start import begin_near_posterior
from nbmix.models.networks import SparseEncoder

N_CELLS, N_GENES, TOTAL, SIZE = 30, 50, 8, 2.0


def drawn(n_hidden: int, log_inv_disp: float):
    """Cells of as many counts each, every count 1; three components; an encoder that begins at these."""
    generator = np.random.default_rng(0)
    counts = np.zeros((N_CELLS, N_GENES), np.float32)
    for row in counts:
        row[generator.choice(N_GENES, TOTAL, replace=False)] = 1
    matrix, sizes = sp.csr_matrix(counts), np.full(N_CELLS, SIZE)
    basis = Basis.of(matrix, sizes)
    log_mean = torch.from_numpy(generator.normal(-3, 1, (3, N_GENES)))
    components = Components(log_mean, torch.full_like(log_mean, log_inv_disp))
    log_weights = torch.log(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    torch.manual_seed(0)
    encoder = SparseEncoder(N_GENES, 3, n_hidden)
    is_set = begin_near_posterior(encoder, components, log_weights, basis.levels, SIZE, SIZE / TOTAL)
    joint = component_log_likelihood(matrix, sizes, *components) + log_weights
    batch = CellBatch.build(matrix, sizes, basis)
    with torch.no_grad():
        return is_set, encoder(batch, basis.levels), torch.log_softmax(joint, 1)


@pytest.mark.parametrize("log_inv_disp", [0.0, 8.0])
def test_it_is_the_posterior_where_counts_are_one_and_size_factors_are_alike(log_inv_disp):
    is_set, said, posterior = drawn(6, log_inv_disp)
    assert is_set
    torch.testing.assert_close(said.double(), posterior, atol=1e-4, rtol=0)


def test_too_few_hidden_units_stay_as_drawn():
    is_set, said, _ = drawn(5, 0.0)
    torch.manual_seed(0)
    assert not is_set and said.exp().max() < 0.9

from __future__ import annotations

import numpy as np
import pytest

from nbmix.data.simulate import ENTRIES_AT_ONCE, MAX_SIZE_FACTOR, simulate, simulated_count_data
from nbmix.errors import InputError


def printed_simulate(n, p, k, s=1e4, seed=0):
    """The source notebook's ``simulate``, one-hot labels without pandas."""
    rng = np.random.default_rng(seed)
    z = np.eye(k, dtype=bool)[np.argmax(rng.uniform(size=(n, k)), axis=1)]
    log_mean = rng.uniform(-12, -6, size=(p, k))
    log_inv_disp = rng.uniform(0, 4, size=(p, k))
    lam = rng.negative_binomial(
        n=np.exp(z @ log_inv_disp.T), p=1 / (1 + s * (z @ np.exp(log_mean - log_inv_disp).T))
    )
    x = rng.poisson(lam)
    return x, z, log_mean, log_inv_disp


def test_printed_form_is_the_printed_form():
    x, z, log_mean, log_inv_disp = printed_simulate(n=100, p=500, k=4, seed=1)
    simulation = simulate(n=100, p=500, k=4, seed=1, extra_poisson=True)
    np.testing.assert_array_equal(simulation.counts.toarray(), x)
    np.testing.assert_array_equal(simulation.labels, z.argmax(axis=1))
    np.testing.assert_array_equal(simulation.log_mean, log_mean.T)
    np.testing.assert_array_equal(simulation.log_inv_disp, log_inv_disp.T)


@pytest.mark.parametrize("extra_poisson", [False, True])
@pytest.mark.parametrize("entries_at_once", [ENTRIES_AT_ONCE, 40 * 1000])
def test_moments(entries_at_once, extra_poisson):
    counts, labels, log_mean, log_inv_disp, s = simulate(
        n=20_000, p=40, k=2, seed=2, extra_poisson=extra_poisson, entries_at_once=entries_at_once
    )
    for k in range(2):
        x = counts[labels == k].toarray().astype(float)
        mean, r = s * np.exp(log_mean[k]), np.exp(log_inv_disp[k])
        variance = (1 + extra_poisson) * mean + mean**2 / r
        z_score = (x.mean(axis=0) - mean) / np.sqrt(variance / len(x))
        assert np.abs(z_score).max() < 4.5
        fourth = ((x - mean) ** 4).mean(axis=0)
        z_score = (x.var(axis=0) - variance) / np.sqrt((fourth - variance**2) / len(x))
        assert np.abs(z_score).max() < 4.5


def test_same_seed_same_draw_and_parameters_do_not_depend_on_the_blocks():
    one, again, other = simulate(seed=5), simulate(seed=5), simulate(seed=6)
    assert (one.counts != again.counts).nnz == 0
    assert (one.counts != other.counts).nnz > 0
    blocks = simulate(seed=5, entries_at_once=1)
    np.testing.assert_array_equal(blocks.labels, one.labels)
    np.testing.assert_array_equal(blocks.log_mean, one.log_mean)
    assert blocks.counts.shape == one.counts.shape
    assert blocks.counts.has_canonical_format


def test_shapes_and_types():
    simulation = simulate(n=7, p=5, k=3, s=200)
    assert simulation.counts.shape == (7, 5)
    assert simulation.counts.dtype == np.float32
    assert simulation.log_mean.shape == simulation.log_inv_disp.shape == (3, 5)
    assert simulation.size_factor == 200.0
    assert simulate(n=1, p=1, k=1).counts.shape == (1, 1)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"n": 0}, "n=0 must be 1 or more"),
        ({"p": -1}, "p=-1 must be 1 or more"),
        ({"k": 0}, "k=0 must be 1 or more"),
        ({"s": 0}, "size factor s=0 must be positive"),
        ({"s": np.nan}, "size factor s=nan must be positive"),
        ({"s": 1e12}, "size factor s=1000000000000.0 must be positive and at most 1e+08"),
    ],
)
def test_bad_arguments(settings, what):
    with pytest.raises(InputError) as error:
        simulate(**settings)
    assert what in str(error.value)
    assert "\n" not in str(error.value)


def test_largest_size_factor_stays_exact():
    assert simulate(n=50, p=200, s=MAX_SIZE_FACTOR).counts.max() < 2**24


def test_count_data_drops_silent_genes_after_the_row_sums(caplog):
    data = simulated_count_data(n_cells=30, n_genes=400, n_components=2, size_factor=300, seed=1)
    simulation = simulate(30, 400, 2, 300, 1)
    heard = np.flatnonzero(simulation.counts.sum(axis=0))
    assert data.n_genes == len(heard) < 400
    np.testing.assert_array_equal(data.counts.toarray(), simulation.counts[:, heard].toarray())
    assert data.gene_names.tolist() == [f"gene{j}" for j in heard]
    np.testing.assert_array_equal(data.size_factors, np.asarray(simulation.counts.sum(axis=1)).ravel())
    assert data.labels is not None
    assert data.labels.tolist() == [f"component{k}" for k in simulation.labels]
    assert data.cell_names[[0, -1]].tolist() == ["cell0", "cell29"]
    fewer = simulated_count_data(
        n_cells=30, n_genes=400, n_components=2, size_factor=300, seed=1, min_counts=5
    )
    assert fewer.n_genes < data.n_genes
    np.testing.assert_array_equal(fewer.size_factors, data.size_factors)

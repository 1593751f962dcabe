from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.special import softmax
from sklearn.calibration import calibration_curve

from nbmix.core.batch import Basis
from nbmix.core.mixture import Mixture
from nbmix.core.parameters import Components
from nbmix.core.settings import MixtureSettings
from nbmix.data.counts import CountData
from nbmix.evaluation.calibration import (
    N_BLOCKS,
    block_log_likelihood,
    expected_calibration_error,
    fitted_inverse_temperature,
    inverse_temperature_by_gene_blocks,
    log_prior_of,
    reliability,
    tempered,
)
from nbmix.evaluation.metrics import log_loss
from tests.conftest import reference_log_likelihood


def test_hand_worked_reliability():
    bins = reliability([0.5, 0.2, 0.9, 1.0, 0.0], [True, False, True, False, True], n_bins=2)
    assert bins.n_cells.tolist() == [3, 2]  # 0.5 belongs to the lower bin
    np.testing.assert_allclose(bins.confidence, [0.7 / 3, 0.95])
    np.testing.assert_allclose(bins.accuracy, [2 / 3, 0.5])
    error = expected_calibration_error([0.5, 0.2, 0.9, 1.0, 0.0], [True, False, True, False, True], n_bins=2)
    assert error == pytest.approx((3 * abs(2 / 3 - 0.7 / 3) + 2 * 0.45) / 5)


def test_reliability_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    sure, right = rng.uniform(size=500), rng.random(500) < 0.6
    bins = reliability(sure, right)
    accuracy, confidence = calibration_curve(right, sure, n_bins=15)
    np.testing.assert_allclose(bins.accuracy, accuracy)
    np.testing.assert_allclose(bins.confidence, confidence)


def test_empty_bins_and_no_cells():
    bins = reliability([1.0, 1.0], [True, False], n_bins=4)
    assert bins.n_cells.tolist() == [0, 0, 0, 2]
    assert np.isnan(bins.accuracy[:3]).all()
    assert expected_calibration_error([1.0, 1.0], [True, False]) == 0.5
    assert expected_calibration_error([], []) == 0.0


@pytest.mark.parametrize(
    ("confidence", "correct"), [([0.5], [True, False]), ([1.5], [True]), ([np.nan], [True])]
)
def test_confidence_that_is_none(confidence, correct):
    with pytest.raises(ValueError, match="confidence"):
        reliability(confidence, correct)


@pytest.mark.parametrize("per_cell", [False, True])
def test_tempered_is_the_softmax_of_the_tempered_joint(per_cell):
    rng = np.random.default_rng(0)
    likelihood = rng.normal(-1000, 20, (30, 4))
    prior = np.log(rng.dirichlet(np.ones(4), 30 if per_cell else None))
    q = softmax(prior + likelihood, axis=1)
    for beta in (1.0, 0.3, 0.01):
        wanted = softmax(prior + beta * likelihood, axis=1)
        np.testing.assert_allclose(tempered(q, prior, beta), wanted, rtol=1e-9)


def test_what_has_no_probability_keeps_none():
    with np.errstate(divide="ignore"):
        prior = np.log([0.5, 0.5, 0.0])
    np.testing.assert_array_equal(tempered([[1.0, 0.0, 0.0]], prior, 0.1), [[1.0, 0.0, 0.0]])


def normal_contrasts(
    n_cells: int, distance: float, covariance: float, n_blocks: int = 8, depth: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two components whose log ratio is normal with means +-d/2 s and, block by block, variance d s.

    That is the exact log ratio of independent normal blocks; ``covariance`` adds an axis that all blocks
    share, which multiplies the variance of their sum.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n_cells)
    s = np.exp(rng.normal(0, depth, n_cells))
    sign = np.where(labels == 0, 0.5, -0.5)
    own = rng.normal(size=(n_cells, n_blocks)) * np.sqrt(distance * s / n_blocks)[:, None]
    shared = rng.normal(size=n_cells) * np.sqrt(covariance * distance * s)
    ratio = (sign * distance * s + shared)[:, None] / n_blocks + own  # (cells, blocks)
    return np.stack([ratio, np.zeros_like(ratio)], axis=1), labels, s


@pytest.mark.parametrize("depth", [0.0, 0.7])
@pytest.mark.parametrize("distance", [1.0, 4.0, 16.0])
def test_independent_genes_need_no_tempering(distance, depth):
    likelihood, _, s = normal_contrasts(4000, distance, 0.0, depth=depth)
    beta = inverse_temperature_by_gene_blocks(likelihood, np.log([0.5, 0.5]), s)
    assert beta == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("covariance", [0.5, 1.0, 3.0])
def test_shared_variation_is_taken_off(covariance):
    """What blocks share, a share of 1 / blocks of it within each, makes one of the 1 + covariance parts."""
    likelihood, labels, s = normal_contrasts(6000, 12.0, covariance)
    prior = np.log([0.5, 0.5])
    beta = inverse_temperature_by_gene_blocks(likelihood, prior, s)
    within = covariance / N_BLOCKS
    wanted = 1 - (covariance - within) * N_BLOCKS / (N_BLOCKS - 1) / (1 + covariance)
    assert beta == pytest.approx(wanted, rel=0.08)
    q = softmax(prior + likelihood.sum(2), axis=1)
    mild = tempered(q, prior, beta)
    assert log_loss(mild, labels) < log_loss(q, labels)
    right = q.argmax(1) == labels
    assert expected_calibration_error(mild.max(1), right) < expected_calibration_error(q.max(1), right)
    exact = softmax(prior + likelihood.sum(2) / (1 + covariance), axis=1)
    assert log_loss(mild, labels) == pytest.approx(log_loss(exact, labels), abs=0.01)


def test_order_of_components_and_constants_of_cells_do_not_matter():
    rng = np.random.default_rng(1)
    n_cells, n_components = 900, 3
    labels, shared = rng.integers(0, n_components, n_cells), rng.normal(size=(n_cells, n_components, 1))
    likelihood = 3 * np.eye(n_components)[labels][:, :, None] + rng.normal(size=(n_cells, 3, 8)) + shared
    prior, s = np.log([0.2, 0.3, 0.5]), np.exp(rng.normal(size=n_cells))
    beta = inverse_temperature_by_gene_blocks(likelihood, prior, s)
    moved = likelihood + rng.normal(0, 100, (n_cells, 1, 8))
    order = [2, 0, 1]
    assert inverse_temperature_by_gene_blocks(moved[:, order], prior[order], 7 * s) == pytest.approx(
        beta, rel=1e-6
    )
    assert 0 < beta < 1


@pytest.mark.parametrize(
    "likelihood",
    [np.zeros((0, 2, 8)), np.zeros((50, 1, 8)), np.zeros((50, 2, 8)), np.zeros((5, 2, 8))],
    ids=["no cells", "one component", "the same components", "too few cells"],
)
def test_nothing_to_judge(likelihood):
    prior = np.full(likelihood.shape[1], -np.log(likelihood.shape[1]))
    assert inverse_temperature_by_gene_blocks(likelihood, prior, np.ones(len(likelihood))) is None


def test_a_component_without_cells_takes_no_part():
    likelihood, _, s = normal_contrasts(2000, 6.0, 1.0)
    beta = inverse_temperature_by_gene_blocks(likelihood, np.log([0.5, 0.5]), s)
    third = np.full((2000, 1, 8), -1e4)
    with_it = inverse_temperature_by_gene_blocks(
        np.concatenate([likelihood, third], 1), np.log(np.full(3, 1 / 3)), s
    )
    assert with_it == pytest.approx(beta, rel=1e-9)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        inverse_temperature_by_gene_blocks(np.zeros((3, 2)), np.zeros(2), np.ones(3))


def drawn(n_cells: int, programme: float, seed: int = 0) -> tuple[CountData, Mixture, np.ndarray]:
    """Counts of two components, and a programme in both along what tells them apart; the true components."""
    rng = np.random.default_rng(seed)
    n_genes = 400
    log_mean = rng.normal(0, 1, n_genes) + rng.normal(0, 0.15, (2, n_genes)) - np.log(n_genes)
    labels = rng.integers(0, 2, n_cells)
    s = 1000 * np.exp(rng.normal(0, 0.4, n_cells))
    loadings = programme * (log_mean[0] - log_mean[1])
    shared = rng.normal(size=(n_cells, 1)) * loadings - loadings**2 / 2  # the mean stays what it was
    rate = s[:, None] * np.exp(log_mean[labels] + shared) * rng.gamma(5.0, 1 / 5.0, (n_cells, n_genes))
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    names = np.arange(n_cells).astype(str)
    data = CountData(counts, s, names, np.arange(n_genes).astype(str))
    mixture = Mixture(n_genes, MixtureSettings(2, folds=2)).attach(Basis.of(counts, s), float(s.sum()))
    mixture.set_components(
        Components(torch.from_numpy(log_mean), torch.full((2, n_genes), np.log(5.0), dtype=torch.float64))
    )
    return data, mixture, labels


@pytest.mark.parametrize("programme", [0.0, 0.4])
def test_inverse_temperature_of_counts(programme):
    data, mixture, labels = drawn(2000, programme)
    beta = fitted_inverse_temperature(mixture, data, np.arange(2000), np.full(2000, -1))
    if programme == 0:
        assert beta == pytest.approx(1, abs=0.08)
        return
    assert 0.2 < beta < 0.9
    everything = block_log_likelihood(mixture, data, np.full(2000, -1), np.zeros(400, int))[:, :, 0]
    prior = log_prior_of(mixture, data)
    q = softmax(prior + everything, axis=1)
    mild = tempered(q, prior, beta)
    assert log_loss(mild, labels) < log_loss(q, labels)
    right = q.argmax(1) == labels
    assert expected_calibration_error(mild.max(1), right) < expected_calibration_error(q.max(1), right)


def test_blocks_add_up_under_the_copy_that_has_not_seen_the_cell():
    data, mixture, _ = drawn(60, 0.0)
    with torch.no_grad():
        mixture.log_mean[0] += 0.3
        mixture.log_inv_disp[1] -= 1.0
    folds = np.arange(60) % 3 - 1  # -1, 0, 1
    blocks = np.random.default_rng(0).integers(0, 3, 400)
    found = block_log_likelihood(mixture, data, folds, blocks)
    assert found.shape == (60, 2, 3)
    for fold, copy in ((-1, 2), (0, 0), (1, 1)):
        rows = folds == fold
        for block in range(3):
            genes = blocks == block
            a, b = (t[:, genes].numpy() for t in mixture.components(copy))
            counts = data.counts[rows][:, genes].toarray()
            wanted = reference_log_likelihood(counts, data.size_factors[rows], a, b)
            np.testing.assert_allclose(found[rows, :, block], wanted, rtol=1e-7, atol=1e-6)


def test_inverse_temperature_of_some_cells_alone():
    data, mixture, _ = drawn(400, 0.4)
    rows = np.arange(0, 400, 2)
    alone = fitted_inverse_temperature(mixture, data.select_cells(rows), np.arange(200), np.full(200, -1))
    assert fitted_inverse_temperature(mixture, data, rows, np.full(200, -1)) == alone


def test_no_inverse_temperature_without_cells_or_components():
    data, mixture, _ = drawn(40, 0.0)
    assert fitted_inverse_temperature(mixture, data, np.zeros(0, int), np.zeros(0, int)) is None
    one = Mixture(400, MixtureSettings(1, folds=1))
    assert fitted_inverse_temperature(one, data, np.arange(40), np.full(40, -1)) is None


def test_given_weights_are_those_of_each_cell():
    data, _, _ = drawn(30, 0.0)
    prior = np.random.default_rng(0).dirichlet(np.ones(2), 30)
    data = CountData(data.counts, data.size_factors, data.cell_names, data.gene_names, prior=prior)
    mixture = Mixture(400, MixtureSettings(2, folds=1, weights="given"))
    np.testing.assert_array_equal(log_prior_of(mixture, data), np.log(prior))

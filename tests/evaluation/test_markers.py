"""Markers against brute force, draws from the posterior, simulated truth, and genes that everybody knows."""

from __future__ import annotations

from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy.optimize import minimize
from scipy.stats import nbinom, poisson

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.m_step import NewtonMStep
from nbmix.core.parameters import Components, GenePrior
from nbmix.core.statistics import SufficientStatistics
from nbmix.data.read import read_h5ad
from nbmix.errors import InputError
from nbmix.evaluation.markers import (
    Contrast,
    compare_sets,
    compare_with_poisson,
    comparison_table,
    find_markers,
    marker_table,
    top_markers,
)
from nbmix.starts.base import one_hot, prepare
from tests.helpers.problems import make_problem, reference_log_likelihood
from tests.helpers.running import ROOT

PBMC = ROOT / "../shared/data/pbmc_facs.h5ad"
KNOWN = {
    "b_cells": ("CD79A", "CD74"),
    "cd14_monocytes": ("LYZ", "S100A9", "CD14"),
    "cd56_nk": ("NKG7", "GNLY"),
}


def normal_prior(log_mean, variance, level=1.5, spread=0.8):
    number = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731 - one line each
    log_mean = torch.as_tensor(log_mean)
    disp = torch.full_like(log_mean, level)
    return GenePrior(log_mean, torch.as_tensor(variance), disp, number(spread), torch.zeros(3))


def collect(counts, sizes, q):
    basis = Basis.of(counts, sizes)
    batch = CellBatch.build(counts, sizes, basis)
    return SufficientStatistics.collect(batch, basis, q, torch.float64), basis


@pytest.fixture(scope="module")
def case():
    """Soft responsibilities of three components, with a given prior: (problem, q, prior, markers)."""
    problem = make_problem(n_cells=120, n_genes=12, size_factors=(1e3, 1e4))
    q = torch.from_numpy(np.random.default_rng(1).dirichlet(np.full(3, 0.3), 120))
    prior = normal_prior(np.random.default_rng(2).uniform(-11, -6, 12), np.linspace(0.05, 2.0, 12))
    statistics, basis = collect(problem.counts, problem.size_factors, torch.as_tensor(q))
    markers = find_markers(statistics, basis, float(problem.size_factors.sum()), prior=prior)
    return problem, q.numpy(), prior, markers


def reference_posterior(log_likelihood, prior, gene, n_components):
    """Mean and variance of ln mu under both parts of the prior, summed over a grid of ln mu and ln r."""
    centre, variance, level, spread = (float(t if t.dim() == 0 else t[gene]) for t in prior[:4])
    log_mean = centre + np.sqrt(variance) * np.linspace(-20, 20, 401)
    log_inv_disp = level + np.sqrt(spread) * np.linspace(-5, 5, 41)
    a, b = np.meshgrid(log_mean, log_inv_disp, indexing="ij")
    of_counts = log_likelihood(a, b) - (b - level) ** 2 / (2 * spread)
    of_counts -= of_counts.max()
    parts = []
    for share, v, n_seen in ((0.95, variance, n_components), (0.05, 16 * variance, np.inf)):
        density = np.exp(of_counts - (a - centre) ** 2 / (2 * v)).sum(1) * share / np.sqrt(v)
        mean = density @ log_mean / density.sum()
        own = density @ (log_mean - mean) ** 2 / density.sum()
        parts.append((mean, own * (1 + own / v * 2 / (n_seen - 1)), density.sum()))
    mean, own, weight = np.array(parts).T
    weight /= weight.sum()
    total = weight @ mean
    return total, weight @ (own + (mean - total) ** 2)


def weighted_log_likelihood(x, s, q):
    """Of the counts of a gene, as a function of ln mu and ln r of any one shape."""

    def of(a, b):
        mu, r = np.exp(a), np.exp(b)
        return sum(w * nbinom.logpmf(n, r, r / (r + size * mu)) for n, size, w in zip(x, s, q, strict=True))

    return of


def test_posterior_of_the_log_mean_against_a_grid(case):
    problem, q, prior, markers = case
    x, s = problem.counts.toarray(), problem.size_factors
    for k, j in ((0, 0), (1, 1), (2, 4), (0, 7), (2, 9)):  # gene 0 is silent, gene 1 deep
        log_likelihood = weighted_log_likelihood(x[:, j], s, q[:, k])
        mean, variance = reference_posterior(log_likelihood, prior, j, 3)
        assert float(markers.log_mean[k, j]) == pytest.approx(mean, abs=0.05 * np.sqrt(variance))
        assert float(markers.standard_error[k, j]) == pytest.approx(np.sqrt(variance), rel=0.05)


def test_posterior_of_a_few_overdispersed_counts():
    """Two of twelve cells have all but one of the counts: they say that the mean is high, not how high."""
    x = np.zeros((200, 3), np.float32)
    x[[2, 7, 100], 0] = 9, 3, 1
    x[:, 1:] = np.random.default_rng(0).poisson(1.0, (200, 2))
    s, q = np.full(200, 250.0), np.repeat(np.eye(2), [12, 188], axis=0)
    prior = normal_prior(np.full(3, -9.5), np.full(3, 1.2), -3.3, 0.2)
    markers = find_markers(*collect(sp.csr_matrix(x), s, torch.from_numpy(q)), s.sum(), prior=prior)
    mean, variance = reference_posterior(weighted_log_likelihood(x[:, 0], s, q[:, 0]), prior, 0, 2)
    assert float(markers.log_mean[0, 0]) == pytest.approx(mean, abs=0.1 * np.sqrt(variance))
    assert float(markers.standard_error[0, 0]) == pytest.approx(np.sqrt(variance), rel=0.1)


def test_the_rest_is_one_component_of_all_other_cells(case):
    problem, q, prior, markers = case
    total = float(problem.size_factors.sum())
    for k in range(3):
        of_two = np.column_stack([q[:, k], 1 - q[:, k]])
        statistics, basis = collect(problem.counts, problem.size_factors, torch.from_numpy(of_two))
        alone = find_markers(statistics, basis, total, prior=prior)
        np.testing.assert_allclose(
            markers.from_rest.log_fold_change[k], alone.from_rest.log_fold_change[0], atol=5e-3
        )


def test_the_nearest_is_another_component(case):
    _, _, _, markers = case
    for k, other in enumerate(markers.nearest.tolist()):
        np.testing.assert_allclose(
            markers.from_nearest.log_fold_change[k], markers.log_mean[k] - markers.log_mean[other]
        )
        spread = markers.standard_error[k] ** 2 + markers.standard_error[other] ** 2
        np.testing.assert_allclose(markers.from_nearest.standard_error[k] ** 2, spread)


def test_a_component_of_few_cells_does_not_move_fold_changes_of_others():
    """In two of 222 cells a gene that varies much has no count; another has some in these alone."""
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], [120, 100, 2])
    rates = np.array([[3.0, 0.05, 0.0], [0.02, 0.02, 2.0], *[[1.0, 1.0, 1.0]] * 20]).T
    counts = rng.poisson(rates[codes]).astype(np.float32)
    sizes = np.full(222, 1000.0)
    statistics, basis = collect(sp.csr_matrix(counts), sizes, one_hot(codes, 3))
    prior = normal_prior(np.log(counts.mean(0) / 1000 + 1e-6), np.full(22, 9.0))
    markers = find_markers(statistics, basis, sizes.sum(), prior=prior)
    observed = np.log(counts[:120].mean(0) / counts[120:].mean(0))
    error = np.abs(markers.from_rest.log_fold_change[0].numpy() - observed)
    assert (error < np.log(2) + markers.from_rest.standard_error[0].numpy()).all()
    assert float(markers.from_rest.standard_error[0, 0]) < 1


def test_two_components_have_one_difference():
    problem = make_problem(n_components=2)
    q = one_hot(np.arange(40) % 2, 2)
    statistics, basis = collect(problem.counts, problem.size_factors, torch.as_tensor(q))
    markers = find_markers(statistics, basis, float(problem.size_factors.sum()))
    assert markers.nearest.tolist() == [1, 0]
    for rest, nearest in zip(markers.from_rest, markers.from_nearest, strict=True):
        torch.testing.assert_close(rest, nearest, rtol=1e-9, atol=1e-9)
    change = markers.from_rest.log_fold_change
    torch.testing.assert_close(change[0], -change[1], rtol=1e-9, atol=1e-9)


def test_false_sign_rate_and_logarithms():
    contrast = Contrast(torch.tensor([[0.0, 1.0, -1.96]]).double(), torch.tensor([[2.0, 1.0, 1.0]]).double())
    np.testing.assert_allclose(contrast.false_sign_rate, [[0.5, 0.15865525, 0.0249979]], rtol=1e-6)
    np.testing.assert_allclose(contrast.log2_fold_change, [[0.0, 1.4426950, -2.8276823]], rtol=1e-6)
    np.testing.assert_allclose(contrast.lower_bound, [[-3.92, -0.96, -3.92]])


def test_shares_of_cells(case):
    problem, q, _, markers = case
    seen = (problem.counts.toarray() > 0).astype(float)
    np.testing.assert_allclose(markers.share, (q.T @ seen) / q.sum(0)[:, None], atol=1e-12)
    rest = 1 - q
    np.testing.assert_allclose(markers.share_rest, (rest.T @ seen) / rest.sum(0)[:, None], atol=1e-12)


def test_nearest_component_explains_the_cells_next_best():
    problem = make_problem(n_cells=150, n_genes=20, n_components=4, size_factors=(1e4, 5e4))
    codes = np.arange(150) % 4
    statistics, basis = collect(problem.counts, problem.size_factors, one_hot(codes, 4))
    total = float(problem.size_factors.sum())
    prior = normal_prior(np.full(20, -8.0), np.full(20, 4.0))
    begin = Components(problem.log_mean, problem.log_inv_disp)
    fitted = NewtonMStep()(statistics, basis, begin, total, prior).components
    nearest = find_markers(statistics, basis, total, begin, prior).nearest
    log_likelihood = reference_log_likelihood(problem.counts.toarray(), problem.size_factors, *fitted)
    for k in range(4):
        of_cells = log_likelihood[codes == k].sum(0)
        of_cells[k] = -np.inf
        assert int(nearest[k]) == of_cells.argmax()


def test_order_of_components_does_not_matter():
    problem = make_problem(n_cells=60)
    q = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(3), 60))
    order = torch.tensor([2, 0, 1])
    total = float(problem.size_factors.sum())
    one, other = (
        find_markers(*collect(problem.counts, problem.size_factors, weights), total)
        for weights in (q, q[:, order])
    )
    for mine, theirs in zip(one.from_rest, other.from_rest, strict=True):
        torch.testing.assert_close(mine[order], theirs, rtol=1e-4, atol=1e-5)
    assert order[other.nearest].tolist() == one.nearest[order].tolist()
    torch.testing.assert_close(one.score[order], other.score, rtol=1e-4, atol=1e-5)


def test_one_component_has_nothing_to_be_compared_with():
    problem = make_problem()
    q = torch.ones(40, 1, dtype=torch.float64)
    markers = find_markers(*collect(problem.counts, problem.size_factors, q), 1e6)
    assert markers.nearest.tolist() == [-1]
    assert markers.from_rest.log_fold_change.isnan().all()
    assert torch.isfinite(markers.log_mean).all()
    table = marker_table(markers, np.array([f"g{j}" for j in range(25)]))
    assert len(table) == 25
    assert table[["share_rest", "ln_fc_rest", "lfsr_nearest", "share_nearest"]].isna().all(axis=None)


def test_a_component_without_cells_is_nobodys_nearest():
    problem = make_problem(n_cells=60)
    q = one_hot(np.arange(60) % 2, 3)
    markers = find_markers(
        *collect(problem.counts, problem.size_factors, q), float(problem.size_factors.sum())
    )
    assert 2 not in markers.nearest[:2].tolist()
    for value in (*markers.from_rest, *markers.from_nearest, markers.share, markers.share_rest):
        assert torch.isfinite(value).all()
    assert markers.share[2].eq(0).all()


class Simulation(NamedTuple):
    """Counts of components whose ln mu (K, genes) is known, with differences N(0, tau_j^2)."""

    counts: sp.csr_matrix
    size_factors: np.ndarray
    codes: np.ndarray
    log_mean: np.ndarray


def simulated(seed, n_cells, n_genes=1500):
    rng = np.random.default_rng(seed)
    tau = np.exp(rng.normal(-1.0, 0.6, n_genes))
    shape = (len(n_cells), n_genes)
    log_mean = rng.uniform(-11, -4.5, n_genes) + tau * rng.standard_normal(shape)
    inv_disp = np.exp(rng.normal(2, 0.7, shape))
    codes = np.repeat(np.arange(len(n_cells)), n_cells)
    sizes = 2000 * np.exp(rng.normal(0, 0.5, codes.size))
    rate = np.exp(log_mean)[codes] * rng.gamma(inv_disp[codes], 1 / inv_disp[codes])
    x = rng.poisson(sizes[:, None] * rate)
    heard = x.any(0)
    return Simulation(sp.csr_matrix(x[:, heard].astype(np.float32)), sizes, codes, log_mean[:, heard])


class Verdicts(NamedTuple):
    """Of many estimates: error in standard errors, false sign rate, and whether the sign is wrong."""

    z: np.ndarray
    rate: np.ndarray
    wrong: np.ndarray


def judge(n_cells, seeds):
    """Verdicts on the differences from the rest, and from the nearest."""
    of_rest, of_nearest = [], []
    n_components = len(n_cells)
    weights = (1 - np.eye(n_components)) * n_cells
    weights /= weights.sum(1, keepdims=True)
    for seed in seeds:
        counts, sizes, codes, truth = simulated(seed, n_cells)
        statistics, basis = collect(counts, sizes, one_hot(codes, n_components))
        markers = find_markers(statistics, basis, float(sizes.sum()))
        for verdicts, contrast, true in (
            (of_rest, markers.from_rest, truth - np.log(weights @ np.exp(truth))),
            (of_nearest, markers.from_nearest, truth - truth[markers.nearest.numpy()]),
        ):
            estimate = contrast.log_fold_change.numpy()
            z = (estimate - true) / contrast.standard_error.numpy()
            wrong = np.sign(estimate) != np.sign(true)
            verdicts.append([part.ravel() for part in (z, contrast.false_sign_rate.numpy(), wrong)])
    return [Verdicts(*map(np.concatenate, zip(*v, strict=True))) for v in (of_rest, of_nearest)]


@pytest.fixture(scope="module")
def of_two():
    return judge((300, 150), range(4))


@pytest.fixture(scope="module")
def of_five():
    return judge((300, 200, 100, 80, 60), range(4))


def test_intervals_cover_the_truth(of_two, of_five):
    for verdicts in (*of_two, *of_five):
        assert (np.abs(verdicts.z) < 1.96).mean() == pytest.approx(0.95, abs=0.015)


def test_short_intervals_err_on_the_safe_side(of_two, of_five):
    """Student's t and the prior's wide part leave more near the mean than a normal one of their variance."""
    for verdicts in (*of_two, *of_five):
        assert 0.5 <= (np.abs(verdicts.z) < 0.6745).mean() < 0.54


@pytest.mark.parametrize("n_cells", [(990, 10), (970, 10, 10, 10)], ids=str)
def test_one_component_with_nearly_all_cells_does_not_vote_for_small_differences(n_cells):
    """It is the pooled gene, from which it does not differ; the others do, as the truth does."""
    for verdicts in judge(n_cells, range(1)):
        assert 0.94 < (np.abs(verdicts.z) < 1.96).mean() < 0.995


def test_false_sign_rates_are_those_of_false_signs(of_five):
    for verdicts in of_five:
        for low, high in ((0.0, 0.05), (0.05, 0.2), (0.2, 0.4)):
            some = (verdicts.rate >= low) & (verdicts.rate < high)
            assert verdicts.wrong[some].mean() == pytest.approx(verdicts.rate[some].mean(), rel=0.25)


def test_false_sign_rates_of_two_components_err_on_the_safe_side(of_two):
    for verdicts in of_two:
        for low, high in ((0.0, 0.05), (0.05, 0.2), (0.2, 0.4)):
            some = (verdicts.rate >= low) & (verdicts.rate < high)
            assert verdicts.wrong[some].mean() <= verdicts.rate[some].mean()


def test_comparison_with_poisson_against_scipy():
    problem = make_problem(n_cells=80, n_genes=12, size_factors=(1e3, 1e4))
    codes = np.arange(80) % 2
    statistics, basis = collect(problem.counts, problem.size_factors, one_hot(codes, 2))
    compared = compare_with_poisson(statistics, basis, float(problem.size_factors.sum()))
    x = problem.counts.toarray()
    for k in range(2):
        own, s = x[codes == k], problem.size_factors[codes == k]
        for j in range(1, 12):
            mean = own[:, j].sum() / s.sum()
            if mean == 0:
                continue
            assert float(compared.poisson[k, j]) == pytest.approx(
                poisson.logpmf(own[:, j], s * mean).sum(), abs=1e-5
            )

            def loss(ab, counts=own[:, j], s=s):
                r = np.exp(np.clip(ab[1], -8, 12))
                return -nbinom.logpmf(counts, r, r / (r + s * np.exp(ab[0]))).sum()

            found = min(
                (minimize(loss, [np.log(mean), b], method="Nelder-Mead") for b in (-2.0, 1.0, 4.0)),
                key=lambda result: result.fun,
            )
            assert float(compared.negative_binomial[k, j]) == pytest.approx(-found.fun, abs=2e-3)
            assert compared.negative_binomial[k, j] >= compared.poisson[k, j] - 1e-3


def test_table_of_markers(case):
    *_, markers = case
    names = np.array([f"g{j}" for j in range(12)])
    table = marker_table(markers, names)
    assert table["component"].tolist() == np.repeat([0, 1, 2], 12).tolist()
    assert table["rank"].tolist() == 3 * list(range(1, 13))
    assert set(table.columns) >= {"share", "share_rest", "lfsr_rest", "lfsr_nearest", "ln_fc_nearest_se"}
    np.testing.assert_allclose(table["log2_fc_rest"], table["ln_fc_rest"] / np.log(2))
    for k, rows in table.groupby("component"):
        genes = rows["gene"].str[1:].astype(int).to_numpy()
        assert (np.diff(markers.score[k][genes].numpy()) <= 0).all()
        np.testing.assert_array_equal(rows["ln_fc_rest"], markers.from_rest.log_fold_change[k][genes])
        assert (rows["nearest"] == int(markers.nearest[k])).all()
        own = markers.share[int(markers.nearest[k])][genes]
        np.testing.assert_array_equal(rows["share_nearest"], own)


def test_sets_of_components_are_compared_as_components_are(case):
    problem, q, _, _ = case
    statistics, basis = collect(problem.counts, problem.size_factors, torch.as_tensor(q))
    known = statistics, basis, float(problem.size_factors.sum())
    markers = find_markers(*known)
    for first, rest in ((0, [1, 2]), (1, [0, 2]), (2, [0, 1])):
        found = compare_sets(*known, ([first], rest))
        for mine, theirs in zip(found.contrast, markers.from_rest, strict=True):
            torch.testing.assert_close(mine, theirs[first], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.log_mean, markers.log_mean[first], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.share_reference, markers.share_rest[first])
        turned = compare_sets(*known, (rest, [first]))
        torch.testing.assert_close(turned.contrast.log_fold_change, -found.contrast.log_fold_change)
        other = compare_sets(*known, ([first], rest[:1]))
        difference = markers.log_mean[first] - markers.log_mean[rest[0]]
        torch.testing.assert_close(other.contrast.log_fold_change, difference, rtol=1e-5, atol=1e-6)


def test_a_table_of_a_comparison_has_the_best_marker_first(case):
    problem, q, _, _ = case
    statistics, basis = collect(problem.counts, problem.size_factors, torch.as_tensor(q))
    found = compare_sets(statistics, basis, float(problem.size_factors.sum()), ([0], [1]))
    names = np.array([f"g{j}" for j in range(statistics.rate.shape[0])])
    table = comparison_table(found, names)
    score = found.score.numpy()
    assert (np.diff(score[[int(gene[1:]) for gene in table["gene"]]]) <= 0).all()
    assert sorted(table["gene"]) == sorted(names)


@pytest.mark.skipif(not PBMC.exists(), reason="the shared data is not here")
def test_known_markers_lead_their_populations():
    data = read_h5ad(PBMC)
    names, codes = np.unique(data.labels, return_inverse=True)
    basis, batches = prepare(data, 1, np.random.default_rng(0))
    q = one_hot(codes, names.size)
    statistics = SufficientStatistics.zeros(basis, names.size, "cpu")
    for batch in batches:
        statistics.add_batch_(batch, basis, q[batch.rows])
    markers = find_markers(statistics, basis, float(data.size_factors.sum()))
    symbols = ad.read_h5ad(PBMC, backed="r").var["symbol"].reindex(data.gene_names).to_numpy()
    table = marker_table(markers, symbols)
    for population, genes in KNOWN.items():
        rows = table[table["component"] == np.flatnonzero(names == population)[0]].head(10)
        assert set(genes) <= set(rows["gene"])
        assert (rows["lfsr_rest"] < 1e-6).all()
        assert (rows["ln_fc_rest"] > 1).all()


def test_the_best_markers_are_the_first_rows_of_all():
    problem = make_problem()
    q = one_hot(np.arange(problem.counts.shape[0]) % 3, 3)
    statistics, basis = collect(problem.counts, problem.size_factors, q)
    markers = find_markers(statistics, basis, problem.size_factors.sum())
    names = np.array([f"g{j}" for j in range(problem.counts.shape[1])])
    every, best = marker_table(markers, names), marker_table(markers, names, 4)
    pd.testing.assert_frame_equal(best, every[every["rank"] <= 4].reset_index(drop=True))


def test_top_markers_are_those_of_each_group_once():
    table = pd.DataFrame(
        {"component": [0, 0, 0, 2, 2, 2], "rank": [1, 2, 3] * 2, "gene": ["a", "b", "c", "b", "d", "e"]}
    )
    found = top_markers(table, 2, ["2", "0"])
    assert found[["component", "gene"]].values.tolist() == [[2, "b"], [2, "d"], [0, "a"]]
    assert top_markers(table, None, ["0"])["gene"].tolist() == ["a", "b", "c"]
    for wrong in (0, True, 2.5, "all"):
        with pytest.raises(InputError, match="n_genes="):
            top_markers(table, wrong, ["0"])


@pytest.mark.parametrize(("n_groups", "n_genes"), [(1, 5), (12, 5), (20, 3), (30, 2), (100, 2)])
def test_as_many_markers_as_can_be_read(n_groups, n_genes):
    table = pd.DataFrame(
        {
            "component": np.repeat(np.arange(n_groups), 8),
            "rank": np.tile(np.arange(1, 9), n_groups),
            "gene": np.arange(8 * n_groups).astype(str),
        }
    )
    assert len(top_markers(table, None, [str(k) for k in range(n_groups)])) == n_genes * n_groups


def test_what_a_few_cells_lack_is_no_dispersion():
    """Six platelets with hardly a ribosomal count, beside 600 cells that are full of them."""
    rng = np.random.default_rng(0)
    mean = np.tile(rng.gamma(1.0, 1.0, 80), (606, 1))
    mean[:, :20] = 15.0
    mean[600:, :20] = 0.7
    drawn = rng.poisson(mean * rng.gamma(10.0, 0.1, mean.shape)).astype(np.float32)
    q = np.repeat(np.eye(2), [600, 6], axis=0)
    statistics, basis = collect(sp.csr_matrix(drawn), np.ones(606), torch.as_tensor(q))
    found = find_markers(statistics, basis, 606.0).from_rest
    total = np.stack([drawn[:600].mean(0), drawn[600:].mean(0)])[:, :20]
    error = found.log2_fold_change[0, :20].numpy() - np.log2(total[0] / total[1])
    assert (np.abs(error) < 1 + found.standard_error[0, :20].numpy() / np.log(2)).all()
    assert (found.log2_fold_change[0, :20] > 2).all()


class Alone(NamedTuple):
    """Small groups beside large ones, (groups, genes): 40 genes that one small group alone has, then others.

    Attributes:
        log2_fold_change: from the rest, as it is found.
        standard_error: of it.
        observed: ratio of the mean counts, log2.
        own: whether it is the group that alone has the gene.
        lower_bound: of ln.
    """

    log2_fold_change: np.ndarray
    standard_error: np.ndarray
    observed: np.ndarray
    own: np.ndarray
    lower_bound: np.ndarray


@pytest.fixture(scope="module")
def alone():
    rng = np.random.default_rng(0)
    n_cells = np.array([5, 6, 8, 10, 15, 20, 30, 40, *[60] * 12])
    codes, n_genes = np.repeat(np.arange(20), n_cells), 600
    mean = np.tile(np.exp(rng.uniform(np.log(0.02), np.log(5.0), n_genes)), (20, 1))
    own = np.zeros((20, n_genes), bool)
    own[np.arange(40) % 8, np.arange(40)] = True
    power = 2.0 ** (1 + np.arange(40) // 5)  # 2^1 to 2^8
    mean[:, :40] = np.minimum(0.3, 8 / power)
    mean[own] *= power
    drawn = rng.poisson(mean[codes] * rng.gamma(4.0, 0.25, (codes.size, n_genes))).astype(np.float32)
    statistics, basis = collect(sp.csr_matrix(drawn), np.ones(codes.size), one_hot(codes, 20))
    found = find_markers(statistics, basis, float(codes.size)).from_rest
    total = np.asarray(one_hot(codes, 20)).T @ drawn
    rest = (total.sum(0) - total) / (codes.size - n_cells)[:, None]
    with np.errstate(divide="ignore"):
        observed = np.log2(total / n_cells[:, None] / rest)
    error = found.standard_error.numpy() / np.log(2)
    return Alone(found.log2_fold_change.numpy(), error, observed, own, found.lower_bound.numpy())


def test_what_one_small_group_has_alone_is_not_shrunk_away(alone):
    large = alone.own & (alone.observed > 4)
    assert large.sum() > 15
    error = np.abs(alone.log2_fold_change - alone.observed)
    assert (error < 1 + alone.standard_error)[large].all()
    assert np.median(error[large]) < 0.3


def test_what_all_groups_have_alike_is_no_marker(alone):
    alike = alone.log2_fold_change[:, 40:]
    assert (np.abs(alike) > 1).mean() < 1e-3
    assert (alone.lower_bound[:, 40:] > np.log(2)).sum() == 0

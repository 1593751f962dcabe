from __future__ import annotations

import math

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.sparse as sp
import scipy.stats
import torch
from scipy.special import expit, gammaln, psi, xlogy

from nbmix.core.parameters import LOG_INV_DISP_RANGE, lowest_log_mean
from nbmix.errors import InputError
from nbmix.genes import covariates as supervised
from nbmix.genes.supervised import compare_genes, fit_gamma, fit_point, fit_point_gamma
from tests.core.test_m_step import KINDS, genes_of_every_kind
from tests.helpers.running import ROOT

NATS = 1e-6  # what a fit may lack of the best log likelihood
FACS = ROOT.parent / "shared" / "data" / "pbmc_facs.h5ad"
FITS = (fit_point, fit_gamma, fit_point_gamma)


def poisson(x, mean):
    """(genes,) log likelihood of counts (cells, genes)."""
    return scipy.stats.poisson(mean).logpmf(x).sum(0)


def negative_binomial(x, s, log_mean, log_inv_disp):
    """Elementwise, fast enough for SciPy's optimizers; the values of fits are checked by scipy.stats."""
    r, scaled = np.exp(log_inv_disp), s * np.exp(log_mean - log_inv_disp)
    return gammaln(x + r) - gammaln(r) - gammaln(x + 1) + xlogy(x, scaled) - (x + r) * np.log1p(scaled)


def zero_inflated(x, s, log_mean, log_inv_disp, logit_zero):
    count = negative_binomial(x, s, log_mean, log_inv_disp)
    from_count = count - np.logaddexp(0, logit_zero)
    return np.where(x == 0, np.logaddexp(from_count, -np.logaddexp(0, -logit_zero)), from_count)


def best_by_scipy(minus, starts, bounds, jac=None):
    """The largest value that L-BFGS-B finds from several starts."""
    options = {"ftol": 1e-15, "gtol": 1e-9}
    found = [
        scipy.optimize.minimize(minus, at, method="L-BFGS-B", jac=jac, bounds=bounds, options=options)
        for at in starts
    ]
    return -min(result.fun for result in found)


def minus_zero_inflated(at, x, s):
    """Minus the log likelihood of one gene at m, b and l, or at m and b alone; and its gradient.

    m = a - ln(1 + e^l) is the logarithm of the mean of all cells; without l = logit pi, pi is 0.
    """
    b, logit = at[1], at[2] if len(at) == 3 else -np.inf
    a, zero, r = at[0] + np.logaddexp(0, logit), expit(logit), np.exp(at[1])
    scaled = s * np.exp(a - b)
    share, grown = scaled / (1 + scaled), np.log1p(scaled)
    seen = x > 0
    value = -(x + r) * grown
    value[seen] += gammaln(x[seen] + r) - gammaln(r) - gammaln(x[seen] + 1) + x[seen] * np.log(scaled[seen])
    of_a = x - (x + r) * share
    of_b = -r * grown - of_a
    of_b[seen] += r * (psi(x[seen] + r) - psi(r))
    point = np.where(seen, 0, expit(logit - value))  # that a zero is the point mass's
    of_a, of_b = (1 - point) * of_a, (1 - point) * of_b
    value = np.where(seen, value, np.logaddexp(logit, value)) - np.logaddexp(0, logit)
    gradient = [of_a.sum(), of_b.sum(), (point - zero + zero * of_a).sum()]
    return -value.sum(), -np.array(gradient[: len(at)])


def best_gamma(x, s):
    """Of one gene x (cells,)."""
    floor, mean = lowest_log_mean(s.sum()), math.log(x.sum() / s.sum())
    return best_by_scipy(
        lambda at: minus_zero_inflated(at, x, s),
        [(mean, b) for b in (-3.0, 1.0, 6.0, LOG_INV_DISP_RANGE[1])],
        [(floor, 10.0), LOG_INV_DISP_RANGE],
        jac=True,
    )


def best_point_gamma(x, s):
    """Of one gene."""
    floor, mean = lowest_log_mean(s.sum()), math.log(x.sum() / s.sum())
    starts = [(1.0, -2.0), (5.0, 0.0), (3.0, -4.0), (-1.0, 1.0), (12.0, -1.0)]
    inflated = best_by_scipy(
        lambda at: minus_zero_inflated(at, x, s),
        [(mean, *start) for start in starts],
        [(floor, 10.0), LOG_INV_DISP_RANGE, (-25.0, 10.0)],
        jac=True,
    )
    return max(inflated, best_gamma(x, s))


def simulated(n_cells=120, n_genes=12, n_labels=3, seed=0, zero=0.0):
    """Counts, labels "a", "b", ..., and size factors that are not the row sums; gene 0 is silent."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_labels, size=n_cells)
    labels[:n_labels] = np.arange(n_labels)
    s = np.exp(rng.normal(7, 0.5, n_cells))
    mean = np.exp(rng.uniform(-9, -5, (n_labels, n_genes)))
    mean[:, 0] = 0
    r = np.exp(rng.uniform(-1, 3, (n_labels, n_genes)))
    rate = rng.gamma(r[labels], mean[labels] / r[labels]) * (rng.random((n_cells, n_genes)) >= zero)
    return rng.poisson(s[:, None] * rate).astype(float), np.array(list("abcdefgh"))[labels], s


def values(fit, x, labels, s, eta=0.0):
    """(labels, genes) log likelihood of a fit, by SciPy; eta (cells, genes) is ln of what covariates add."""
    code = np.searchsorted(fit.labels, labels)
    log_mean = fit.log_mean.numpy()[code] + eta
    if not hasattr(fit, "log_inv_disp"):
        cells = scipy.stats.poisson(s[:, None] * np.exp(log_mean)).logpmf(x)
    elif not hasattr(fit, "logit_zero"):
        b = fit.log_inv_disp.numpy()[code]
        cells = scipy.stats.nbinom(np.exp(b), 1 / (1 + s[:, None] * np.exp(log_mean - b))).logpmf(x)
    else:
        b, logit = fit.log_inv_disp.numpy()[code], fit.logit_zero.numpy()[code]
        plain = scipy.stats.nbinom(np.exp(b), 1 / (1 + s[:, None] * np.exp(log_mean - b))).logpmf(x)
        cells = np.where(np.isinf(logit), plain, zero_inflated(x, s[:, None], log_mean, b, logit.clip(-99)))
    return np.stack([cells[labels == value].sum(0) for value in fit.labels])


# ---- each fit is the best there is -----------------------------------------------------------------


@pytest.mark.parametrize("at", [(-7.0, 0.5), (-7.0, 0.5, -1.0), (-6.0, -2.0, 1.0)])
def test_the_references_are_scipys_with_their_gradients(at):
    x, _, s = simulated(n_genes=2, zero=0.3)
    x = x[:, 1]
    logit = at[2] if len(at) == 3 else -800.0
    want = zero_inflated(x, s, at[0] + np.logaddexp(0, logit), at[1], logit).sum()
    assert -minus_zero_inflated(at, x, s)[0] == pytest.approx(want, rel=1e-12)
    off = scipy.optimize.check_grad(*(lambda at, i=i: minus_zero_inflated(at, x, s)[i] for i in (0, 1)), at)
    assert off < 1e-3


def test_the_point_fit_is_the_closed_form():
    x, labels, s = simulated()
    fit = fit_point(x, labels, s)
    for k, value in enumerate("abc"):
        mine = labels == value
        mean = x[mine].sum(0) / s[mine].sum()
        heard = mean > 0
        np.testing.assert_allclose(fit.log_mean[k][heard], np.log(mean[heard]), rtol=1e-12)
        best = poisson(x[mine], s[mine, None] * mean)
        np.testing.assert_allclose(fit.log_likelihood[k][heard], best[heard], rtol=1e-12)


@pytest.mark.parametrize("fit", FITS)
def test_the_log_likelihood_is_scipys(fit):
    x, labels, s = simulated(zero=0.3)
    found = fit(x, labels, s)
    np.testing.assert_allclose(found.log_likelihood, values(found, x, labels, s), rtol=1e-10, atol=1e-8)


@pytest.fixture(scope="module")
def every_kind():
    x, s = genes_of_every_kind(each=2)
    heard = x.any(0)
    return x[:, heard], s, np.repeat(KINDS, 2)[heard]


@pytest.mark.parametrize("fit, best", [(fit_gamma, best_gamma), (fit_point_gamma, best_point_gamma)])
def test_scipy_finds_nothing_better(every_kind, fit, best):
    x, s, kinds = every_kind
    found = fit(x, np.zeros(len(s), int), s).log_likelihood[0]
    lacks = {}
    for j, kind in enumerate(kinds):
        lacks[kind] = max(lacks.get(kind, 0.0), best(x[:, j], s) - float(found[j]))
    assert max(lacks.values()) < NATS, lacks


@pytest.mark.slow
@pytest.mark.skipif(not FACS.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("fit, best", [(fit_gamma, best_gamma), (fit_point_gamma, best_point_gamma)])
def test_scipy_finds_nothing_better_for_200_genes_of_sorted_cells(fit, best):
    cells = ad.read_h5ad(FACS)
    s = np.asarray(cells.X.sum(1), float).ravel()
    labels = cells.obs["cell_type"].to_numpy().astype(str)
    rng = np.random.default_rng(0)
    genes = rng.choice(cells.n_vars, 200, replace=False)
    counts = cells.X[:, genes]
    found = fit(counts, labels, s)
    lacks = []
    for j in range(200):  # each in one of the populations that have it
        k = rng.choice(np.flatnonzero([counts[labels == value, j].nnz for value in found.labels]))
        mine = labels == found.labels[k]
        x = counts[mine, j].toarray().ravel().astype(float)
        lacks.append(best(x, s[mine]) - float(found.log_likelihood[k, j]))
    assert max(lacks) < NATS, np.argmax(lacks)


def test_statsmodels_finds_the_same_negative_binomial():
    discrete = pytest.importorskip("statsmodels.discrete.discrete_model", reason="pip install 'nbmix[test]'")
    x, labels, s = simulated(n_cells=300, n_genes=6, n_labels=1, seed=2)
    fit = fit_gamma(x, labels, s)
    for j in range(1, 6):
        model = discrete.NegativeBinomial(x[:, j], np.ones((len(s), 1)), offset=np.log(s))
        theirs = model.fit(start_params=[math.log(x[:, j].sum() / s.sum()), 0.5], disp=0, method="bfgs")
        assert abs(theirs.llf - float(fit.log_likelihood[0, j])) < 1e-4
        np.testing.assert_allclose(theirs.params[0], fit.log_mean[0, j], atol=1e-3)
        np.testing.assert_allclose(theirs.params[1], torch.exp(-fit.log_inv_disp[0, j]), atol=1e-3)


def test_a_point_mass_is_found_where_there_is_one_and_only_there():
    rng = np.random.default_rng(0)
    s = np.exp(rng.normal(7, 0.3, 4000))
    rate = rng.gamma(5.0, np.exp(-5) / 5, (4000, 2)) * (rng.random((4000, 2)) > [0.4, 0.0])
    fit = fit_point_gamma(rng.poisson(s[:, None] * rate), np.zeros(4000, int), s)
    assert abs(torch.sigmoid(fit.logit_zero[0, 0]) - 0.4) < 0.03
    assert torch.sigmoid(fit.logit_zero[0, 1]) < 0.01
    np.testing.assert_allclose(fit.log_mean[0], -5, atol=0.05)
    np.testing.assert_allclose(fit.log_inv_disp[0], math.log(5), atol=0.15)


def test_each_fit_holds_the_one_before_it():
    x, labels, s = simulated(zero=0.2)
    point, gamma, point_gamma = (fit(x, labels, s) for fit in FITS)
    assert (gamma.log_likelihood - point.log_likelihood).min() > -1e-3  # ln r is bounded
    assert (point_gamma.log_likelihood >= gamma.log_likelihood).all()
    same = torch.isinf(point_gamma.logit_zero)
    assert 0 < same.sum() < same.numel()
    assert torch.equal(point_gamma.log_likelihood[same], gamma.log_likelihood[same])
    assert torch.equal(point_gamma.log_mean[same], gamma.log_mean[same])


def test_genes_are_compared_by_the_two_fits():
    x, labels, s = simulated()
    found = compare_genes(x, labels, s)
    assert torch.equal(found.point, fit_point(x, labels, s).log_likelihood)
    assert torch.equal(found.gamma, fit_gamma(x, labels, s).log_likelihood)
    assert torch.equal(found.gain, found.gamma - found.point)


# ---- the pieces ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_cells", [60, 1500])
def test_zeros_are_summed_exactly(n_cells):
    """At the size factors themselves, or at nodes; pi = 1e-4 brings the branch points near."""
    s = np.exp(np.random.default_rng(0).normal(7, 0.6, n_cells))
    s[3] = 0  # an empty cell has a zero for sure, whatever the components
    log_nodes, spread = supervised._zero_nodes(s)
    assert log_nodes.size < n_cells

    def term(log_s, a, b, logit):
        return np.logaddexp(logit, -np.exp(b) * np.logaddexp(0, log_s + a - b))

    for at in ((-5.0, 8.0, -9.2), (-4.0, 12.0, -5.0), (-6.0, -2.0, 1.0), (-4.5, 2.0, -3.0)):
        want = term(np.log(s[s > 0]), *at).sum()
        np.testing.assert_allclose(np.asarray(spread.sum(0)).ravel() @ term(log_nodes, *at), want, atol=1e-8)


def agrees_with_finite_differences(problem, n_numbers, generator):
    """A problem's curve at random places, against finite differences of its value and gradient."""
    at, h = torch.randn(n_numbers, dtype=torch.float64, generator=generator), 1e-5
    now = problem.curve(at)
    for d in range(at.shape[1]):
        step = torch.zeros_like(at)
        step[:, d] = h
        up, down = problem.curve(at + step), problem.curve(at - step)
        scale = 1 + now.value.abs()
        assert (((up.value - down.value) / (2 * h) - now.gradient[:, d]).abs() / scale).max() < 1e-7
        rows = (up.gradient - down.gradient) / (2 * h)
        assert ((rows - now.hessian[:, d]).abs() / scale[:, None]).max() < 1e-7


def test_zero_inflated_curve_equals_finite_differences(generator):
    x, _, s = simulated(n_genes=15, zero=0.5)
    problem = supervised._zero_inflated(sp.csr_matrix(x.astype(np.float32)), s / s.mean())
    agrees_with_finite_differences(problem, (15, 3), generator)


@pytest.mark.parametrize("fit, n_numbers", [(fit_point, 2), (fit_gamma, 8), (fit_point_gamma, 11)])
def test_curve_with_covariates_equals_finite_differences(generator, fit, n_numbers, monkeypatch):
    x, labels, s = simulated(zero=0.3)
    design = np.random.default_rng(1).normal(size=(len(s), 2))
    problems = []
    climb = supervised._climb
    monkeypatch.setattr(supervised, "_climb", lambda *a: problems.append(a[0]) or climb(*a))
    fit(x, labels, s / s.mean(), design)
    agrees_with_finite_differences(problems[-1], (12, n_numbers), generator)


# ---- covariates ------------------------------------------------------------------------------------


def batches(seed=0, n_cells=150):
    """Counts with two covariates that matter: a batch of 0 and 1 and a number far from 0."""
    rng = np.random.default_rng(seed)
    design = np.stack([rng.random(n_cells) < 0.4, rng.normal(40, 5, n_cells)], axis=1)
    x, labels, s = simulated(n_cells, n_genes=6, n_labels=2, seed=seed)
    moved = s * np.exp(design @ [0.8, -0.05] + 2)
    return (
        rng.poisson(rng.gamma(2.0, moved[:, None] * np.exp(-6) / 2, x.shape)).astype(float),
        labels,
        s,
        design,
    )


def inflated_batches():
    """The same, with zeros that the Gamma does not explain in label a alone."""
    x, labels, s, design = batches(n_cells=300)
    lost = (np.random.default_rng(5).random(x.shape) < 0.3) & (labels[:, None] == "a")
    return np.where(lost, 0, x), labels, s, design


@pytest.mark.parametrize("fit", FITS)
def test_log_likelihood_with_covariates_is_scipys(fit):
    x, labels, s, design = inflated_batches()
    found = fit(x, labels, s, design)
    want = values(found, x, labels, s, design @ found.coefficients.numpy())
    np.testing.assert_allclose(found.log_likelihood, want, rtol=1e-10)


def test_scipy_finds_no_better_point_fit_with_covariates():
    x, labels, s, design = batches()
    fit = fit_point(x, labels, s, design)
    onehot = (labels[:, None] == fit.labels).astype(float)
    z = np.hstack([onehot, design - design.mean(0)])
    for j in range(x.shape[1]):
        result = scipy.optimize.minimize(
            lambda at, j=j: -poisson(x[:, j], s * np.exp(z @ at)), np.r_[-6, -6, 0, 0], method="BFGS"
        )
        assert abs(-result.fun - float(fit.log_likelihood[:, j].sum())) < NATS


def test_statsmodels_finds_the_same_poisson_regression():
    api = pytest.importorskip("statsmodels.api", reason="pip install 'nbmix[test]'")
    x, labels, s, design = batches()
    fit = fit_point(x, labels, s, design)
    z = np.hstack([labels[:, None] == fit.labels, design]).astype(float)
    for j in range(x.shape[1]):
        theirs = api.GLM(x[:, j], z, family=api.families.Poisson(), offset=np.log(s)).fit(tol=1e-12)
        mine = torch.cat([fit.log_mean[:, j], fit.coefficients[:, j]])
        np.testing.assert_allclose(mine, theirs.params, atol=1e-6)
        np.testing.assert_allclose(fit.log_likelihood[:, j].sum(), theirs.llf, atol=1e-8)


def test_scipy_finds_no_better_gamma_fit_with_covariates():
    x, labels, s, design = batches()
    fit = fit_gamma(x, labels, s, design)
    code, z = np.searchsorted(fit.labels, labels), design - design.mean(0)

    def minus(at, j):
        eta = z @ at[4:] / 5
        return -negative_binomial(x[:, j], s * np.exp(eta), at[code], at[2 + code]).sum()

    for j in range(x.shape[1]):
        starts = [(-6, -6, b, b, 0, 0) for b in (0.0, 3.0)]
        bounds = [(-30, 5)] * 2 + [LOG_INV_DISP_RANGE] * 2 + [(-20, 20)] * 2
        best = best_by_scipy(lambda at, j=j: minus(at, j), starts, bounds)
        assert abs(best - float(fit.log_likelihood[:, j].sum())) < NATS


def test_scipy_finds_no_better_point_gamma_fit_with_covariates():
    x, labels, s, design = inflated_batches()
    fit = fit_point_gamma(x, labels, s, design)
    code, z = np.searchsorted(fit.labels, labels), design - design.mean(0)

    def minus(at, j):
        m, b, logit, c = at[:2], at[2:4], at[4:6], at[6:]
        a = (m + np.logaddexp(0, logit))[code] + z @ c / 5
        return -zero_inflated(x[:, j], s, a, b[code], logit[code]).sum()

    for j in range(x.shape[1]):
        starts = [(-6, -6, b, b, -1, logit, 0, 0) for b in (0.0, 3.0) for logit in (-4, -1)]
        bounds = [(-30, 5)] * 2 + [LOG_INV_DISP_RANGE] * 2 + [(-25, 10)] * 2 + [(-20, 20)] * 2
        best = best_by_scipy(lambda at, j=j: minus(at, j), starts, bounds)
        assert best - float(fit.log_likelihood[:, j].sum()) < NATS


def test_a_point_mass_is_found_beside_a_covariate():
    x, labels, s, design = inflated_batches()
    fit, gamma = fit_point_gamma(x, labels, s, design), fit_gamma(x, labels, s, design)
    zero = torch.sigmoid(fit.logit_zero)
    np.testing.assert_allclose(zero[0], 0.3, atol=0.1)
    assert (zero[1] < 0.05).all()
    np.testing.assert_allclose(fit.coefficients.mean(1), [0.8, -0.05], atol=0.1)
    assert (fit.log_likelihood.sum(0) - gamma.log_likelihood.sum(0)).min() > 1


@pytest.mark.parametrize("fit", FITS)
def test_the_unit_of_a_covariate_does_not_matter(fit):
    x, labels, s, design = batches()
    once, again = fit(x, labels, s, design), fit(x, labels, s, design * [10.0, -0.1] + [3.0, 7.0])
    np.testing.assert_allclose(again.log_likelihood, once.log_likelihood, rtol=1e-10)
    scaled = again.coefficients * torch.tensor([[10.0], [-0.1]])
    np.testing.assert_allclose(scaled, once.coefficients, atol=1e-4)


@pytest.mark.parametrize("fit", FITS)
def test_a_gene_of_one_batch_alone_and_of_one_label_alone_stays_finite(fit):
    x, labels, s, design = batches()
    x[design[:, 0] == 1, 0] = 0
    x[labels == "a", 1] = 0
    x[:, 2] = 0
    found = fit(x, labels, s, design[:, :1])
    for part in (found.log_mean, found.log_likelihood, found.coefficients):
        assert torch.isfinite(part).all()
    rest = design[:, 0] == 0
    alone = fit(x[rest][:, :1], labels[rest], s[rest])
    np.testing.assert_allclose(found.log_likelihood[:, :1], alone.log_likelihood, atol=1e-5)
    only = fit(x[labels == "b"][:, [1]], labels[labels == "b"], s[labels == "b"], design[labels == "b", :1])
    np.testing.assert_allclose(found.log_likelihood[1, 1], only.log_likelihood[0, 0], atol=1e-5)
    assert (found.log_likelihood[:, 2].abs() < 2e-3).all()


# ---- labels and awkward cells ----------------------------------------------------------------------


@pytest.mark.parametrize("fit", FITS)
def test_silent_genes_are_poisson_at_the_floor(fit):
    x, labels, s = simulated()
    found = fit(x, labels, s)
    floor = lowest_log_mean(s.sum())
    assert (found.log_mean[:, 0] == floor).all()
    want = [-s[labels == value].sum() * math.exp(floor) for value in found.labels]
    np.testing.assert_allclose(found.log_likelihood[:, 0], want, rtol=1e-9)
    if fit is not fit_point:
        assert (found.log_inv_disp[:, 0] == LOG_INV_DISP_RANGE[1]).all()
    if fit is fit_point_gamma:
        assert (found.logit_zero[:, 0] == -math.inf).all()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("n_covariates", [0, 1])
def test_a_label_without_cells_has_log_likelihood_0_and_changes_nothing(fit, n_covariates):
    x, labels, s = simulated()
    covariates = np.random.default_rng(0).normal(size=(len(s), 1))
    more = {"design": covariates} if n_covariates else {}
    given = pd.Categorical(labels, categories=["c", "none", "b", "a"])
    found, plain = fit(x, given, s, **more), fit(x, labels, s, **more)
    assert found.labels.tolist() == ["c", "none", "b", "a"]
    assert (found.log_likelihood[1] == 0).all()
    assert (found.log_mean[1] == lowest_log_mean(s.sum())).all() or more
    for mine, theirs in zip(found[1:], plain[1:], strict=True):
        assert not torch.isnan(mine).any()
        if mine.shape[0] == 4:
            np.testing.assert_allclose(mine[[3, 2, 0]], theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("make", [list, pd.Series, pd.Categorical, lambda v: np.char.add(v, "?"), "codes"])
def test_labels_may_be_strings_categories_or_numbers(fit, make):
    x, labels, s = simulated(n_genes=5)
    given = np.searchsorted(["a", "b", "c"], labels) * 10 if make == "codes" else make(labels)
    found, plain = fit(x, given, s), fit(x, labels, s)
    assert found.labels.tolist() == np.unique(np.asarray(given)).tolist()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[1:], plain[1:], strict=True))


@pytest.mark.parametrize("fit", FITS)
def test_sparse_counts_and_the_row_sums_by_default(fit):
    x, labels, _ = simulated(n_genes=5)
    found, plain = fit(sp.csc_matrix(x), labels), fit(x.astype(int), labels, x.sum(1))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[1:], plain[1:], strict=True))


@pytest.mark.parametrize("fit", FITS)
def test_the_order_of_cells_does_not_matter_and_empty_cells_add_nothing(fit):
    x, labels, s = simulated(zero=0.3)
    order = np.random.default_rng(0).permutation(len(s))
    order = np.r_[order, order[:3]]
    mixed, sizes = x[order], s[order].copy()
    mixed[-3:], sizes[-3:] = 0, 0
    found, plain = fit(mixed, labels[order], sizes), fit(x, labels, s)
    np.testing.assert_allclose(found.log_likelihood, plain.log_likelihood, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.log_mean, plain.log_mean, atol=1e-4)


@pytest.mark.parametrize("fit", FITS)
def test_cells_without_any_count_are_silent(fit):
    found = fit(np.zeros((4, 3)), ["a", "a", "b", "b"])
    assert torch.isfinite(found.log_mean).all()
    assert (found.log_likelihood == 0).all()


# ---- the door --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": ["a"]}, "labels has shape"),
        ({"labels": np.array(["a", None] * 60, dtype=object)}, "labels is missing for cell 1"),
        ({"size_factors": np.ones(3)}, "size_factors holds 3 values"),
        ({"counts": np.full((120, 12), 0.5)}, "fractional"),
        ({"design": np.ones(120)}, "design has shape"),
        ({"design": np.ones((120, 0))}, "design has shape"),
        ({"design": np.full((120, 1), np.nan)}, "design holds NaN"),
        ({"design": [["red"]] * 120}, "design holds something else"),
        ({"design": np.ones((120, 1))}, "design: a covariate follows"),
        ({"design": "labels"}, "design: a covariate follows"),
    ],
)
@pytest.mark.parametrize("fit", FITS)
def test_one_line_says_what_is_wrong(fit, change, message):
    x, labels, s = simulated()
    if isinstance(change.get("design"), str):
        change = {"design": (labels == "a")[:, None]}
    arguments = {"counts": x, "labels": labels, "size_factors": s} | change
    with pytest.raises(InputError, match=message) as error:
        fit(**arguments)
    assert "\n" not in str(error.value)

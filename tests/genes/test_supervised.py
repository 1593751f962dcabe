"""Fits given the labels: the best there are, for any labels and cells."""

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

from nbmix.core.parameters import LOG_INV_DISP_RANGE, lowest_log_mean
from nbmix.errors import InputError
from nbmix.genes.supervised import compare_genes, fit_gamma, fit_point, fit_point_gamma
from tests.helpers.genes import KINDS, genes_of_every_kind
from tests.helpers.labelled import (
    FITS,
    best_gamma,
    best_point_gamma,
    minus_zero_inflated,
    simulated,
    values,
    zero_inflated,
)
from tests.helpers.running import ROOT

NATS = 1e-6  # what a fit may lack of the best log likelihood
FACS = ROOT.parent / "shared" / "data" / "pbmc_facs.h5ad"


@pytest.mark.parametrize("at", [(-7.0, 0.5), (-7.0, 0.5, -1.0), (-6.0, -2.0, 1.0)])
def test_the_references_are_scipys_with_their_gradients(at):
    x, _, s = simulated(n_genes=2, zero=0.3)
    x = x[:, 1]
    logit = at[2] if len(at) == 3 else -800.0
    want = zero_inflated(x, s, at[0] + np.logaddexp(0, logit), at[1], logit).sum()
    assert -minus_zero_inflated(at, x, s)[0] == pytest.approx(want, rel=1e-12)
    off = scipy.optimize.check_grad(*(lambda at, i=i: minus_zero_inflated(at, x, s)[i] for i in (0, 1)), at)
    assert off < 1e-3


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

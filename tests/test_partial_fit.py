"""Fits by parts: as good as a fit of all cells, and with the habits of scikit-learn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import nbmix
from nbmix import NBMixture
from nbmix.errors import InputError
from tests.helpers.estimators import AMORTIZED, COUNTS, EM, annotated, same_bits

CELLS = nbmix.simulate(n=1500, p=120, k=3, s=2e3, seed=5)
FITTED, HELD_OUT = CELLS.counts[:1200], CELLS.counts[1200:]


def by_parts(counts, *cuts, **settings) -> NBMixture:
    mixture = NBMixture(3, start="kmeans", **settings)
    for rows in np.split(np.arange(counts.shape[0]), cuts):
        mixture.partial_fit(counts[rows])
    return mixture


@pytest.mark.parametrize("settings", [{}, {"folds": 1}, {"pseudo_cells": 10, "weights": "uniform"}], ids=str)
def test_parts_are_nearly_as_good_as_all_cells_together(settings):
    mixture = by_parts(FITTED, 150, 151, 500, **settings)
    together = NBMixture(3, start="kmeans", **settings).fit(FITTED).score(HELD_OUT)
    first = by_parts(FITTED[:150], **settings).score(HELD_OUT)
    assert mixture.score(HELD_OUT) > together - 0.5
    assert first < together - 1
    assert mixture.n_samples_seen_ == 1200


def test_what_is_said_of_cells_is_of_the_latest_part():
    mixture = by_parts(FITTED, 400)
    first = by_parts(FITTED[:400])
    n_iterations = first.n_iter_
    unseen = first.score_samples(FITTED[400:])
    np.testing.assert_allclose(mixture.log_likelihoods_, unseen, rtol=1e-4)
    assert mixture.labels_.shape == (800,)
    assert mixture.lower_bound_ == pytest.approx(mixture.log_likelihoods_.mean())
    assert (mixture.n_iter_, mixture.converged_) == (n_iterations + 1, None)
    assert mixture.cut(2).shape == (800, 2)


def test_a_mixture_that_was_kept_goes_on_with_the_same_bits(tmp_path):
    first = by_parts(FITTED, 300, 600)
    first.save(tmp_path / "parts.ckpt")
    again = NBMixture.load(tmp_path / "parts.ckpt")
    assert again.n_samples_seen_ == 1200
    more = HELD_OUT.tolil(copy=True)
    more[0, 3] = 700  # deeper than any cell, with a count that none has had
    assert same_bits(first.partial_fit(more), again.partial_fit(more))
    assert again.n_samples_seen_ == 1500


def test_genes_of_an_anndata_are_matched_by_name():
    adata = annotated()
    one, other = (NBMixture(**EM).partial_fit(adata[:80]) for _ in range(2))
    turned = adata[80:, ::-1].copy()
    assert same_bits(one.partial_fit(adata[80:]), other.partial_fit(turned))
    other = adata[80:, :-1].copy()
    with pytest.raises(InputError, match="partial_fit: 1 genes of the first part are missing, such as 'g59'"):
        one.partial_fit(other)


def test_silent_genes_take_part_from_their_first_count_on():
    late = FITTED.tolil(copy=True)
    late[:600, :10] = 0
    mixture = by_parts(late.tocsr()[:600])
    assert np.isnan(mixture.log_mean_[:, :10]).all()
    mixture.partial_fit(late.tocsr()[600:])
    assert np.isfinite(mixture.log_mean_).all()
    assert np.isfinite(mixture.score(HELD_OUT))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (-COUNTS[:5], "negative values"),
        (COUNTS[:5] * 0.5, "fractional values"),
        (COUNTS[:5] * 0, "every cell is empty"),
        (COUNTS[:0], "0 sample"),
        (COUNTS[:5, :-1], "59 features"),
        (pd.DataFrame([["a", "b"]]), "could not convert"),
    ],
)
def test_a_part_that_cannot_be_used_leaves_the_mixture_as_it_was(part, message):
    mixture = NBMixture(**EM).partial_fit(COUNTS[:80])
    before = mixture.component_log_mean_
    with pytest.raises(ValueError, match=message):
        mixture.partial_fit(part)
    assert mixture.component_log_mean_ is before
    assert mixture.n_samples_seen_ == 80
    assert mixture.partial_fit(COUNTS[80:81]).n_samples_seen_ == 81  # one cell is a part


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AMORTIZED, "partial_fit: model=amortized has no sums"),
        (EM | {"batch_key": "donor"}, "partial_fit: offsets of batches need all cells"),
        (EM | {"folds": 5, "n_components": 1}, "minimum of 2 is required"),
    ],
)
def test_a_first_part_that_cannot_be_used_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NBMixture(**settings).partial_fit(COUNTS[:1])


def test_only_partial_fit_keeps_sums():
    mixture = NBMixture(**EM).fit(COUNTS)
    assert not hasattr(mixture, "n_samples_seen_")
    with pytest.raises(InputError, match="was fitted to its cells at once"):
        mixture.partial_fit(COUNTS)
    parts = NBMixture(**EM).partial_fit(COUNTS)
    assert same_bits(parts, mixture)
    assert same_bits(parts.partial_fit(COUNTS).fit(COUNTS), mixture)

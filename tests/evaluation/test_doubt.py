"""What speaks against the group of a cell: a second one, or all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import nbinom

from nbmix.core.parameters import Components
from nbmix.data.simulate import draw_counts
from nbmix.evaluation.doubt import (
    AMBIGUOUS_BELOW,
    MISFIT_FROM,
    Doubt,
    misfits,
    other_components,
    second_best,
)
from tests.helpers.mixtures import Data, awkward_data
from tests.helpers.origins import BatchedCells


def components_of(n_components, n_genes, seed=0, log_mean=-5.0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(log_mean, 1, (n_components, n_genes)), rng.normal(1, 1, (n_components, n_genes))
    return Components(torch.from_numpy(a), torch.from_numpy(b)), torch.from_numpy(
        np.log(rng.dirichlet(np.ones(n_components)))
    )


def set_copies(mixture, seed=0):
    """Every copy has components and weights of its own."""
    for copy in range(mixture.settings.n_copies):
        found, log_weights = components_of(
            mixture.settings.n_components, mixture.log_mean.shape[2], seed + copy
        )
        mixture.log_mean.data[copy], mixture.log_inv_disp.data[copy] = found
        mixture.log_weights.data[copy] = log_weights
    mixture.forget_tables()


def by_scipy(counts, sizes, components):
    """(cells, K) nats."""
    a, r = components.log_mean.numpy(), components.log_inv_disp.exp().numpy()
    mean = sizes[:, None, None] * np.exp(a)
    return nbinom.logpmf(counts.toarray()[:, None], r, r / (r + mean)).sum(2)


def of_data(data, mixture):
    """Misfits, and ln p of the copy of all cells and of the one that has not seen a cell."""
    whole, unseen = torch.zeros(2, data.n_cells, dtype=torch.float64)
    for batch in data.batches:
        whole[batch.rows] = mixture.posterior(batch, fold=-1).log_likelihood
        unseen[batch.rows] = mixture.posterior(batch).log_likelihood
    return misfits(mixture, data.batches, whole, unseen), whole, unseen


@pytest.mark.parametrize(
    ("q", "second", "margin"),
    [
        ([0.6, 0.3, 0.1], 1, math.log(2)),
        ([0.1, 0.45, 0.45], 2, 0.0),
        ([1.0, 0.0, 0.0], 1, -math.log(np.finfo(float).tiny)),
        ([0.0, 1e-300, 1.0], 1, 300 * math.log(10)),
        ([1.0], -1, math.inf),
    ],
)
def test_the_second_group_and_its_margin(q, second, margin):
    found = second_best(np.array([q]))
    assert found[0] == [second]
    np.testing.assert_allclose(found[1], margin, rtol=1e-12)


def test_a_cell_is_ambiguous_below_odds_of_nine_to_one():
    q = np.array([[0.91, 0.09], [0.89, 0.11]])
    doubt = Doubt(*second_best(q), np.array([MISFIT_FROM - 1e-9, MISFIT_FROM]))
    assert doubt.is_ambiguous.tolist() == [False, True]
    assert doubt.fits_no_group.tolist() == [False, True]
    assert math.log(9) == AMBIGUOUS_BELOW


def test_the_average_cell_and_halves_have_the_moments_of_drawn_expression():
    components, log_weights = components_of(3, 2, seed=3, log_mean=0.0)
    rng, n = np.random.default_rng(0), 400_000
    mean, r = components.log_mean.exp().numpy(), components.log_inv_disp.exp().numpy()
    kinds = rng.choice(3, n, p=np.exp(log_weights.numpy()))
    average = rng.gamma(r[kinds], mean[kinds] / r[kinds])  # (cells, genes)
    others = other_components(components, log_weights)
    own = [rng.gamma(r[c], mean[c] / r[c], (n, 2)) for c in range(3)]
    for number, drawn in enumerate([average, *[(x + average) / 2 for x in own]]):
        np.testing.assert_allclose(others.log_mean[number].exp(), drawn.mean(0), rtol=0.02)
        variance = others.log_mean[number].mul(2).sub(others.log_inv_disp[number]).exp()
        np.testing.assert_allclose(variance, drawn.var(0), rtol=0.08)


@pytest.mark.parametrize("weights", ["learned", "given"])
def test_misfits_are_those_of_scipy_by_copies_that_have_not_seen_a_cell(weights):
    folds = 1 if weights == "given" else 3
    data = awkward_data(folds)
    mixture = data.mixture(3, folds=folds, dtype="float64", weights=weights)
    set_copies(mixture)
    found, _, unseen = of_data(data, mixture)
    for batch in data.batches:
        copy, rows = mixture.copy_for(batch.fold), batch.rows.numpy()
        pi = mixture.log_weights.data[copy].numpy()
        of_cells = np.log(data.prior[rows]) if weights == "given" else pi
        others = other_components(mixture.components(copy), torch.from_numpy(pi))
        of_others = by_scipy(data.counts[rows], data.s[rows], others)
        halves = logsumexp(of_cells + of_others[:, 1:], axis=1)
        want = np.logaddexp(of_others[:, 0], halves) - math.log(2) - unseen[rows].numpy()
        np.testing.assert_allclose(found[rows], want, rtol=1e-6, atol=1e-6)


def test_misfits_know_of_batches():
    cells = BatchedCells(n=120, p=30)
    mixture = cells.mixture()
    set_copies(mixture, seed=5)
    mixture.origins.offsets.copy_(torch.from_numpy(cells.offsets).expand_as(mixture.origins.offsets))
    none = torch.full((120,), torch.nan, dtype=torch.float64)
    whole = none.clone()
    batches = [cells.batch(np.flatnonzero(cells.origins == g)) for g in (0, 1)]
    for batch in batches:
        whole[batch.rows] = mixture.posterior(batch).log_likelihood
    found = misfits(mixture, batches, whole, none)
    others = other_components(mixture.components(), mixture.log_weights.data[-1])
    for g in (0, 1):
        rows = np.flatnonzero(cells.origins == g)
        moved = Components(others.log_mean + torch.from_numpy(cells.offsets[g]), others.log_inv_disp)
        of_others = by_scipy(cells.counts[rows], cells.s[rows], moved)
        halves = logsumexp(mixture.log_weights.data[-1].numpy() + of_others[:, 1:], axis=1)
        want = np.logaddexp(of_others[:, 0], halves) - math.log(2) - whole[rows].numpy()
        np.testing.assert_allclose(found[rows], want, rtol=1e-6, atol=1e-6)


def drawn(components, log_weights, n_cells, sizes, seed=0):
    rng = np.random.default_rng(seed)
    kinds = rng.choice(len(log_weights), n_cells, p=np.exp(log_weights.numpy()))
    a, b = (t.numpy() for t in components)
    return draw_counts(kinds, np.broadcast_to(sizes, n_cells), a, b, rng), kinds


def misfits_of(counts, sizes, components, log_weights):
    data = Data(counts, np.broadcast_to(sizes, counts.shape[0]), block_size=20_000)
    mixture = data.mixture(len(log_weights), folds=1, dtype="float64")
    mixture.set_components(components)
    mixture.log_weights.data[:] = log_weights
    mixture.forget_tables()
    return of_data(data, mixture)[0]


def test_the_likelihood_ratio_has_a_mean_of_one_over_cells_of_the_mixture():
    components, log_weights = components_of(3, 3, seed=1, log_mean=-1.0)
    counts, _ = drawn(components, log_weights, 20_000, 3.0)
    ratios = np.exp(misfits_of(counts, 3.0, components, log_weights))
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / len(ratios) ** 0.5
    assert ratios.std() / len(ratios) ** 0.5 < 0.02


@pytest.mark.parametrize("spread", [0.1, 0.3, 1.0])  # of ln fold changes between kinds
def test_at_most_a_cell_in_a_thousand_of_the_mixture_is_called_foreign_at_any_depth(spread):
    rng, n = np.random.default_rng(2), 4000
    base = rng.normal(-6, 1, 100)
    components = Components(
        torch.from_numpy(base + rng.normal(0, spread, (3, 100))), torch.full((3, 100), 1.0).double()
    )
    log_weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    sizes = np.exp(rng.uniform(math.log(20), math.log(5000), n))
    counts, _ = drawn(components, log_weights, n, sizes)
    found = misfits_of(counts, sizes, components, log_weights)
    assert (found >= MISFIT_FROM).mean() <= 1e-3


def test_foreign_cells_and_doublets_are_found():
    rng, n = np.random.default_rng(4), 300
    base = rng.normal(-7, 1, 400)
    means = base + rng.normal(0, 1, (4, 400)) * (rng.random((4, 400)) < 0.3)
    everything = Components(torch.from_numpy(means), torch.ones(4, 400).double())
    components = Components(*(t[:3] for t in everything))
    log_weights = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    a, b = (t.numpy() for t in everything)
    foreign = draw_counts(np.full(n, 3), np.full(n, 2e3), a, b, rng)
    one, other = (draw_counts(np.full(n, k), np.full(n, 1e3), a, b, rng) for k in (0, 1))
    own, _ = drawn(components, log_weights, n, 2e3)
    shares = [
        (misfits_of(x, 2e3, components, log_weights) >= MISFIT_FROM).mean()
        for x in (foreign, one + other, own)
    ]
    assert shares[0] > 0.95
    assert shares[1] > 0.95
    assert shares[2] == 0

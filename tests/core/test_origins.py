"""The mixture of cells from several batches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.stats
import torch

from nbmix.core.em_loop import run_em
from nbmix.core.mixture import Mixture
from nbmix.core.settings import MixtureSettings
from tests.helpers.origins import BatchedCells


def fitted(cells, batches=None, **settings):
    mixture = cells.mixture(**settings)
    folds = mixture.settings.folds
    run = run_em(mixture, batches or cells.batches(folds), responsibilities=cells.q, max_iterations=12)
    return mixture, run


@pytest.fixture(scope="module")
def cells():
    return BatchedCells()


@pytest.fixture(scope="module")
def fit(cells):
    return fitted(cells)


def test_e_step_is_that_of_scipy_with_every_copys_own_offsets(cells, fit):
    mixture, _ = fit
    for batch in cells.batches()[:4]:
        a, b = (t.numpy() for t in mixture.components(batch.fold))
        d = mixture.origins.offsets[batch.fold, batch.origins].numpy()[:, None]
        rows, r = batch.rows.numpy(), np.exp(b)
        x, s = cells.counts[rows].toarray()[:, None], cells.s[rows, None, None]
        expected = scipy.stats.nbinom.logpmf(x, r, 1 / (1 + s * np.exp(a + d) / r)).sum(2)
        np.testing.assert_allclose(mixture.component_log_likelihood(batch).numpy(), expected, rtol=1e-7)


def test_cells_of_no_batch_see_the_components_as_they_are(cells, fit):
    mixture, _ = fit
    alone = Mixture(cells.counts.shape[1], MixtureSettings(2, folds=5, dtype="float64"))
    alone.attach(cells.basis, 1.0).set_components(mixture.components())
    batch = cells.batch(np.arange(30), known=False)
    expected = alone.component_log_likelihood(batch)
    torch.testing.assert_close(mixture.component_log_likelihood(batch), expected, rtol=0, atol=0)


def test_offsets_are_recovered_and_centred(cells, fit):
    mixture, run = fit
    found = mixture.origins.offsets
    weighted = torch.einsum("g,cgj->cj", torch.from_numpy(cells.n_cells).double(), found)
    assert float(weighted.abs().max()) < 1e-9
    error = found[-1].numpy() - cells.offsets
    assert np.sqrt((error**2).mean()) < 0.12
    without = Mixture(cells.counts.shape[1], mixture.settings).attach(cells.basis, float(cells.s.sum()))
    none = run_em(without, cells.batches(by_origin=False), responsibilities=cells.q, max_iterations=12)
    assert run.objective[-1] > none.objective[-1] + 1  # of cells that are not seen


def test_a_cell_has_no_part_in_the_offsets_that_judge_it(cells):
    changed = copy.copy(cells)
    rows = np.concatenate([b.rows.numpy() for b in cells.batches() if b.fold == 0])
    kinds = cells.kinds.copy()
    kinds[rows] = 1 - kinds[rows]
    changed.kinds = kinds
    first, second = (c.mixture() for c in (cells, changed))
    for one, mixture in ((cells, first), (changed, second)):
        run_em(mixture, one.batches(), responsibilities=one.q, max_iterations=1)
    torch.testing.assert_close(first.origins.offsets[0], second.origins.offsets[0], rtol=0, atol=1e-12)
    assert not torch.allclose(first.origins.offsets[1], second.origins.offsets[1])


def test_batches_come_in_any_order(cells, fit):
    mixture, run = fit
    mixed = cells.batches()
    mixed = [mixed[i] for i in np.random.default_rng(0).permutation(len(mixed))]
    other, again = fitted(cells, mixed)
    assert again.objective == pytest.approx(run.objective, rel=1e-9)
    torch.testing.assert_close(other.origins.offsets, mixture.origins.offsets, rtol=1e-6, atol=1e-8)


def test_batches_that_are_drawn_by_lot_cost_next_to_nothing():
    cells = BatchedCells(n=600, p=80, spread=0.0)
    mixture, run = fitted(cells)
    without = Mixture(80, mixture.settings).attach(cells.basis, float(cells.s.sum()))
    none = run_em(without, cells.batches(by_origin=False), responsibilities=cells.q, max_iterations=12)
    assert run.objective[-1] > none.objective[-1] - 0.2
    assert float(mixture.origins.offsets[-1].abs().mean()) < 0.03


def test_a_kind_in_one_batch_alone_is_kept():
    cells = BatchedCells(n=600, p=80, k=3, missing=(2, 1))
    mixture, _ = fitted(cells)
    found = np.empty(600, dtype=int)
    for batch in cells.batches():
        found[batch.rows] = mixture.posterior(batch).responsibilities.argmax(1).numpy()
    assert (found == cells.kinds).mean() > 0.99


@pytest.mark.parametrize("pseudo_cells", ["auto", 0])
def test_plain_em_has_offsets_too(cells, pseudo_cells):
    mixture, run = fitted(cells, folds=1, pseudo_cells=pseudo_cells)
    assert np.sqrt(((mixture.origins.offsets[-1].numpy() - cells.offsets) ** 2).mean()) < 0.12
    assert run.objective[-1] > run.objective[0] - 0.01  # the prior of offsets has no part in it


def test_a_batch_of_an_unknown_origin_is_an_error(cells):
    mixture = cells.mixture()
    mixture.reset_statistics()
    batch = cells.batch(np.arange(5), 0, known=False)
    with pytest.raises(ValueError, match="origin"):
        mixture.collect(batch, cells.q[:5])


def test_statistics_of_all_cells_have_no_offsets(cells, fit):
    mixture, _ = fit
    seen, basis = mixture.origins.statistics(cells.batches(), cells.basis, cells.q)
    assert basis.nodes.log_nodes.shape == (cells.counts.shape[1], seen.rate.shape[2])
    np.testing.assert_allclose(seen.rate.sum(2).T, (cells.counts.T @ cells.q.numpy()).T, rtol=1e-4)

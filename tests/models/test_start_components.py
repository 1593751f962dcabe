"""Components that minibatches begin at: which cells EM sees, in which folds, and when there is no EM."""

from __future__ import annotations

import numpy as np
import torch

from nbmix.core.em_loop import run_em
from nbmix.core.settings import MixtureSettings
from nbmix.data.module import CountsDataModule
from nbmix.models.start_components import (
    START_FOLDS,
    START_ITERATIONS,
    improved_on_all_cells,
    start_cells,
    start_components,
)
from nbmix.starts.base import StartState, new_mixture, one_hot, prepare, random_responsibilities
from tests.helpers.running import small_data


def cells(**settings):
    data = small_data()
    module = CountsDataModule(lambda: data, validation_share=0.0, dtype="float32", **settings)
    module.setup()
    return module


def test_no_component_of_given_responsibilities_is_lost_where_em_sees_some_cells():
    drawn = np.random.default_rng(0).permutation(60)[:20]
    rare = np.setdiff1d(np.arange(60), drawn)[:3]
    q = one_hot(np.isin(np.arange(60), rare).astype(int), 2)
    seen = start_cells(q, 0, n_cells=20, n_cells_of_a_component=5)
    assert seen.tolist() == sorted([*drawn, *rare])


def test_em_sees_all_cells_where_there_are_few():
    q = random_responsibilities(60, 2, np.random.default_rng(0))
    assert start_cells(q, 0).tolist() == list(range(60))


def test_components_of_a_start_are_taken_as_they_are():
    module = cells()
    mixture = new_mixture(module.data, MixtureSettings(2, folds=1), module.basis)
    state = StartState.of(mixture)
    assert start_components(state, module, MixtureSettings(2)) is state


def test_em_says_which_components_belong_together_where_a_start_does_not():
    module, settings = cells(), MixtureSettings(4, folds=1, n_groups=2)
    q = one_hot(np.arange(60) % 4, 4)
    found = start_components(StartState(q), module, settings)
    again = start_components(found._replace(join_evidence=None), module, settings)
    for state in (found, again):
        assert state.n_components == 4
        assert state.join_evidence.log_joint.shape == (60, 4)
        assert np.isfinite(state.join_evidence.log_joint).all()


def test_given_responsibilities_go_on_by_em_in_the_folds_of_a_fit():
    """Where EM ends may depend on the folds, and it is to end where a fit by EM does."""
    q = one_hot(np.arange(60) % 2, 2)
    found = {}
    for seed in (3, 4):
        of_fit, settings = cells(folds=START_FOLDS, seed=seed), MixtureSettings(2, folds=START_FOLDS)
        mixture = new_mixture(of_fit.data, settings, of_fit.basis)
        batches = list(of_fit.train_dataloader())
        run_em(mixture, batches, responsibilities=q, max_iterations=START_ITERATIONS)
        # a model that learns by minibatches has no folds of its own
        found_here = start_components(
            StartState(q), cells(shuffle=True, seed=seed), MixtureSettings(2, folds=1)
        )
        components, log_weights = found_here.components, found_here.log_weights
        assert torch.equal(components.log_mean, mixture.components().log_mean)
        assert torch.equal(components.log_inv_disp, mixture.components().log_inv_disp)
        assert torch.equal(log_weights, mixture.log_weights.data[-1])
        found[seed] = components.log_mean
    assert not torch.equal(found[3], found[4])


def test_many_cells_improve_components_that_some_have_found():
    data = small_data(n_cells=10_100, n_genes=10)
    module = CountsDataModule(lambda: data, validation_share=0.0)
    module.setup()
    settings = MixtureSettings(2, folds=1)
    few = data.select_cells(np.arange(40))
    basis, batches = prepare(few, 1, np.random.default_rng(0))
    mixture = new_mixture(few, settings, basis)
    run_em(mixture, batches, responsibilities=one_hot(np.arange(40) % 2, 2))
    start = StartState.of(mixture)
    assert improved_on_all_cells(start, module, settings, 0) is start
    reached = []
    for state in (start, *(improved_on_all_cells(start, module, settings, n) for n in (1, 3))):
        whole = new_mixture(data, settings, module.basis, state)
        reached.append(sum(float(whole.posterior(b).log_likelihood.sum()) for b in module.training_pass()))
    assert reached[0] + 1000 < reached[1] < reached[2]


def test_components_of_few_cells_stay_those_of_the_start():
    module, settings = cells(), MixtureSettings(2, folds=1)
    start = StartState.of(new_mixture(module.data, settings, module.basis))
    assert improved_on_all_cells(start, module, settings, 3) is start

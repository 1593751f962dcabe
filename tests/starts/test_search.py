"""The search of random starts: runs that race, and components that are taken away."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.metrics import adjusted_rand_score

from nbmix.starts.search import Search, losses_without, most_variable_genes, total_log_likelihood
from tests.helpers.running import small_data


def generator():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def search():
    return Search.of(small_data(), generator(), max_genes=50, n_axes=1, folds=3)


def test_a_search_sees_the_most_variable_genes_alone(search):
    data = small_data()
    seen = most_variable_genes(data.counts, data.size_factors, 50)
    assert search.data.gene_names.tolist() == data.gene_names[seen].tolist()
    assert search.cells.n_genes == data.n_genes
    assert {batch.fold for batch in search.batches} == {0, 1, 2}


@pytest.mark.parametrize(("n_starts", "n_kept"), [(1, 1), (2, 1), (4, 2), (5, 3)])
def test_the_better_half_of_the_runs_goes_on(search, n_starts, n_kept):
    draws = generator()
    race = search.race([search.at_random(4, draws) for _ in range(n_starts)], 2)
    best = sorted((run.score for run in race.begun), reverse=True)
    assert len(race.begun) == n_starts
    assert [run.score for run in race.gone_on] == best[:n_kept]
    assert race.best.component_joint.shape == (60, 2)
    assert race.best.score > max(search.without_least_missed(run, 2, 1).score for run in race.gone_on)


def test_a_run_is_scored_by_its_joint_log_likelihood(search):
    run = search.run(search.by_k_means(2, generator()), 3)
    assert run.score == total_log_likelihood(run.joint.flatten(1))
    assert run.score == pytest.approx(total_log_likelihood(run.component_joint), rel=1e-12)
    assert torch.equal(run.joint, run.model.all_joint(search.batches))
    assert search.go_on(run, 0) is run


def test_the_component_that_is_missed_least_is_taken_away(search):
    """Of three that share two groups, one of the two that share one."""
    codes = np.unique(search.data.labels, return_inverse=True)[1]
    split = torch.from_numpy(np.eye(3)[np.where(codes == 1, 1 + np.arange(60) % 2, 0)])
    left = search.without_least_missed(search.run(split, 1), 2, 3)
    assert adjusted_rand_score(codes, left.component_joint.argmax(1).numpy()) == 1


def test_a_path_holds_every_number_of_components_and_the_better_run_of_each(search):
    found = search.path(4, generator())
    assert {k: joint.shape for k, joint in found.items()} == {k: (60, k) for k in (1, 2, 3, 4)}
    begin = search.run(search.by_k_means(4, generator()), 5)
    one_run = search.without_least_missed(begin, 2, 3)
    assert total_log_likelihood(found[2]) >= one_run.score - 1e-9 * abs(one_run.score)


def test_no_component_is_missed_by_less_than_nothing():
    """Else none of those that are tried to be taken away would be within a factor of the least."""
    for seed in range(20):
        joint = torch.from_numpy(np.random.default_rng(seed).normal(size=(40, 9)))
        joint[:, 2] -= 45.0  # no cell's, so that rounding is all that is left of its loss
        losses = losses_without(joint)
        assert 0 <= losses[2] < 1e-12
        assert losses.argmin() == 2


def test_the_most_variable_genes_are_those_beyond_poisson():
    rng = np.random.default_rng(0)
    s = rng.uniform(0.5, 2, 500)
    poisson = rng.poisson(s[:, None] * rng.uniform(0.1, 20, 60))
    mixed = rng.poisson(s[:, None] * np.where(rng.random((500, 8)) < 0.5, 0.5, 3.0))
    counts = sp.csr_matrix(np.hstack([poisson, mixed, np.zeros((500, 2))]).astype(np.float32))
    assert most_variable_genes(counts, s, 8).tolist() == list(range(60, 68))
    assert most_variable_genes(counts, s, 1000).tolist() == list(range(70))


def test_the_score_of_a_gene_by_hand():
    x, s = np.array([[3.0, 0.0], [1.0, 9.0], [0.0, 1.0]]), np.array([1.0, 2.0, 1.0])
    scores = []
    for gene in x.T:
        mean = gene.sum() / s.sum() * s
        scores.append(((gene - mean) ** 2 - gene).sum() / np.sqrt((2 * mean**2 + mean).sum()))
    wanted = [int(np.argmax(scores))]
    assert most_variable_genes(sp.csr_matrix(x.astype(np.float32)), s, 1).tolist() == wanted

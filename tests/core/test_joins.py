"""Trees of joins on log joints of known truth, and on a fit."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import nbinom, norm
from sklearn.metrics import adjusted_rand_score

from nbmix.core.joins import (
    JoinTree,
    group_components,
    group_log_joint,
    group_probabilities,
    join_tree,
    mean_inflation,
    pairwise,
)
from nbmix.core.separation import gap_p_value, separation
from nbmix.core.tables import batch_log_likelihood
from nbmix.errors import InputError
from nbmix.models.mixture_em import MixtureEM
from tests.helpers.running import fit, small_data


def cells_of_kinds(
    n_kinds: int = 3, parts: int = 2, n_cells: int = 900, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Log joint (cells, kinds * parts), log weights, size factors and kinds of cells in a plane.

    A kind is a normal cloud, longer along a programme, which its components cut into parts; a component's log
    likelihood is that of a normal around its own part, times depth.
    """
    rng = np.random.default_rng(seed)
    kind = np.sort(rng.integers(0, n_kinds, n_cells))
    s = rng.lognormal(0, 0.3, n_cells)
    angle = 2 * np.pi * np.arange(n_kinds) / n_kinds
    centre = 8 * np.column_stack([np.cos(angle), np.sin(angle)])
    along = np.column_stack([-np.sin(angle), np.cos(angle)])
    at = centre[kind] + 1.5 * rng.normal(size=(n_cells, 1)) * along[kind] + rng.normal(size=(n_cells, 2)) / 2
    offset = 2.4 * ((np.arange(parts) + 0.5) / parts - 0.5) * (parts > 1)
    centres = (centre[:, None] + offset[None, :, None] * along[:, None]).reshape(-1, 2)
    ll = -4 * s[:, None] * ((at[:, None] - centres) ** 2).sum(2)
    log_weights = np.full(n_kinds * parts, -np.log(n_kinds * parts))
    return ll + log_weights, log_weights, s, kind


def as_sets(groups) -> set:
    return {frozenset(group) for group in groups}


def test_components_of_kinds_are_joined_to_kinds():
    log_joint, log_weights, s, kind = cells_of_kinds()
    tree = join_tree(log_joint, log_weights, s)
    assert tree.n_with_gaps == 3
    assert as_sets(tree.groups(3)) == {frozenset({0, 1}), frozenset({2, 3}), frozenset({4, 5})}
    label = group_log_joint(log_joint, tree.groups(3)).argmax(1)
    assert adjusted_rand_score(kind, label) == 1
    no_gap, gap = tree.joins[:3], tree.joins[3:]
    assert min(join.p_value for join in no_gap) > 0.1 > 1e-6 > max(join.p_value for join in gap)
    assert max(join.separation for join in no_gap) < 3.5 < min(join.separation for join in gap)
    assert min(join.crossing for join in no_gap) > 0.01 > max(join.crossing for join in gap)


@pytest.mark.parametrize("parts", [3, 4])
def test_a_continuous_programme_has_no_gap(parts):
    log_joint, log_weights, s, _ = cells_of_kinds(1, parts)
    tree = join_tree(log_joint, log_weights, s)
    assert tree.n_with_gaps == 1
    assert tree.most_groups == parts


def counts_along_a_programme(n_kinds: int, depth: float, parts: int = 3, seed: int = 0):
    """As ``cells_of_kinds``, from counts: components are the means of stretches of a kind's programme."""
    rng = np.random.default_rng(seed)
    n_cells, n_genes, inv_disp = 400, 300, 3.0
    base = rng.gamma(0.5, size=n_genes) * np.exp(rng.normal(0, 0.8, (n_kinds, n_genes)))
    load = np.where(rng.random(n_genes) < 0.2, rng.normal(0, 1, n_genes), 0)

    def profiles(k, u):
        expressed = base[k] * np.exp(load * u[:, None])
        return expressed / expressed.sum(1, keepdims=True)

    kind, s = np.sort(rng.integers(0, n_kinds, n_cells)), depth * rng.lognormal(0, 0.3, n_cells)
    mean = s[:, None] * profiles(kind, rng.normal(size=n_cells))
    counts = rng.poisson(mean * rng.gamma(inv_disp, size=mean.shape) / inv_disp)
    ends = norm.ppf(np.arange(1, 2 * parts, 2) / (2 * parts))
    means = profiles(np.repeat(np.arange(n_kinds), parts), np.tile(ends, n_kinds))
    share = 1 / (1 + s[:, None, None] * means / inv_disp)
    log_weights = np.full(n_kinds * parts, -np.log(n_kinds * parts))
    return nbinom.logpmf(counts[:, None], inv_disp, share).sum(2) + log_weights, log_weights, s, kind


@pytest.mark.parametrize("depth", [200, 1000, 20_000])
def test_counts_of_one_kind_along_a_programme_have_no_gap(depth):
    log_joint, log_weights, s, _ = counts_along_a_programme(1, depth)
    assert join_tree(log_joint, log_weights, s).n_with_gaps == 1


@pytest.mark.parametrize("depth", [200, 1000, 20_000])
def test_counts_of_two_kinds_along_a_programme_have_one(depth):
    log_joint, log_weights, s, kind = counts_along_a_programme(2, depth)
    tree = join_tree(log_joint, log_weights, s)
    assert tree.n_with_gaps == 2
    label = group_log_joint(log_joint, tree.groups(2)).argmax(1)
    assert adjusted_rand_score(kind, label) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [3, 10])  # six components have cells, then three
def test_a_fit_of_too_many_components_is_joined_to_the_kinds(epochs):
    data = small_data(300, 200, 3)
    model = MixtureEM(data.gene_names, n_components=6, folds=3)
    module, _ = fit(model, data, epochs=epochs)
    log_joint, log_weights = np.zeros((300, 6)), np.zeros((300, 6))
    for batch in module.predict_dataloader():
        copy = model.mixture.copy_for(batch.fold)
        log_weights[batch.rows] = model.mixture.log_prior(batch, copy).numpy()
        log_likelihood = batch_log_likelihood(batch, model.mixture.basis, model.mixture.tables(copy))
        log_joint[batch.rows] = log_likelihood.numpy() + log_weights[batch.rows]
    tree = join_tree(log_joint, log_weights, data.size_factors)
    assert tree.most_groups == {3: 6, 10: 3}[epochs]
    assert tree.n_with_gaps == 3
    label = group_log_joint(log_joint, tree.groups(3)).argmax(1)
    assert adjusted_rand_score(data.labels, label) > 0.98


def test_a_tree_has_nested_groups_of_every_number():
    log_joint, log_weights, s, _ = cells_of_kinds(3, 3)
    tree = join_tree(log_joint, log_weights, s)
    assert tree.most_groups == 9
    for n in range(1, 10):
        groups = tree.groups(n)
        assert len(groups) == n
        assert sorted(c for group in groups for c in group) == list(range(9))
        n_cells = np.bincount(group_log_joint(log_joint, groups).argmax(1), minlength=n)
        assert (np.diff(n_cells) <= 0).all()  # number 0 is the largest
        if n > 1:
            join = tree.joins[9 - n]
            assert join.n_groups == n
            rest = as_sets(groups) - as_sets([join.first, join.second])
            assert as_sets(tree.groups(n - 1)) == rest | as_sets([join.first + join.second])
            assert join.first[0] < join.second[0]
            assert 0 <= join.crossing <= 1
    for n in (0, 10):
        with pytest.raises(InputError, match="1 to 9 groups"):
            tree.groups(n)


def test_a_tree_survives_a_checkpoint():
    log_joint, log_weights, s, _ = cells_of_kinds()
    tree = join_tree(log_joint, log_weights, s)
    assert JoinTree.of(json.loads(json.dumps(tree.plain()))) == tree


def test_order_of_cells_and_components_does_not_matter():
    log_joint, log_weights, s, _ = cells_of_kinds(3, 3)
    log_weights = log_weights + np.random.default_rng(1).normal(0, 0.1, 9)
    log_joint = log_joint - log_weights[0] + log_weights
    tree = join_tree(log_joint, log_weights, s)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(s.size), rng.permutation(9)
    other = join_tree(log_joint[rows][:, columns], log_weights[columns], s[rows])
    for n in range(1, 10):
        assert [tuple(sorted(columns[list(group)])) for group in other.groups(n)] == list(tree.groups(n))
    for one, two in zip(tree.joins, other.joins, strict=True):
        assert two.p_value == pytest.approx(one.p_value, rel=1e-4)
        assert two.separation == pytest.approx(one.separation)
        assert two.crossing == pytest.approx(one.crossing)


def test_weights_of_copies_and_of_cells_without_counts():
    log_joint, log_weights, s, _ = cells_of_kinds()
    tree = join_tree(log_joint, log_weights, s)
    assert join_tree(log_joint, np.tile(log_weights, (s.size, 1)), s) == tree
    joint = np.concatenate([log_joint, np.tile(log_weights, (5, 1))])
    assert join_tree(joint, log_weights, np.concatenate([s, np.zeros(5)])) == tree


def test_empty_components_are_with_those_whose_cells_they_share():
    log_joint, log_weights, s, _ = cells_of_kinds()
    tree = join_tree(log_joint, log_weights, s)
    near, nowhere = log_joint[:, 3] - 2.0, np.full(s.size, -np.inf)
    joint = np.column_stack([log_joint, near, nowhere])
    weights = np.concatenate([log_weights, [log_weights[3] - 2.0, -np.inf]])
    found = join_tree(joint, weights, s)
    assert found.most_groups == tree.most_groups == 6
    with_empty = {3: (3, 6)}
    largest = tree.groups(6)[0][0]
    with_empty[largest] = (*with_empty.get(largest, (largest,)), 7)
    for n in range(1, 7):
        want = [{c for part in group for c in with_empty.get(part, (part,))} for group in tree.groups(n)]
        assert as_sets(found.groups(n)) == as_sets(want)


def test_one_component_and_two_cells():
    tree = join_tree(np.zeros((4, 1)), np.zeros(1), np.ones(4))
    assert tree.groups(1) == ((0,),)
    assert tree.joins == ()
    assert tree.n_with_gaps == 1
    two = join_tree(np.array([[0.0, -9.0], [-9.0, 0.0]]), np.log([0.5, 0.5]), np.ones(2))
    assert two.groups(2) == ((0,), (1,))
    assert two.n_with_gaps == 1  # two cells show no gap
    assert two.joins[0].n_cells == 1
    assert np.isfinite(two.joins[0].separation)


def test_groups_add_up():
    log_joint, log_weights, _, _ = cells_of_kinds()
    groups = ((1, 4), (0, 2, 3), (5,))
    found = group_log_joint(log_joint, groups)
    for k, group in enumerate(groups):
        np.testing.assert_allclose(found[:, k], logsumexp(log_joint[:, list(group)], axis=1))
    np.testing.assert_allclose(np.exp(group_log_joint(log_weights, groups)), [2 / 6, 3 / 6, 1 / 6])
    np.testing.assert_allclose(logsumexp(found, axis=1), logsumexp(log_joint, axis=1))


def test_pairs_are_judged_by_the_likelihoods_of_groups_and_of_components():
    log_joint, log_weights, s, _ = cells_of_kinds()
    groups = join_tree(log_joint, log_weights, s).groups(3)
    pairs = pairwise(log_joint, log_weights, s, groups)
    assert [(pair.first, pair.second) for pair in pairs] == [(0, 1), (0, 2), (1, 2)]
    for pair in pairs:
        a, b = groups[pair.first], groups[pair.second]
        joint, ratios = group_log_joint(log_joint, groups), ratios_of(log_joint, log_weights, a, b)
        label = joint.argmax(1)
        cells = (label == pair.first) | (label == pair.second)
        in_first = label[cells] == pair.first
        assert pair.p_value == pytest.approx(gap_p_value(ratios[cells], in_first, s[cells]))
        assert pair.n_cells == min(in_first.sum(), (~in_first).sum())
        label, distances = log_joint.argmax(1), []
        for one, two in product(a, b):
            cells = (label == one) | (label == two)
            ratios = ratios_of(log_joint, log_weights, (one,), (two,))[cells]
            distances.append(separation(ratios, label[cells] == one, s[cells], float(np.median(s))))
        assert pair.separation == pytest.approx(np.mean(distances))


def ratios_of(log_joint, log_weights, a, b) -> np.ndarray:
    """(cells,) ln p(x | a) - ln p(x | b) of two groups of components."""
    likelihoods = group_log_joint(log_joint, (a, b)) - group_log_joint(log_weights, (a, b))
    return likelihoods[:, 0] - likelihoods[:, 1]


def test_the_last_join_is_the_pair_of_two_groups():
    log_joint, log_weights, s, _ = cells_of_kinds(2, 1)
    tree = join_tree(log_joint, log_weights, s)
    (pair,) = pairwise(log_joint, log_weights, s, tree.groups(2))
    assert (pair.separation, pair.p_value) == pytest.approx(
        (tree.joins[-1].separation, tree.joins[-1].p_value)
    )


def test_many_cells_have_neighbours_among_some():
    log_joint, log_weights, s, kind = cells_of_kinds(n_cells=21_000)
    tree = join_tree(log_joint, log_weights, s)
    assert tree == join_tree(log_joint, log_weights, s)
    label = group_log_joint(log_joint, tree.groups(3)).argmax(1)
    assert adjusted_rand_score(kind, label) == 1


@pytest.mark.parametrize("far", [True, False])
def test_a_group_of_few_cells_is_joined_before_all_others_unless_it_has_a_gap(far):
    """Two components of one kind are left to be joined after it."""
    log_joint, log_weights, s, kind = cells_of_kinds(parts=2)
    few = np.flatnonzero(kind == kind[0])[:8]
    alone = log_joint.max(1) - (400.0 if far else 3.0)
    alone[few] = log_joint[few].max(1) + (400.0 if far else 3.0)
    tree = join_tree(np.column_stack([log_joint, alone]), np.append(log_weights, -6.0), s)
    own = log_joint.shape[1]
    of_few = next(join for join in tree.joins if own in (*join.first, *join.second))
    assert of_few.n_cells == 8
    assert (of_few == tree.joins[0]) is not far
    assert (of_few.p_value < tree.gap_level) is far


def test_two_cells_are_joined_first_however_far_they_are():
    log_joint, log_weights, s, _ = cells_of_kinds(parts=1)
    alone = np.full((len(s), 1), -1e4)
    alone[[0, 700], 0] = log_joint.max(1)[[0, 700]] + 5.0
    joint = np.hstack([log_joint, alone])
    tree = join_tree(joint, np.append(log_weights, -8.0), s)
    first = tree.joins[0]
    assert 3 in (*first.first, *first.second)
    assert first.n_cells == 2
    assert tree.n_with_gaps == 3


def test_a_group_has_the_mean_and_the_variance_of_its_components():
    rng = np.random.default_rng(0)
    log_mean, log_inv_disp = rng.normal(0, 1, (4, 3)), rng.normal(1, 0.5, (4, 3))
    log_weights = np.log([0.1, 0.4, 0.3, 0.2])
    a, b = group_components(log_mean, log_inv_disp, log_weights, [(0, 3, 2), (1,)])
    np.testing.assert_array_equal(a[1], log_mean[1])
    np.testing.assert_array_equal(b[1], log_inv_disp[1])
    of_cell = rng.choice([0, 3, 2], 2_000_000, p=np.array([0.1, 0.2, 0.3]) / 0.6)
    for j in range(3):
        r = np.exp(log_inv_disp[of_cell, j])
        rates = rng.gamma(r, np.exp(log_mean[of_cell, j]) / r)
        assert np.exp(a[0, j]) == pytest.approx(rates.mean(), rel=0.01)
        assert np.exp(2 * a[0, j] - b[0, j]) == pytest.approx(rates.var(), rel=0.03)


def test_probabilities_of_groups_are_sums():
    q = np.random.default_rng(0).dirichlet(np.ones(4), 5)
    np.testing.assert_allclose(group_probabilities(q, [(1, 3), (0,), (2,)])[:, 0], q[:, 1] + q[:, 3])
    assert group_probabilities(q, [(0,), (1,), (2,), (3,)]) is q


@pytest.mark.parametrize("copies", [1, 4])
def test_inflation_is_that_of_genes_that_count_several_times(copies):
    """Copies of each gene multiply a log likelihood ratio by their number, and its variance by the square."""
    rng = np.random.default_rng(1)
    kind, s = np.arange(600) % 2, rng.lognormal(0, 0.3, 600)
    log_rate = np.log(2.0) + np.array([[0.0], [0.15]]) * rng.choice([-1, 1], 3000)
    x = rng.poisson(s[:, None] * np.exp(log_rate[kind]))
    ll = copies * (x @ log_rate.T - s[:, None] * np.exp(log_rate).sum(1))
    found = mean_inflation(ll + np.log(0.5), np.log([0.5, 0.5]), s)
    assert found == pytest.approx(copies, rel=0.15)


def test_inflation_of_one_component_is_unknown():
    assert np.isnan(mean_inflation(np.zeros((9, 1)), np.zeros(1), np.ones(9)))


def test_a_small_component_far_from_others_does_not_cross():
    """Eight cells have no fifteen neighbours of their own."""
    rng = np.random.default_rng(0)
    at = np.concatenate(
        [rng.normal(0, 1, (200, 2)), rng.normal((30, 0), 1, (200, 2)), rng.normal(60, 1, (8, 2))]
    )
    ll = -((at[:, None] - np.array([(0.0, 0.0), (30.0, 0.0), (60.0, 60.0)])) ** 2).sum(2)
    log_weights = np.log([200 / 408, 200 / 408, 8 / 408])
    tree = join_tree(ll + log_weights, log_weights, np.ones(408))
    assert [join.crossing for join in tree.joins] == [0.0, 0.0]


def test_kinds_with_gaps_are_joined_where_they_come_near_each_other():
    rng = np.random.default_rng(0)
    n = 300
    s = rng.lognormal(0, 0.3, 3 * n)
    # a long kind in three components, whose near end is 4 from a round kind; another round one is 5 from that
    ends = [(0, 12), (0, 0), (0, 0)]
    at = np.repeat([[0.0, 0.0], [4.0, 0.0], [9.0, 0.0]], n, 0) + rng.normal(size=(3 * n, 2)) / 2
    at[:, 1] += np.concatenate([rng.uniform(*end, n) for end in ends])
    centres = np.array([[0, 2], [0, 6], [0, 10], [4, 0], [9, 0]])
    log_weights = np.full(5, -np.log(5))
    log_joint = log_weights - 4 * s[:, None] * ((at[:, None] - centres) ** 2).sum(2)
    tree = join_tree(log_joint, log_weights, s)
    assert tree.n_with_gaps == 3
    assert as_sets(tree.groups(3)) == {frozenset({0, 1, 2}), frozenset({3}), frozenset({4})}
    assert as_sets(tree.groups(2)) == {frozenset({0, 1, 2, 3}), frozenset({4})}

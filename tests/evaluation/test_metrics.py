from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score

from nbmix.evaluation.metrics import (
    SMALLEST_PROBABILITY,
    LabelTables,
    clustering_metrics,
    match_cells,
    match_components,
    overlap_table,
)


def simulate(n_cells: int, n_labels: int, n_components: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = np.concatenate((np.arange(n_labels), rng.integers(0, n_labels, n_cells - n_labels)))
    logits = rng.normal(0, 1.5, (n_cells, n_components))
    logits[np.arange(n_cells), codes % n_components] += 2.0
    weights = np.exp(logits)
    return np.array([f"type {code}" for code in codes]), weights / weights.sum(axis=1, keepdims=True)


def test_hand_worked_example():
    labels = ["a", "a", "a", "b"]
    responsibilities = [[0.1, 0.9], [0.2, 0.8], [0.75, 0.25], [1.0, 0.0]]
    metrics = clustering_metrics(labels, responsibilities)
    # Component 1 is a, component 0 is b; the third cell is wrong.
    entropies = [-0.1 * np.log(0.1) - 0.9 * np.log(0.9), -0.2 * np.log(0.2) - 0.8 * np.log(0.8), 0.0]
    assert metrics["accuracy"] == 0.75
    assert metrics["accuracy_majority"] == 0.75
    assert metrics["log_loss"] == pytest.approx(-np.log([0.9, 0.8, 0.25, 1.0]).mean())
    assert metrics["entropy_correct"] == pytest.approx(np.mean(entropies))
    assert metrics["entropy_wrong"] == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))


def test_cells_are_matched_with_their_labels():
    matched = match_cells(["a", "a", "b", "c"], [[0.1, 0.9], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    assert matched.assignments.tolist() == [1, 1, 0, 1]
    assert matched.own_component.tolist() == [1, 1, 0, -1]
    assert matched.correct.tolist() == [True, True, True, False]
    assert matched.label_codes.tolist() == [0, 0, 1, 2]


def test_perfect_clustering():
    metrics = clustering_metrics([7, 7, 3], [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    ones = ("ari", "nmi", "ami", "accuracy", "accuracy_majority")
    assert [metrics[key] for key in ones] == pytest.approx([1.0] * len(ones))
    assert metrics["log_loss"] == metrics["entropy_correct"] == 0.0
    assert "entropy_wrong" not in metrics


@pytest.mark.parametrize("n_components", [1, 3, 4, 6])
def test_scores_are_those_of_scikit_learn(n_components):
    labels, responsibilities = simulate(200, 4, n_components)
    metrics = clustering_metrics(labels, responsibilities)
    found = responsibilities.argmax(axis=1)
    assert metrics["ari"] == pytest.approx(adjusted_rand_score(labels, found))
    assert metrics["nmi"] == pytest.approx(normalized_mutual_info_score(labels, found))
    assert metrics["ami"] == pytest.approx(adjusted_mutual_info_score(labels, found))


@pytest.mark.parametrize(("n_labels", "n_components"), [(4, 2), (4, 4), (3, 5), (1, 3), (3, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_accuracy_is_the_best_over_all_matchings(n_labels, n_components, seed):
    labels, responsibilities = simulate(60, n_labels, n_components, seed)
    _, table = overlap_table(labels, responsibilities.argmax(axis=1), n_components)
    if n_labels < n_components:
        table = table.T
    rows, columns = table.shape
    best = max(table[list(chosen), range(columns)].sum() for chosen in permutations(range(rows), columns))
    assert clustering_metrics(labels, responsibilities)["accuracy"] == pytest.approx(best / 60)


@pytest.mark.parametrize("n_components", [1, 2, 4, 7])
def test_order_of_components_does_not_matter(n_components):
    labels, responsibilities = simulate(80, 4, n_components)
    order = np.random.default_rng(1).permutation(n_components)
    expected = clustering_metrics(labels, responsibilities)
    assert clustering_metrics(labels, responsibilities[:, order]) == pytest.approx(expected)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_ties_go_to_the_larger_responsibility(order):
    # Components 1 and 2 are empty; b leans to the second.
    responsibilities = np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.6, 0.1, 0.3]])[:, order]
    metrics = clustering_metrics(["a", "a", "b"], responsibilities)
    assert metrics["log_loss"] == pytest.approx(-np.log([0.8, 0.8, 0.3]).mean())


def test_label_without_component_costs_the_clipped_probability():
    metrics = clustering_metrics(["a", "a", "b"], np.ones((3, 1)))
    assert metrics["log_loss"] == pytest.approx(-np.log(SMALLEST_PROBABILITY) / 3)
    assert metrics["accuracy"] == metrics["accuracy_majority"] == pytest.approx(2 / 3)


def test_majority_lets_components_share_a_label():
    responsibilities = np.eye(3)[[0, 0, 1, 1, 2]]
    metrics = clustering_metrics(["a", "a", "a", "a", "b"], responsibilities)
    assert metrics["accuracy_majority"] == 1.0
    assert metrics["accuracy"] == pytest.approx(3 / 5)


def test_single_cell_in_float32():
    metrics = clustering_metrics(np.array(["only"]), np.array([[0.25, 0.75]], dtype=np.float32))
    assert metrics["accuracy"] == 1.0
    assert all(type(value) is float and np.isfinite(value) for value in metrics.values())


def test_overlap_table_keeps_empty_components():
    values, table = overlap_table(np.array([2, 1, 2]), np.array([3, 0, 3]), 5)
    assert values.tolist() == [1, 2]
    assert table.tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 2, 0]]


def test_match_components_leaves_some_over():
    assert match_components([[5, 9, 0], [0, 8, 1]]).tolist() == [0, 1, -1]
    assert match_components([[1], [4], [2]]).tolist() == [1]


@pytest.mark.parametrize(
    ("labels", "responsibilities"),
    [(["a"], np.ones((2, 1))), (["a"], np.ones(1)), ([], np.ones((0, 2))), (["a"], np.ones((1, 0)))],
)
def test_shapes_that_do_not_fit(labels, responsibilities):
    with pytest.raises(ValueError, match=r"shape|must be"):
        clustering_metrics(labels, responsibilities)


def test_assignment_out_of_range():
    with pytest.raises(ValueError, match=r"0\.\.1"):
        overlap_table(["a"], [2], 2)


@pytest.mark.parametrize(("n_labels", "n_components"), [(4, 4), (5, 3), (2, 5), (1, 1), (3, 1)])
def test_tables_that_add_over_batches_say_what_all_cells_say(n_labels, n_components):
    labels, responsibilities = simulate(300, n_labels, n_components)
    responsibilities[7] = np.eye(n_components)[0]  # -ln 0 is clipped
    codes = 1 + 2 * np.unique(labels, return_inverse=True)[1]  # some labels have no cell here
    sums = np.zeros((3, 2 * n_labels + 1, n_components))
    for rows in np.array_split(np.arange(300), 4):
        r = responsibilities[rows]
        assigned = np.eye(n_components)[r.argmax(1)]
        for total, part in zip(
            sums, (assigned, r, -np.log(np.maximum(r, SMALLEST_PROBABILITY))), strict=True
        ):
            np.add.at(total, codes[rows], part)
    expected = clustering_metrics(labels, responsibilities)
    assert LabelTables(*sums).ari() == pytest.approx(expected["ari"], rel=1e-12)
    assert LabelTables(*sums).log_loss() == pytest.approx(expected["log_loss"], rel=1e-12)

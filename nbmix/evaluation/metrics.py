"""Agreement of a soft clustering with known labels.

Components have no names of their own, so they are matched with the labels first, on the overlap table:
one-to-one by the Hungarian algorithm (Kuhn 1955), or each to its most frequent label.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.special import entr
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score

SMALLEST_PROBABILITY = float(np.finfo(np.float64).tiny)  # -ln of it is 708.4 nats


def overlap_table(
    labels: ArrayLike, assignments: ArrayLike, n_components: int
) -> tuple[NDArray, NDArray[np.int64]]:
    """Count the cells of every label in every component.

    Args:
        labels: (cells,) strings or integers, none missing.
        assignments: (cells,) component of each cell, 0 to n_components - 1.
        n_components: number of components; those without cells keep a column of zeros.

    Returns:
        label_values: (labels,) the distinct labels, sorted.
        table: (labels, components) numbers of cells.

    Raises:
        ValueError: when the lengths differ or an assignment is out of range.

    >>> overlap_table(["T", "B", "T"], [0, 1, 2], 4)[1]
    array([[0, 1, 0, 0],
           [1, 0, 1, 0]])
    """
    label_values, label_codes = np.unique(np.asarray(labels), return_inverse=True)
    components = np.asarray(assignments)
    if label_codes.shape != components.shape:
        raise ValueError(f"labels have shape {label_codes.shape}, assignments {components.shape}")
    if components.size and not 0 <= components.min() <= components.max() < n_components:
        raise ValueError(f"assignments must lie in 0..{n_components - 1}")
    shape = (len(label_values), n_components)
    flat = np.ravel_multi_index((label_codes, components), shape)
    return label_values, np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)


def match_components(table: ArrayLike) -> NDArray[np.int64]:
    """Match components and labels one-to-one so that the summed overlap is largest.

    Args:
        table: (labels, components) overlap, whole numbers or weights.

    Returns:
        (components,) index of the matched label, -1 for components left over when there are more
        components than labels. With fewer components than labels, some labels are not in the result.

    >>> match_components([[5, 9, 0], [0, 8, 1]])
    array([ 0,  1, -1])
    """
    overlap = np.asarray(table)
    label_of_component = np.full(overlap.shape[1], -1)
    matched_labels, matched_components = linear_sum_assignment(overlap, maximize=True)
    label_of_component[matched_components] = matched_labels
    return label_of_component


class MatchedCells(NamedTuple):
    """Cells, their labels and the components matched with these.

    Attributes:
        label_codes: (cells,) number of each cell's label, in sorted order.
        assignments: (cells,) most probable component.
        own_component: (cells,) the component matched one-to-one with the cell's label; -1 for none.
        correct: (cells,) bool, whether the two are the same.
        table: (labels, components) numbers of cells.
    """

    label_codes: NDArray[np.int64]
    assignments: NDArray[np.int64]
    own_component: NDArray[np.int64]
    correct: NDArray[np.bool_]
    table: NDArray[np.int64]


def match_cells(labels: ArrayLike, responsibilities: ArrayLike) -> MatchedCells:
    """Assign each cell to its most probable component, and match these with the labels.

    Ties between matchings go to the larger summed responsibility, so that the order of the components does
    not matter. Arguments and errors are those of `clustering_metrics`.
    """
    posterior = np.asarray(responsibilities, dtype=np.float64)  # (cells, components)
    if posterior.ndim != 2 or 0 in posterior.shape:
        raise ValueError(f"responsibilities must be (cells, components) and not empty, got {posterior.shape}")
    n_cells, n_components = posterior.shape
    assignments = posterior.argmax(axis=1)  # (cells,)
    label_values, table = overlap_table(labels, assignments, n_components)
    label_codes = np.searchsorted(label_values, np.asarray(labels))  # (cells,)

    shape = (len(label_values), n_cells)
    membership = csr_array((np.ones(n_cells), (label_codes, np.arange(n_cells))), shape=shape)
    soft_table = membership @ posterior  # (labels, components)
    own_component = _component_of_label(table, soft_table)[label_codes]  # (cells,)
    return MatchedCells(label_codes, assignments, own_component, own_component == assignments, table)


def _component_of_label(table: NDArray, soft_table: NDArray) -> NDArray[np.int64]:
    """(labels,) component matched one-to-one with each label, -1 for none; see `match_cells`."""
    # All soft overlaps together stay below one cell, so they settle ties and nothing else.
    label_of_component = match_components(table + soft_table / (table.sum() + 1))
    component_of_label = np.full(len(table), -1)
    matched = np.flatnonzero(label_of_component >= 0)
    component_of_label[label_of_component[matched]] = matched
    return component_of_label


def log_loss(responsibilities: ArrayLike, own_component: ArrayLike) -> float:
    """Mean over cells of -ln r[cell, own component], nats per cell.

    A cell without a component (-1) counts as probability zero, and probabilities are clipped at
    `SMALLEST_PROBABILITY`, so that such a cell costs 708.4 nats and the mean stays finite.

    >>> round(log_loss([[0.5, 0.5], [1.0, 0.0]], [1, 0]), 4)
    0.3466
    """
    posterior, own = np.asarray(responsibilities, dtype=np.float64), np.asarray(own_component)
    probability = np.where(own >= 0, posterior[np.arange(len(own)), own], 0.0)
    return float(-np.log(np.maximum(probability, SMALLEST_PROBABILITY)).mean())


def clustering_metrics(labels: ArrayLike, responsibilities: ArrayLike) -> dict[str, float]:
    """Compare posterior component probabilities r with known labels.

    Each cell is assigned to its most probable component. Write m(y) for the component matched one-to-one
    with label y (`match_cells`).

    Args:
        labels: (cells,) strings or integers, none missing; at least one cell.
        responsibilities: (cells, components), rows sum to 1. There may be more or fewer components than
            labels, and components without cells.

    Returns:
        ari, nmi, ami: adjusted Rand index (Hubert and Arabie 1985), normalised and adjusted mutual
            information (Vinh et al. 2010; arithmetic mean of the entropies) of labels and assignments.
        accuracy: share of cells assigned to m(label).
        accuracy_majority: share of cells with the most frequent label of their component; several
            components may share a label, so it grows with the number of components.
        log_loss: mean over cells of -ln r[cell, m(label)], nats per cell (`log_loss`); a label without a
            component (fewer components than labels) counts as probability zero.
        entropy_correct, entropy_wrong: mean entropy -sum_k r_k ln r_k, nats, of the cells that `accuracy`
            counts as right and as wrong; the key is left out where there is no such cell.

    Raises:
        ValueError: when the shapes do not fit.
    """
    matched = match_cells(labels, responsibilities)
    posterior = np.asarray(responsibilities, dtype=np.float64)  # (cells, components)
    n_cells = len(posterior)
    entropy = entr(posterior).sum(axis=1)  # (cells,)

    metrics = {
        "ari": adjusted_rand_score(matched.label_codes, matched.assignments),
        "nmi": normalized_mutual_info_score(matched.label_codes, matched.assignments),
        "ami": adjusted_mutual_info_score(matched.label_codes, matched.assignments),
        "accuracy": matched.correct.mean(),
        "accuracy_majority": matched.table.max(axis=0).sum() / n_cells,
        "log_loss": log_loss(posterior, matched.own_component),
    }
    for key, chosen in (("entropy_correct", matched.correct), ("entropy_wrong", ~matched.correct)):
        if chosen.any():
            metrics[key] = entropy[chosen].mean()
    return {key: float(value) for key, value in metrics.items()}


class LabelTables(NamedTuple):
    """What ``ari`` and ``log_loss`` of `clustering_metrics` need of cells: sums that add over batches.

    Attributes:
        cells: (labels, components) numbers of cells.
        soft: (labels, components) summed responsibilities r.
        surprise: (labels, components) sums of -ln r, clipped at `SMALLEST_PROBABILITY`, nats.
    """

    cells: NDArray
    soft: NDArray
    surprise: NDArray

    def ari(self) -> float:
        """Adjusted Rand index (Hubert and Arabie 1985, equation 5), by pairs of cells."""
        together, in_label, in_component, all_pairs = (
            float((n * (n - 1) / 2).sum())
            for n in (self.cells, self.cells.sum(1), self.cells.sum(0), self.cells.sum())
        )
        most = (in_label + in_component) / 2
        if together == most:
            return 1.0
        expected = in_label * in_component / all_pairs
        return (together - expected) / (most - expected)

    def log_loss(self) -> float:
        """Nats per cell."""
        size = self.cells.sum(1)
        there = np.flatnonzero(size)
        own = np.full(len(size), -1)
        own[there] = _component_of_label(self.cells[there], self.soft[there])
        of_label = np.where(
            own >= 0, self.surprise[np.arange(len(own)), own], -np.log(SMALLEST_PROBABILITY) * size
        )
        return float(of_label.sum() / size.sum())

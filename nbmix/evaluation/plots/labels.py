"""Components against known labels."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from nbmix.evaluation.calibration import Reliability
from nbmix.evaluation.metrics import match_components, overlap_table
from nbmix.evaluation.plots.style import (
    component_colors,
    new_figure,
    open_frame,
    short_name,
    top_legend,
)


def component_label_table(label_values: ArrayLike, table: ArrayLike) -> Figure:
    """Heat map of labels against components: colour is the share of the label, numbers are cells.

    Components are ordered so that those matched one-to-one with a label lie on the diagonal; components
    left over follow, and those without cells are left out.

    Args:
        label_values: (labels,) names.
        table: (labels, components) numbers of cells, as from `overlap_table`.
    """
    cells = np.asarray(table)  # (labels, components)
    order = _diagonal_order(cells)
    cells = cells[:, order]
    share = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)  # (labels, components)
    return _counts_in_grid(cells, share, order, label_values, "label")


def component_batch_table(batch_names: ArrayLike, table: ArrayLike) -> Figure:
    """Heat map of batches against components: colour is the share of the batch, numbers are cells.

    Components without cells are left out.

    Args:
        batch_names: (batches,).
        table: (batches, components) numbers of cells.
    """
    cells = np.asarray(table)
    share = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
    order = np.flatnonzero(cells.any(axis=0))
    return _counts_in_grid(cells[:, order], share[:, order], order, batch_names, "batch")


def component_label_correlation(labels: ArrayLike, responsibilities: ArrayLike) -> Figure:
    """Correlation over the cells between each label's indicator and each component's posterior.

    Components are those of `component_label_table`, in their order. Where a posterior is the same for all
    cells there is no correlation, and nothing is drawn.

    Args:
        labels: (cells,) strings or integers, none missing.
        responsibilities: (cells, components), rows sum to 1.
    """
    posterior = np.asarray(responsibilities, dtype=np.float64)  # (cells, components)
    label_values, table = overlap_table(labels, posterior.argmax(axis=1), posterior.shape[1])
    order = _diagonal_order(table)
    codes = np.searchsorted(label_values, np.asarray(labels))
    correlation = _correlation(codes, len(label_values), posterior, order)
    figure, axes, image = _heat_map(correlation, order, label_values, cmap="RdBu_r", vmin=-1.0)
    for (row, column), value in np.ndenumerate(correlation):
        if np.isfinite(value):
            color = "white" if abs(value) > 0.6 else "black" if abs(value) > 0.1 else "0.6"
            text = f"{round(value, 2) + 0.0:.2f}"  # no -0.00
            axes.text(column, row, text, ha="center", va="center", fontsize=7.0, color=color)
    figure.colorbar(image, ax=axes, label="correlation", fraction=0.05, pad=0.02)
    return figure


def _diagonal_order(table: NDArray) -> NDArray[np.int64]:
    """Components with cells, in the order of the labels that they are matched with; the others follow."""
    label_of_component = match_components(table)
    order = np.argsort(np.where(label_of_component < 0, len(table), label_of_component), kind="stable")
    return order[np.asarray(table.any(axis=0))[order]]


def _correlation(codes: NDArray, n_labels: int, posterior: NDArray, order: NDArray) -> NDArray[np.float64]:
    """(labels, components in their order) over the cells; NaN where a posterior does not vary."""
    share = np.bincount(codes, minlength=n_labels) / len(codes)  # (labels,)
    sums, variance = np.empty((n_labels, len(order))), np.empty(len(order))
    for column, k in enumerate(order):
        centred = posterior[:, k] - posterior[:, k].mean()
        sums[:, column] = np.bincount(codes, weights=centred, minlength=n_labels)
        variance[column] = (centred**2).mean()
    scale = np.sqrt(np.outer(share * (1 - share), variance))  # (labels, components)
    unknown = np.full(scale.shape, np.nan)
    return np.divide(sums / len(codes), scale, out=unknown, where=scale > 1e-9)


def _counts_in_grid(
    cells: NDArray, share: NDArray, order: NDArray, row_names: ArrayLike, rows: str
) -> Figure:
    """Numbers of cells (rows, components) on their shares; ``rows`` says what a row is."""
    figure, axes, image = _heat_map(share, order, row_names, cmap="Blues", vmin=0.0)
    axes.set_ylabel(rows)
    for (row, column), count in np.ndenumerate(cells):
        color = "white" if share[row, column] > 0.55 else "black" if count else "0.75"
        axes.text(column, row, f"{count}", ha="center", va="center", fontsize=7.5, color=color)
    figure.colorbar(image, ax=axes, label=f"share of the {rows}'s cells", fraction=0.05, pad=0.02)
    return figure


def _heat_map(
    values: NDArray, order: NDArray, label_values: ArrayLike, *, cmap: str, vmin: float
) -> tuple[Figure, Axes, AxesImage]:
    """Values (labels, components), up to 1, in a grid with the names of both."""
    n_labels, n_components = values.shape
    height = float(np.clip(1.6 + 0.38 * n_labels, 2.8, 18.0))
    figure = new_figure(min(3.6 + 0.5 * n_components, 18.0), height)
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap=cmap, vmin=vmin, vmax=1.0, aspect="auto")
    axes.set_xticks(range(n_components), [str(k) for k in order])
    axes.set_yticks(range(n_labels), [short_name(name) for name in np.asarray(label_values)])
    axes.tick_params(length=0)
    axes.set_xlabel("group")
    axes.set_ylabel("label")
    return figure, axes, image


def reliability_diagram(curves: Mapping[str, Reliability]) -> Figure:
    """Accuracy against confidence, as in Niculescu-Mizil & Caruana (2005), and how many cells are how sure.

    On the diagonal, probabilities are right; below it they are too sure. Bars are 95% intervals of the
    accuracy (Wilson 1927), which are wide in bins of few cells; empty bins have none.

    Args:
        curves: name to bins, as from `reliability`; the same number of them in each.
    """
    figure = new_figure(5.0, 5.6)
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    top.plot([0.0, 1.0], [0.0, 1.0], color="0.6", linewidth=0.8, linestyle=":")
    handles = []
    for place, (color, (name, bins)) in enumerate(
        zip(component_colors(len(curves)), curves.items(), strict=True)
    ):
        filled = bins.n_cells > 0
        x, y, count = bins.confidence[filled], bins.accuracy[filled], bins.n_cells[filled]
        error = np.abs(y - x) @ count / max(1, count.sum())
        label = f"{short_name(name)}: expected calibration error {error:.3f}"
        low, high = _interval(y, count)
        aside = 0.006 * (place - (len(curves) - 1) / 2)  # bars of two curves beside each other
        top.errorbar(x + aside, y, (y - low, high - y), color=color, linestyle="", elinewidth=1.2)
        top.scatter(x + aside, y, s=14.0, color=color)
        handles.append(Line2D([], [], color=color, marker="o", markersize=4.0, label=label))
        width = 1.0 / (len(bins.n_cells) * len(curves))
        left = np.arange(len(bins.n_cells)) / len(bins.n_cells) + place * width
        bottom.bar(left, bins.n_cells, width, align="edge", color=color)
    top.set_xlim(-0.02, 1.02)
    top.set_ylim(-0.02, 1.02)
    top.set_ylabel("share of cells that match their label")
    top_legend(top, handles)
    most = max((int(bins.n_cells.max()) for bins in curves.values()), default=1)
    bottom.set_ylim(0.7, 2.0 * max(1, most))
    bottom.set_yscale("log")
    bottom.set_ylabel("cells")
    bottom.set_xlabel("probability of the assignment")
    for axes in (top, bottom):
        open_frame(axes)
    return figure


def _interval(share: NDArray, n: NDArray) -> tuple[NDArray, NDArray]:
    """Ends of the 95% intervals of shares among n cells each."""
    found = [
        binomtest(round(s * k), int(k)).proportion_ci(method="wilson") for s, k in zip(share, n, strict=True)
    ]
    # rounding may leave the share itself outside
    low = np.minimum([i.low for i in found], share) if found else share
    high = np.maximum([i.high for i in found], share) if found else share
    return low, high

"""Figures of a fit: pure functions from arrays to a `matplotlib.figure.Figure`.

No pyplot, so no global state, no display and nothing to close. Save with `figure.savefig(path)`, or hand
the figure to a logger. Components are called by their index everywhere. Sizes are in inches.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from nbmix.evaluation.metrics import match_components, overlap_table

# Okabe and Ito (2008), then 22 colours added one at a time, each the farthest in OKLab from all before as
# seen with normal, protanopic and deuteranopic vision (Machado et al. 2009). No 30 colours are all easy to
# tell apart, so the figures also write component numbers beside the data.
PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#000000"),
    *("#5a0f00", "#000078", "#6900ff", "#a50f5a", "#00f0c3", "#8778ff", "#5a2d96", "#1e5a00"),
    *("#0f2d3c", "#d200b4", "#96b487", "#b4d2ff", "#0000d2", "#1e5a69", "#ffc387", "#876978"),
    *("#ff78d2", "#ff4b5a", "#4b3c2d", "#f00ff0", "#964b96", "#b44b4b"),
)
LONGEST_NAME = 32  # characters
LEGEND_ROWS = 18
DPI = 150


def _colors(n: int) -> list[str]:
    """The first n colours; they repeat after the 30th."""
    return [PALETTE[i % len(PALETTE)] for i in range(n)]


def _short(name: object) -> str:
    """The name with its middle left out where it is long: cell types often differ in their last word."""
    text = str(name)
    head, tail = LONGEST_NAME // 2, LONGEST_NAME - LONGEST_NAME // 2 - 1
    return text if len(text) <= LONGEST_NAME else f"{text[:head]}…{text[-tail:]}"


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _legend_width(handles: Sequence[Line2D]) -> float:
    """Estimated width of `_legend`, inches."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    return -(-len(handles) // LEGEND_ROWS) * (0.5 + 0.072 * longest)


def _legend(axes: Axes, handles: Sequence[Line2D], title: str | None = None) -> None:
    """Legend to the right of the axes, in as many columns as it needs."""
    axes.legend(
        handles=handles,
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize="small",
        title_fontsize="small",
        alignment="left",
        ncols=-(-len(handles) // LEGEND_ROWS),
    )


def objective_trace(iterations: Sequence[int], series: Mapping[str, Sequence[float]]) -> Figure:
    """Objectives (nats per cell) against the iteration, one line a series.

    Args:
        iterations: (steps,) iteration or epoch numbers.
        series: name to (steps,) values in nats per cell; steps that are not finite are skipped, so that a
            quantity measured at every tenth iteration still makes a line.
    """
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    steps = np.asarray(iterations)
    for color, (name, given) in zip(_colors(len(series)), series.items(), strict=True):
        values = np.asarray(given, dtype=np.float64)
        known = np.isfinite(values)
        marker = "o" if known.sum() <= 30 else None
        axes.plot(steps[known], values[known], color=color, marker=marker, markersize=3.5, label=_short(name))
    axes.set_xlabel("iteration")
    axes.set_ylabel("nats per cell")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.25)
    _bare(axes)
    if series:
        axes.legend(frameon=False, loc="best")
    return figure


def component_label_table(label_values: ArrayLike, table: ArrayLike) -> Figure:
    """Heat map of labels against components: colour is the share of the label, numbers are cells.

    Components are ordered so that those matched one-to-one with a label lie on the diagonal; components
    left over follow.

    Args:
        label_values: (labels,) names.
        table: (labels, components) numbers of cells, as from `overlap_table`.
    """
    cells = np.asarray(table)  # (labels, components)
    n_labels, n_components = cells.shape
    label_of_component = match_components(cells)
    order = np.argsort(np.where(label_of_component < 0, n_labels, label_of_component), kind="stable")
    cells = cells[:, order]
    share = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)  # (labels, components)

    figure = _figure(min(3.6 + 0.5 * n_components, 18.0), float(np.clip(1.6 + 0.38 * n_labels, 2.8, 18.0)))
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for (row, column), count in np.ndenumerate(cells):
        color = "white" if share[row, column] > 0.55 else "black" if count else "0.75"
        axes.text(column, row, f"{count}", ha="center", va="center", fontsize=7.5, color=color)
    axes.set_xticks(range(n_components), [str(k) for k in order])
    axes.set_yticks(range(n_labels), [_short(name) for name in np.asarray(label_values)])
    axes.tick_params(length=0)
    axes.set_xlabel("component")
    axes.set_ylabel("label")
    figure.colorbar(image, ax=axes, label="share of the label's cells", fraction=0.05, pad=0.02)
    return figure


def component_sizes(responsibilities: ArrayLike) -> Figure:
    """Cells assigned to each component, and how surely: the mean of their largest posterior.

    Args:
        responsibilities: (cells, components), rows sum to 1.
    """
    posterior = np.asarray(responsibilities)  # (cells, components)
    n_components = posterior.shape[1]
    assignments = posterior.argmax(axis=1)
    sizes = np.bincount(assignments, minlength=n_components)  # (components,)
    total = np.bincount(assignments, weights=posterior.max(axis=1), minlength=n_components)
    certainty = total / np.maximum(sizes, 1)

    figure = _figure(min(3.6 + 0.32 * n_components, 16.0), 4.6)
    top, bottom = figure.subplots(2, 1, sharex=True)
    positions = np.arange(n_components)
    counted = [str(size) for size in sizes]
    measured = [f"{mean:.2f}" if size else "" for mean, size in zip(certainty, sizes, strict=True)]
    for axes, heights, texts, name in (
        (top, sizes, counted, "cells"),
        (bottom, certainty, measured, "mean largest\nposterior"),
    ):
        bars = axes.bar(positions, heights, color=_colors(n_components))
        axes.bar_label(bars, texts, fontsize=6.5, padding=1.5)
        axes.set_ylabel(name)
        axes.margins(y=0.12)
        _bare(axes)
    top.yaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_ylim(0.0, 1.12)
    bottom.set_yticks([0.0, 0.5, 1.0])
    bottom.set_xticks(positions, [str(k) for k in positions], fontsize="small")
    bottom.set_xlabel("component")
    return figure


def _scatter(axes: Axes, coordinates: NDArray, rgba: NDArray, name: str, title: str) -> None:
    """Points smaller and paler the more there are, in random order so that no group hides another."""
    n_cells = len(coordinates)
    size = float(np.clip(9000 / max(n_cells, 1), 0.6, 30.0))  # points squared
    order = np.random.default_rng(0).permutation(n_cells)
    x, y = coordinates[order].T
    axes.scatter(x, y, s=size, c=rgba[order], linewidths=0.0, rasterized=True)
    axes.set_xlabel(f"{name} 1")
    axes.set_ylabel(f"{name} 2")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, loc="left", fontsize="medium")
    _bare(axes)


def _fullest_place(points: NDArray, members: NDArray) -> NDArray:
    """Median of the members in the fullest square of a 20 x 20 grid: on the data, where a mean may not be."""
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    squares = np.minimum(20 * (members - low) / np.where(extent > 0, extent, 1.0), 19).astype(int)
    flat = 20 * squares[:, 0] + squares[:, 1]
    return np.median(members[flat == np.bincount(flat).argmax()], axis=0)


def _rgba(colors: Sequence[str], codes: NDArray, opacity: NDArray) -> NDArray:
    rgba = to_rgba_array(colors)[codes]  # (cells, 4)
    rgba[:, 3] = opacity
    return rgba


def _handle(color: str, text: str) -> Line2D:
    return Line2D([], [], marker="o", linestyle="", color=color, label=text)


def posterior_on_embedding(
    embedding_name: str, coordinates: ArrayLike, responsibilities: ArrayLike, labels: ArrayLike | None = None
) -> Figure:
    """Cells in the plane, coloured by component, opaque in proportion to the posterior of it.

    With labels, a panel on the left shows them, each in the colour of the component matched one-to-one
    with it, so that agreement is the same colour in the same place.

    Args:
        embedding_name: for the axes, such as "UMAP".
        coordinates: (cells, 2).
        responsibilities: (cells, components), rows sum to 1.
        labels: (cells,) strings or integers, none missing, or None.
    """
    points = np.asarray(coordinates)  # (cells, 2)
    posterior = np.asarray(responsibilities)  # (cells, components)
    n_cells, n_components = posterior.shape
    assignments = posterior.argmax(axis=1)  # (cells,)
    sizes = np.bincount(assignments, minlength=n_components)
    opacity = float(np.clip((10_000 / max(n_cells, 1)) ** 0.5, 0.35, 0.9))
    colors = _colors(n_components)
    own = np.clip(posterior[np.arange(n_cells), assignments], 0.0, 1.0)  # (cells,)
    title = "components; opacity is the posterior probability"
    handles = [_handle(color, f"{k} ({sizes[k]:,})") for k, color in enumerate(colors)]
    panels = [(title, _rgba(colors, assignments, opacity * own), handles, "component (cells)")]

    if labels is not None:
        label_values, table = overlap_table(labels, assignments, n_components)
        palette = _colors(n_components + len(label_values))
        matched = {label: palette[k] for k, label in enumerate(match_components(table)) if label >= 0}
        spare = iter(palette[n_components:])
        label_colors = [matched.get(i) or next(spare) for i in range(len(label_values))]
        handles = [
            _handle(color, f"{_short(name)} ({count:,})")
            for color, name, count in zip(label_colors, label_values, table.sum(axis=1), strict=True)
        ]
        rgba = _rgba(label_colors, np.searchsorted(label_values, np.asarray(labels)), np.array(opacity))
        panels.insert(0, ("labels", rgba, handles, "label (cells)"))

    width = sum(4.4 + _legend_width(handles) for _, _, handles, _ in panels)
    figure = _figure(width, 4.4)
    for i, (title, rgba, handles, legend_title) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        _scatter(axes, points, rgba, embedding_name, title)
        _legend(axes, handles, legend_title)
    for k in np.flatnonzero(sizes):
        x, y = _fullest_place(points, points[assignments == k])
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": colors[k], "alpha": 0.85}
        axes.text(x, y, str(k), fontsize=6.5, ha="center", va="center", bbox=box)
    return figure


def log_mean_differences(log_mean: ArrayLike, names: Sequence[object] | None = None) -> Figure:
    """Sorted differences of ln mu between each component and the mean over the others.

    d_kj = ln mu_kj - mean over l != k of ln mu_lj, sorted over the genes j. Two components have one
    difference, first minus second. A flat line at zero says that two components are the same.

    Args:
        log_mean: (components, genes); genes that are not finite in some component are left out.
        names: (components,) names, by default the indices.
    """
    values = np.asarray(log_mean, dtype=np.float64)
    values = values[:, np.isfinite(values).all(axis=0)]  # (components, genes)
    n_components, n_genes = values.shape
    titles = [_short(name) for name in (range(n_components) if names is None else names)]

    figure = _figure(6.8, 4.2)
    axes = figure.add_subplot()
    axes.set_xlabel("gene rank")
    axes.set_ylabel(r"difference in $\ln \mu$")
    _bare(axes)
    if n_components < 2:
        message = "one component: nothing to compare with"
        axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center")
        axes.set_xticks([])
        axes.set_yticks([])
        return figure

    differences = (values - values.mean(axis=0)) * (n_components / (n_components - 1))
    if n_components == 2:
        differences, titles = differences[:1], [f"{titles[0]} minus {titles[1]}"]
    axes.axhline(0.0, color="0.6", linewidth=0.8, zorder=1)
    colors = _colors(len(titles))
    for color, difference in zip(colors, differences, strict=True):
        axes.plot(np.arange(1, n_genes + 1), np.sort(difference), color=color, linewidth=1.2)
    title = "component" if n_components == 2 else "component minus the others"
    _legend(axes, [Line2D([], [], color=c, label=t) for c, t in zip(colors, titles, strict=True)], title)
    return figure


def posterior_histogram(responsibilities: ArrayLike) -> Figure:
    """Histogram of each cell's largest posterior, between 1 / components and 1; counts on a log scale.

    Args:
        responsibilities: (cells, components), rows sum to 1.
    """
    posterior = np.asarray(responsibilities, dtype=np.float64)  # (cells, components)
    lowest = 1.0 / posterior.shape[1] if posterior.shape[1] > 1 else 0.0
    figure = _figure(5.6, 3.6)
    axes = figure.add_subplot()
    axes.hist(np.clip(posterior.max(axis=1), lowest, 1.0), bins=40, range=(lowest, 1.0), color=PALETTE[0])
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.set_xlabel("largest posterior probability of the cell")
    axes.set_ylabel("cells")
    _bare(axes)
    return figure

"""Cells and the components they belong to."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from nbmix.evaluation.metrics import match_components, overlap_table
from nbmix.evaluation.plots.style import (
    PALETTE,
    component_colors,
    new_figure,
    open_frame,
    say,
    short_name,
    side_legend,
    side_legend_width,
)

MOST_DOTS = 5000  # side by side along an axis
LONGEST_MARK = 3  # characters of names that are written on the points


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

    figure = new_figure(min(3.6 + 0.32 * n_components, 16.0), 4.6)
    top, bottom = figure.subplots(2, 1, sharex=True)
    positions = np.arange(n_components)
    counted = [str(size) for size in sizes]
    measured = [f"{mean:.2f}" if size else "" for mean, size in zip(certainty, sizes, strict=True)]
    for axes, heights, texts, name in (
        (top, sizes, counted, "cells"),
        (bottom, certainty, measured, "mean largest\nposterior"),
    ):
        bars = axes.bar(positions, heights, color=component_colors(n_components))
        axes.bar_label(bars, texts, fontsize=6.5, padding=1.5)
        axes.set_ylabel(name)
        axes.margins(y=0.12)
        open_frame(axes)
    top.yaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_ylim(0.0, 1.12)
    bottom.set_yticks([0.0, 0.5, 1.0])
    bottom.set_xticks(positions, [str(k) for k in positions], fontsize="small")
    bottom.set_xlabel("group")
    return figure


def posterior_histogram(responsibilities: ArrayLike) -> Figure:
    """Histogram of each cell's largest posterior, between 1 / components and 1; counts on a log scale.

    Args:
        responsibilities: (cells, components), rows sum to 1.
    """
    posterior = np.asarray(responsibilities, dtype=np.float64)  # (cells, components)
    lowest = 1.0 / posterior.shape[1] if posterior.shape[1] > 1 else 0.0
    figure = new_figure(5.6, 3.6)
    axes = figure.add_subplot()
    axes.hist(np.clip(posterior.max(axis=1), lowest, 1.0), bins=40, range=(lowest, 1.0), color=PALETTE[0])
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.set_xlabel("largest posterior probability of the cell")
    axes.set_ylabel("cells")
    open_frame(axes)
    return figure


def log_likelihood_margins(log_likelihood: ArrayLike, assignments: ArrayLike) -> Figure:
    """How much better than any other component its own explains each cell: l_ik - max over l != k of l_il.

    Cells stand by component, and in each by their margin; below zero another component explains the cell
    better than the one it is assigned to.

    Args:
        log_likelihood: (cells, components) nats; of more than `MOST_DOTS` cells a random choice is shown.
        assignments: (cells,) component of each cell.
    """
    values, own = np.asarray(log_likelihood, dtype=np.float64), np.asarray(assignments)
    n_cells, n_components = values.shape
    figure = new_figure(6.8, 4.2)
    axes = figure.add_subplot()
    axes.set_ylabel("log likelihood of the own group\nminus the best other (nats)")
    axes.set_xlabel("cells, by group")
    open_frame(axes)
    if n_components < 2:
        say(axes, "one group: nothing to compare with")
        return figure
    if n_cells > MOST_DOTS:
        chosen = np.random.default_rng(0).choice(n_cells, MOST_DOTS, replace=False)
        values, own = values[chosen], own[chosen]
    cells = np.arange(len(own))
    others = values.copy()
    others[cells, own] = -np.inf
    margins = values[cells, own] - others.max(axis=1)  # (cells,)
    order = np.lexsort((margins, own))
    own, margins = own[order], margins[order]
    axes.axhline(0.0, color="0.6", linewidth=0.8, zorder=1)
    axes.scatter(cells, margins, s=4.0, c=to_rgba_array(component_colors(n_components))[own], linewidths=0.0)
    axes.set_yscale("symlog", linthresh=10.0)
    axes.set_xticks([])
    for k in np.unique(own):
        middle = float(np.median(cells[own == k]))
        axes.text(middle, 1.0, str(k), transform=axes.get_xaxis_transform(), ha="center", fontsize="small")
    return figure


class _Panel(NamedTuple):
    """Cells in groups.

    Attributes:
        title, legend_title: above the panel, and above its legend.
        codes: (cells,) number of each cell's group.
        names: (groups,)
        sizes: (groups,) cells.
        colors: (groups,)
        opacity: of each cell, or one for all.
    """

    title: str
    legend_title: str
    codes: NDArray
    names: Sequence[str]
    sizes: NDArray
    colors: Sequence[str]
    opacity: NDArray

    @property
    def handles(self) -> list[Line2D]:
        """Entries of the legend."""
        return [
            Line2D([], [], marker="o", linestyle="", color=color, label=f"{short_name(name)} ({size:,})")
            for color, name, size in zip(self.colors, self.names, self.sizes, strict=True)
        ]

    @property
    def rgba(self) -> NDArray:
        """(cells, 4)"""
        rgba = to_rgba_array(self.colors)[self.codes]
        rgba[:, 3] = self.opacity
        return rgba


def posterior_on_embedding(
    embedding_name: str,
    coordinates: ArrayLike,
    responsibilities: ArrayLike,
    labels: ArrayLike | None = None,
    others: Mapping[str, ArrayLike] | None = None,
) -> Figure:
    """Cells in the plane, coloured by component, opaque in proportion to the posterior of it.

    With labels, a panel on the left shows them, each in the colour of the component matched one-to-one
    with it, so that agreement is the same colour in the same place. Other groupings likewise. Numbers of
    components, and names as short, are written on the points too.

    Args:
        embedding_name: for the axes, such as "UMAP".
        coordinates: (cells, 2).
        responsibilities: (cells, components), rows sum to 1.
        labels: (cells,) strings or integers, none missing, or None.
        others: name to (cells,) groups, of Leiden, say: a panel each between labels and components.
    """
    points = np.asarray(coordinates)  # (cells, 2)
    posterior = np.asarray(responsibilities)  # (cells, components)
    opacity = float(np.clip((10_000 / max(len(points), 1)) ** 0.5, 0.35, 0.9))
    own = _components(posterior, opacity)
    groupings = ({} if labels is None else {"labels": labels}) | dict(others or {})
    panels = [*(_groups(name, groups, own, opacity) for name, groups in groupings.items()), own]

    figure = new_figure(sum(4.4 + side_legend_width(panel.handles) for panel in panels), 4.4)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        _scatter(axes, points, panel.rgba, embedding_name, panel.title)
        side_legend(axes, panel.handles, panel.legend_title)
        if all(len(name) <= LONGEST_MARK for name in panel.names):
            _mark(axes, points, panel)
    return figure


def _components(posterior: NDArray, opacity: float) -> _Panel:
    """The components, with ``opacity`` for a posterior of 1."""
    n_cells, n_components = posterior.shape
    assignments = posterior.argmax(axis=1)  # (cells,)
    return _Panel(
        "groups; opacity is the posterior probability",
        "group (cells)",
        assignments,
        [str(k) for k in range(n_components)],
        np.bincount(assignments, minlength=n_components),
        component_colors(n_components),
        opacity * np.clip(posterior[np.arange(n_cells), assignments], 0.0, 1.0),
    )


def _groups(name: str, groups: ArrayLike, components: _Panel, opacity: float) -> _Panel:
    """Another grouping, in the colours of the components that are matched with its groups."""
    n_components = len(components.names)
    values, table = overlap_table(groups, components.codes, n_components)
    palette = component_colors(n_components + len(values))
    matched = {group: palette[k] for k, group in enumerate(match_components(table)) if group >= 0}
    spare = iter(palette[n_components:])
    return _Panel(
        short_name(name),
        "label (cells)" if name == "labels" else "group (cells)",
        np.searchsorted(values, np.asarray(groups)),
        [str(value) for value in values],
        table.sum(axis=1),
        [matched.get(i) or next(spare) for i in range(len(values))],
        np.array(opacity),
    )


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
    open_frame(axes)


def _mark(axes: Axes, points: NDArray, panel: _Panel) -> None:
    """The name of each group written where most of its cells are, as colours alone are not enough."""
    for k in np.unique(panel.codes):
        x, y = _fullest_place(points, points[panel.codes == k])
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": panel.colors[k]}
        axes.text(
            x,
            y,
            short_name(panel.names[k]),
            fontsize=6.5,
            ha="center",
            va="center",
            bbox={**box, "alpha": 0.85},
        )


def _fullest_place(points: NDArray, members: NDArray) -> NDArray:
    """Median of the members in the fullest square of a 20 x 20 grid: on the data, where a mean may not be."""
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    squares = np.minimum(20 * (members - low) / np.where(extent > 0, extent, 1.0), 19).astype(int)
    flat = 20 * squares[:, 0] + squares[:, 1]
    return np.median(members[flat == np.bincount(flat).argmax()], axis=0)

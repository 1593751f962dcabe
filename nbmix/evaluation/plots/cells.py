"""Cells and the components they belong to."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from nbmix.evaluation.metrics import match_components, overlap_table
from nbmix.evaluation.plots.style import (
    PALETTE,
    Place,
    axes_in,
    component_colors,
    figure_of,
    name_columns,
    new_figure,
    open_frame,
    say,
    short_name,
    side_legend,
    side_legend_width,
)

MOST_DOTS = 5000  # side by side along an axis
PANEL = 4.4  # width and height of an embedding without its legend
LONGEST_MARK = 3  # characters of names that are written on the points


def component_sizes(
    responsibilities: ArrayLike,
    names: Sequence[object] | None = None,
    place: Place = None,
    colors: Sequence[str] | None = None,
) -> Figure:
    """Cells assigned to each component, and how surely: the mean of their largest posterior, in brackets.

    Args:
        responsibilities: (cells, components), rows sum to 1; components without cells are left out.
        names: (components,) names, by default the indices.
        place: see ``style.Place``.
        colors: (components,), by default those of ``style``.
    """
    posterior = np.asarray(responsibilities)  # (cells, components)
    own = own_components(posterior, names, colors)
    certainty = np.bincount(own.codes, weights=posterior.max(axis=1)) / own.sizes
    axes = axes_in(place, 5.6, 1.0 + 0.24 * len(own.names))
    rows = np.arange(len(own.names))
    bars = axes.barh(rows, own.sizes, color=own.colors)
    texts = [f"{size:,} ({mean:.3f})" for size, mean in zip(own.sizes, certainty, strict=True)]
    axes.bar_label(bars, texts, fontsize="small", padding=3)
    axes.set_yticks(rows, [short_name(name) for name in own.names])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.25)  # for the texts
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("cells (mean largest posterior)")
    axes.set_ylabel("group")
    open_frame(axes)
    return figure_of(axes)


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
    better than the one it is assigned to. Components have the same room, however many cells they have.

    Args:
        log_likelihood: (cells, components) nats; of more than `MOST_DOTS` cells a random choice is shown.
        assignments: (cells,) component of each cell.
    """
    values, own = np.asarray(log_likelihood, dtype=np.float64), np.asarray(assignments)
    n_cells, n_components = values.shape
    figure = new_figure(max(6.8, 1.2 + 0.3 * n_components), 4.2)
    axes = figure.add_subplot()
    axes.set_ylabel("log likelihood of the own group\nminus the best other (nats)")
    axes.set_xlabel("group; cells in the order of their margin")
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
    shown, column, sizes = np.unique(own, return_inverse=True, return_counts=True)
    rank = cells - np.repeat(sizes.cumsum() - sizes, sizes)  # within the component, from 0
    x = column + 0.9 * ((rank + 0.5) / sizes[column] - 0.5)
    axes.axhline(0.0, color="0.6", linewidth=0.8, zorder=1)
    axes.scatter(x, margins, s=4.0, c=to_rgba_array(component_colors(n_components))[own], linewidths=0.0)
    axes.set_yscale("symlog", linthresh=10.0)
    name_columns(axes, [str(k) for k in shown])
    return figure


class Grouping(NamedTuple):
    """Cells in groups; those without cells are none.

    Attributes:
        codes: (cells,) position of each cell's group.
        names: (groups,)
        sizes: (groups,) cells.
        colors: (groups,)
    """

    codes: NDArray
    names: Sequence[str]
    sizes: NDArray
    colors: Sequence[str]

    @property
    def handles(self) -> list[Line2D]:
        """Entries of the legend."""
        return [
            Line2D([], [], marker="o", linestyle="", color=color, label=f"{short_name(name)} ({size:,})")
            for color, name, size in zip(self.colors, self.names, self.sizes, strict=True)
        ]


def groups_on_embedding(
    embedding_name: str,
    coordinates: ArrayLike,
    responsibilities: ArrayLike,
    names: Sequence[object] | None = None,
    place: Place = None,
    colors: Sequence[str] | None = None,
) -> Figure:
    """Cells in the plane, coloured by component, opaque in proportion to the posterior of it.

    Numbers of components, and names as short, are written on the points too.

    Args:
        embedding_name: for the axes, such as "UMAP".
        coordinates: (cells, 2).
        responsibilities: (cells, components), rows sum to 1; components without cells are left out.
        names: (components,) names, by default the indices.
        place: see ``style.Place``.
        colors: (components,), by default those of ``style``.
    """
    points, posterior = np.asarray(coordinates), np.asarray(responsibilities)
    own = own_components(posterior, names, colors)
    axes = axes_in(place, PANEL + side_legend_width(own.handles), PANEL)
    _draw_groups(axes, embedding_name, points, own, _opacity(points) * posterior.max(axis=1))
    side_legend(axes, own.handles, "group (cells)")
    return figure_of(axes)


def certainty_on_embedding(
    embedding_name: str, coordinates: ArrayLike, responsibilities: ArrayLike, place: Place = None
) -> Figure:
    """Cells in the plane, coloured by their largest posterior; the least sure ones are drawn last.

    Args:
        embedding_name, coordinates, responsibilities, place: see `groups_on_embedding`.
    """
    sure = np.asarray(responsibilities).max(axis=1)  # (cells,)
    axes = axes_in(place, PANEL + 1.0, PANEL)
    cells = np.argsort(-sure, kind="stable")
    colors = LinearSegmentedColormap.from_list("certainty", ["#5a0f00", "#d55e00", "#e69f00", "#d9dee5"])
    x, y = np.asarray(coordinates)[cells].T
    dots = axes.scatter(
        x,
        y,
        s=_dot_size(len(cells)),
        c=sure[cells],
        cmap=colors,
        vmin=min(0.5, float(sure.min(initial=1.0))),
        vmax=1.0,
        linewidths=0.0,
        rasterized=True,
    )
    _frame_embedding(axes, embedding_name)
    figure = figure_of(axes)
    figure.colorbar(dots, ax=axes, label="largest posterior", fraction=0.05, pad=0.02)
    return figure


def posterior_on_embedding(
    embedding_name: str,
    coordinates: ArrayLike,
    responsibilities: ArrayLike,
    labels: ArrayLike | None = None,
    others: Mapping[str, ArrayLike] | None = None,
) -> Figure:
    """As `groups_on_embedding`, beside labels and other groupings of the same cells.

    With labels, a panel on the left shows them, each in the colour of the component matched one-to-one
    with it, so that agreement is the same colour in the same place. Other groupings likewise.

    Args:
        embedding_name, coordinates, responsibilities: see `groups_on_embedding`.
        labels: (cells,) strings or integers, none missing, or None.
        others: name to (cells,) groups, of Leiden, say: a panel each between labels and components.
    """
    points, posterior = np.asarray(coordinates), np.asarray(responsibilities)
    own, opacity = own_components(posterior), _opacity(points)
    given = ({} if labels is None else {"labels": labels}) | dict(others or {})
    panels = {name: _matched(groups, posterior) for name, groups in given.items()}
    widths = [PANEL + side_legend_width(grouping.handles) for grouping in (*panels.values(), own)]
    figure = new_figure(sum(widths), PANEL)
    for number, (name, grouping) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(widths), number)
        _draw_groups(axes, embedding_name, points, grouping, np.full(len(points), opacity))
        axes.set_title(short_name(name), loc="left", fontsize="medium")
        side_legend(axes, grouping.handles, "label (cells)" if name == "labels" else "group (cells)")
    axes = figure.add_subplot(1, len(widths), len(widths))
    _draw_groups(axes, embedding_name, points, own, opacity * posterior.max(axis=1))
    axes.set_title("groups; opacity is the posterior probability", loc="left", fontsize="medium")
    side_legend(axes, own.handles, "group (cells)")
    return figure


def own_components(
    posterior: NDArray, names: Sequence[object] | None = None, colors: Sequence[str] | None = None
) -> Grouping:
    """The components (cells, components) with cells."""
    shown, codes, sizes = np.unique(posterior.argmax(axis=1), return_inverse=True, return_counts=True)
    palette = component_colors(posterior.shape[1]) if colors is None else colors
    named = [str(name) for name in (range(posterior.shape[1]) if names is None else names)]
    return Grouping(codes, [named[k] for k in shown], sizes, [palette[k] for k in shown])


def _matched(groups: ArrayLike, posterior: NDArray) -> Grouping:
    """Another grouping, in the colours of the components that are matched with its groups."""
    n_components = posterior.shape[1]
    values, table = overlap_table(groups, posterior.argmax(axis=1), n_components)
    palette = component_colors(n_components + len(values))
    matched = {group: palette[k] for k, group in enumerate(match_components(table)) if group >= 0}
    spare = iter(palette[n_components:])
    return Grouping(
        np.searchsorted(values, np.asarray(groups)),
        [str(value) for value in values],
        table.sum(axis=1),
        [matched.get(i) or next(spare) for i in range(len(values))],
    )


def _opacity(points: NDArray) -> float:
    """Of a cell with a posterior of 1: paler the more cells there are."""
    return float(np.clip((10_000 / max(len(points), 1)) ** 0.5, 0.35, 0.9))


def _dot_size(n_cells: int) -> float:
    """Points squared: smaller the more cells there are."""
    return float(np.clip(9000 / max(n_cells, 1), 0.6, 30.0))


def _draw_groups(axes: Axes, name: str, points: NDArray, grouping: Grouping, opacity: NDArray) -> None:
    """Dots in random order, so that no group hides another, with an ``opacity`` (cells,) each."""
    rgba = to_rgba_array(grouping.colors)[grouping.codes]
    rgba[:, 3] = np.clip(opacity, 0.0, 1.0)
    order = np.random.default_rng(0).permutation(len(points))
    x, y = points[order].T
    axes.scatter(x, y, s=_dot_size(len(points)), c=rgba[order], linewidths=0.0, rasterized=True)
    _frame_embedding(axes, name)
    if all(len(group) <= LONGEST_MARK for group in grouping.names):
        _mark(axes, points, grouping)


def _frame_embedding(axes: Axes, name: str) -> None:
    axes.set(xlabel=f"{short_name(name)} 1", ylabel=f"{short_name(name)} 2", xticks=[], yticks=[])
    open_frame(axes)


def _mark(axes: Axes, points: NDArray, grouping: Grouping) -> None:
    """The name of each group written where most of its cells are, as colours alone are not enough."""
    for k, (name, color) in enumerate(zip(grouping.names, grouping.colors, strict=True)):
        x, y = fullest_place(points, points[grouping.codes == k])
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": color, "alpha": 0.85}
        axes.text(x, y, short_name(name), fontsize=6.5, ha="center", va="center", bbox=box)


def fullest_place(points: NDArray, members: NDArray) -> NDArray:
    """Median of the members in the fullest square of a 20 x 20 grid: on the data, where a mean may not be."""
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    squares = np.minimum(20 * (members - low) / np.where(extent > 0, extent, 1.0), 19).astype(int)
    flat = 20 * squares[:, 0] + squares[:, 1]
    return np.median(members[flat == np.bincount(flat).argmax()], axis=0)

"""How a fit went: its objective, and the choice of the number of components."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

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
    top_legend,
)

DrawnJoin = tuple[Sequence[int], Sequence[int], float, bool]  # components, separation, whether there is a gap


def objective_trace(
    iterations: Sequence[int], series: Mapping[str, Sequence[float]], place: Place = None
) -> Figure:
    """Objectives (nats per cell) against the iteration, one line a series.

    Args:
        iterations: (steps,) iteration or epoch numbers.
        series: name to (steps,) values in nats per cell; steps that are not finite are skipped, so that a
            quantity measured at every tenth iteration still makes a line.
        place: see ``style.Place``.
    """
    axes = axes_in(place, 6.4, 4.0)
    steps = np.asarray(iterations)
    for color, (name, given) in zip(component_colors(len(series)), series.items(), strict=True):
        values = np.asarray(given, dtype=np.float64)
        known = np.isfinite(values)
        marker = "o" if known.sum() <= 30 else None
        axes.plot(
            steps[known], values[known], color=color, marker=marker, markersize=3.5, label=short_name(name)
        )
    axes.set_xlabel("iteration")
    axes.set_ylabel("nats per cell")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.25)
    open_frame(axes)
    top_legend(axes, axes.lines, ncols=2)
    return figure_of(axes)


def join_dendrogram(
    joins: Sequence[DrawnJoin],
    n_cells: ArrayLike,
    groups: Sequence[Sequence[int]] = (),
    names: Sequence[object] | None = None,
    place: Place = None,
) -> Figure:
    """Components at the left, joined from there to one group at the right, where the separation is.

    Args:
        joins: components of the two groups, their separation, and whether there is a gap between them, in the
            order of the joins. A join that is less separate than one of its parts is drawn where that is.
        n_cells: (components,) cells of each, written beside it; those without cells are left out.
        groups: the components of each group; joins within one are drawn thick, and its name is written
            beside its components.
        names: (groups,) names, by default the indices.
        place: see ``style.Place``.
    """
    counts = np.asarray(n_cells)
    joins = _with_cells(joins, counts)
    if not joins:
        axes = axes_in(place, 6.4, 1.4)
        say(axes, "one component with cells: nothing to join")
        return figure_of(axes)
    parts_of = {frozenset([*a, *b]): (list(a), list(b)) for a, b, _, _ in joins}

    def ordered(group: frozenset[int]) -> list[int]:
        if group not in parts_of:
            return sorted(group)
        return [leaf for part in parts_of[group] for leaf in ordered(frozenset(part))]

    leaves = ordered(frozenset([*joins[-1][0], *joins[-1][1]]))
    axes = axes_in(place, 6.4, 1.4 + 0.26 * len(leaves))
    at: dict[frozenset[int], tuple[float, float]] = {}  # separation, height

    def start_of(group: Sequence[int]) -> tuple[float, float]:
        return at.get(frozenset(group), (0.0, float(np.mean([leaves.index(leaf) for leaf in group]))))

    for a, b, separation, has_gap in joins:
        (x_a, y_a), (x_b, y_b) = start_of(a), start_of(b)
        x = max(separation, x_a, x_b)
        color = PALETTE[3] if has_gap else PALETTE[0]
        within = any({*a, *b} <= set(group) for group in groups)
        axes.plot([x_a, x, x, x_b], [y_a, y_a, y_b, y_b], color=color, linewidth=3.2 if within else 1.6)
        at[frozenset([*a, *b])] = (x, (y_a + y_b) / 2)
    named = zip(range(len(groups)) if names is None else names, groups, strict=True)
    group_of = {leaf: f"group {short_name(name)}: " for name, group in named for leaf in group}
    rows = [f"{group_of.get(leaf, '')}component {leaf} ({counts[leaf]:,} cells)" for leaf in leaves]
    axes.set_yticks(range(len(leaves)), rows, fontsize="small")
    axes.set_ylim(len(leaves) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("separation (standard deviations)")
    shown = (PALETTE[3], "gap"), (PALETTE[0], "no gap")
    handles = [Line2D([], [], color=color, label=label) for color, label in shown]
    top_legend(axes, handles, ncols=2)
    open_frame(axes)
    return figure_of(axes)


def _with_cells(joins: Sequence[DrawnJoin], n_cells: NDArray) -> list[DrawnJoin]:
    """The joins of components with cells."""
    filled = [
        ([c for c in a if n_cells[c]], [c for c in b if n_cells[c]], separation, has_gap)
        for a, b, separation, has_gap in joins
    ]
    return [join for join in filled if join[0] and join[1]]


def separation_matrix(
    n_groups: int,
    first: ArrayLike,
    second: ArrayLike,
    separation: ArrayLike,
    has_gap: ArrayLike,
    names: Sequence[object] | None = None,
    place: Place = None,
) -> Figure:
    """How far apart groups are, as numbers on a grid; in brackets where there is no gap.

    Args:
        n_groups: rows and columns.
        first, second: (pairs,) indices of two groups.
        separation: (pairs,) of the two.
        has_gap: (pairs,) whether there is a gap between them.
        names: (groups,) names, by default the indices.
        place: see ``style.Place``.
    """
    values = np.full((n_groups, n_groups), np.nan)
    axes = axes_in(place, 1.6 + 0.5 * n_groups, 1.4 + 0.42 * n_groups)
    pairs = list(zip(*map(np.asarray, (first, second, separation, has_gap)), strict=True))
    for a, b, distance, _ in pairs:
        values[a, b] = values[b, a] = distance
    darkest = 1.6 * float(np.nanquantile(values, 0.9))  # a group of one cell can be ten times as far
    axes.imshow(values, cmap="Blues", vmin=0, vmax=darkest, aspect="auto")
    for a, b, distance, gap in pairs:
        text = f"{distance:.1f}" if gap else f"({distance:.1f})"
        color = "white" if distance > 0.6 * darkest else "black"
        for row, column in ((a, b), (b, a)):
            axes.text(column, row, text, ha="center", va="center", fontsize="small", color=color)
    shown = [short_name(name) for name in (range(n_groups) if names is None else names)]
    axes.set_yticks(range(n_groups), shown)
    name_columns(axes, shown)
    axes.set_xlabel("group")
    axes.set_ylabel("group")
    return figure_of(axes)


def held_out_curve(
    n_components: ArrayLike,
    log_likelihood: ArrayLike,
    standard_error: ArrayLike | None = None,
    *,
    recommended: int | None = None,
) -> Figure:
    """Held-out log likelihood against the number of components; the recommended one, or the best, is ringed.

    Args:
        n_components: (fits,) K of each fit; of several fits with the same K the line takes the best.
        log_likelihood: (fits,) nats per cell.
        standard_error: (fits,) of the same, drawn as bars.
    """
    ks, values = np.asarray(n_components), np.asarray(log_likelihood, dtype=np.float64)
    distinct = np.unique(ks)
    best = np.array([values[ks == k].max() for k in distinct])
    winner = int(best.argmax() if recommended is None else np.flatnonzero(distinct == recommended)[0])
    figure = new_figure(6.0, 4.0)
    axes = figure.add_subplot()
    axes.plot(distinct, best, color=PALETTE[0], linewidth=1.4)
    axes.errorbar(
        ks, values, standard_error, color=PALETTE[0], linestyle="", marker="o", markersize=4, capsize=2
    )
    axes.scatter(distinct[winner], best[winner], s=110, facecolor="none", edgecolor=PALETTE[3], zorder=3)
    word = "best" if recommended is None else "recommended"
    axes.set_title(f"{word}: {distinct[winner]} components", loc="left", fontsize="medium")
    axes.set_xlabel("components")
    axes.set_ylabel("held-out log likelihood (nats per cell)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.25)
    open_frame(axes)
    return figure

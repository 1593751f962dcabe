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
from scipy.stats import gamma

from nbmix.evaluation.calibration import Reliability
from nbmix.evaluation.metrics import match_components, overlap_table

# Okabe and Ito (2008), their yellow last, as it is pale on white; then 22 colours added one at a time, each
# the farthest in OKLab from all before as seen with normal, protanopic and deuteranopic vision (Machado et
# al. 2009). No 30 colours are all easy to tell apart, so the figures also write component numbers beside the
# data.
PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#f0e442"),
    *("#5a0f00", "#000078", "#6900ff", "#a50f5a", "#00f0c3", "#8778ff", "#5a2d96", "#1e5a00"),
    *("#0f2d3c", "#d200b4", "#96b487", "#b4d2ff", "#0000d2", "#1e5a69", "#ffc387", "#876978"),
    *("#ff78d2", "#ff4b5a", "#4b3c2d", "#f00ff0", "#964b96", "#b44b4b"),
)
LONGEST_NAME = 32  # characters
LONGEST_MARK = 3  # characters of names that are written on the points
LEGEND_ROWS = 18
DPI = 150
MOST_DOTS = 5000  # side by side along an axis
LEAST_LOSS = 2.0  # nats; a gene that costs less has no count that is sure to be of the component
CDF_POINTS, CDF_DOTS = 400, 40


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
    n_cells, n_components = posterior.shape
    assignments = posterior.argmax(axis=1)  # (cells,)
    sizes = np.bincount(assignments, minlength=n_components)
    opacity = float(np.clip((10_000 / max(n_cells, 1)) ** 0.5, 0.35, 0.9))
    colors = _colors(n_components)
    own = np.clip(posterior[np.arange(n_cells), assignments], 0.0, 1.0)  # (cells,)
    title = "components; opacity is the posterior probability"
    handles = [_handle(color, f"{k} ({sizes[k]:,})") for k, color in enumerate(colors)]
    rgba = _rgba(colors, assignments, opacity * own)
    numbers = [str(k) for k in range(n_components)]
    panels = [(title, rgba, handles, "component (cells)", assignments, numbers, colors)]

    groupings = ({} if labels is None else {"labels": labels}) | dict(others or {})
    for place, (name, groups) in enumerate(groupings.items()):
        values, table = overlap_table(groups, assignments, n_components)
        palette = _colors(n_components + len(values))
        matched = {group: palette[k] for k, group in enumerate(match_components(table)) if group >= 0}
        spare = iter(palette[n_components:])
        group_colors = [matched.get(i) or next(spare) for i in range(len(values))]
        handles = [
            _handle(color, f"{_short(value)} ({count:,})")
            for color, value, count in zip(group_colors, values, table.sum(axis=1), strict=True)
        ]
        codes = np.searchsorted(values, np.asarray(groups))
        rgba = _rgba(group_colors, codes, np.array(opacity))
        legend_title = "label (cells)" if name == "labels" else "group (cells)"
        group_names = [str(value) for value in values]
        panels.insert(place, (_short(name), rgba, handles, legend_title, codes, group_names, group_colors))

    width = sum(4.4 + _legend_width(handles) for _, _, handles, *_ in panels)
    figure = _figure(width, 4.4)
    for i, (title, rgba, handles, legend_title, codes, names, group_colors) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        _scatter(axes, points, rgba, embedding_name, title)
        _legend(axes, handles, legend_title)
        if all(len(name) <= LONGEST_MARK for name in names):
            _mark(axes, points, codes, names, group_colors)
    return figure


def _mark(axes: Axes, points: NDArray, codes: NDArray, names: Sequence[str], colors: Sequence[str]) -> None:
    """The name of each group written where most of its cells are, as colours alone are not enough."""
    for k in np.unique(codes):
        x, y = _fullest_place(points, points[codes == k])
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": colors[k], "alpha": 0.85}
        axes.text(x, y, names[k], fontsize=6.5, ha="center", va="center", bbox=box)


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
        _say(axes, "one component: nothing to compare with")
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


def poisson_against_negative_binomial(
    poisson: ArrayLike, negative_binomial: ArrayLike, names: Sequence[object] | None = None
) -> Figure:
    """Log likelihood of every gene under both fits, a panel a component: above the line cells vary.

    Axes are minus the log likelihood, logarithmic, and run from bad to good. Genes that are silent in the
    component, or nearly (`LEAST_LOSS`), are left out.

    Args:
        poisson, negative_binomial: (components, genes) nats, summed over the cells of the component.
        names: (components,) names, by default the indices.
    """
    lost = [-np.asarray(values, dtype=np.float64) for values in (poisson, negative_binomial)]
    heard = (lost[0] > LEAST_LOSS) & (lost[1] > LEAST_LOSS)  # (components, genes)
    n_components = heard.shape[0]
    titles = [_short(name) for name in (range(n_components) if names is None else names)]
    columns = min(n_components, 5)
    rows = -(-n_components // columns)
    figure = _figure(1.2 + 2.1 * columns, 0.9 + 2.2 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    low, high = 1.0, 10.0
    if heard.any():
        low = min(float(values[heard].min()) for values in lost) / 1.5
        high = max(float(values[heard].max()) for values in lost) * 1.5
    for k, (axes, color) in enumerate(zip(grid.flat, _colors(grid.size), strict=True)):
        if k >= n_components:
            axes.set_visible(False)
            continue
        axes.plot([low, high], [low, high], color="0.4", linewidth=0.8, linestyle=":")
        x, y = (values[k, heard[k]] for values in lost)
        axes.scatter(x, y, s=2.5, color=color, alpha=0.25, linewidths=0.0, rasterized=True)
        axes.set(xscale="log", yscale="log", xlim=(high, low), ylim=(high, low))
        axes.minorticks_off()  # of thirty panels they take seconds
        axes.set_title(f"{titles[k]}\ngain {(x - y).sum():,.0f} nats", loc="left", fontsize="small")
        axes.tick_params(labelsize="small")
        _bare(axes)
    figure.supxlabel("minus log likelihood, Poisson (nats)", fontsize="medium")
    figure.supylabel("minus log likelihood,\nnegative binomial (nats)", fontsize="medium", ma="center")
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
    figure = _figure(6.8, 4.2)
    axes = figure.add_subplot()
    axes.set_ylabel("log likelihood of the own component\nminus the best other (nats)")
    axes.set_xlabel("cells, by component")
    _bare(axes)
    if n_components < 2:
        _say(axes, "one component: nothing to compare with")
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
    axes.scatter(cells, margins, s=4.0, c=to_rgba_array(_colors(n_components))[own], linewidths=0.0)
    axes.set_yscale("symlog", linthresh=10.0)
    axes.set_xticks([])
    for k in np.unique(own):
        middle = float(np.median(cells[own == k]))
        axes.text(middle, 1.0, str(k), transform=axes.get_xaxis_transform(), ha="center", fontsize="small")
    return figure


def component_label_correlation(labels: ArrayLike, responsibilities: ArrayLike) -> Figure:
    """Correlation over the cells between each label's indicator and each component's posterior.

    Components are ordered as in `component_label_table`. Where a posterior is the same for all cells there
    is no correlation, and nothing is drawn.

    Args:
        labels: (cells,) strings or integers, none missing.
        responsibilities: (cells, components), rows sum to 1.
    """
    posterior = np.asarray(responsibilities, dtype=np.float64)  # (cells, components)
    n_components = posterior.shape[1]
    label_values, table = overlap_table(labels, posterior.argmax(axis=1), n_components)
    n_labels = len(label_values)
    label_of_component = match_components(table)
    order = np.argsort(np.where(label_of_component < 0, n_labels, label_of_component), kind="stable")
    codes = np.searchsorted(label_values, np.asarray(labels))
    share = np.bincount(codes, minlength=n_labels) / len(codes)  # (labels,)
    sums, variance = np.empty((n_labels, n_components)), np.empty(n_components)
    for column, k in enumerate(order):
        centred = posterior[:, k] - posterior[:, k].mean()
        sums[:, column] = np.bincount(codes, weights=centred, minlength=n_labels)
        variance[column] = (centred**2).mean()
    scale = np.sqrt(np.outer(share * (1 - share), variance))  # (labels, components)
    unknown = np.full(scale.shape, np.nan)
    correlation = np.divide(sums / len(codes), scale, out=unknown, where=scale > 1e-9)

    figure = _figure(min(3.6 + 0.5 * n_components, 18.0), float(np.clip(1.6 + 0.38 * n_labels, 2.8, 18.0)))
    axes = figure.add_subplot()
    image = axes.imshow(correlation, cmap="RdBu_r", vmin=-1.0, vmax=1.0, aspect="auto")
    for (row, column), value in np.ndenumerate(correlation):
        if np.isfinite(value):
            color = "white" if abs(value) > 0.6 else "black" if abs(value) > 0.1 else "0.6"
            text = f"{round(value, 2) + 0.0:.2f}"  # no -0.00
            axes.text(column, row, text, ha="center", va="center", fontsize=7.0, color=color)
    axes.set_xticks(range(n_components), [str(k) for k in order])
    axes.set_yticks(range(n_labels), [_short(name) for name in label_values])
    axes.tick_params(length=0)
    axes.set_xlabel("component")
    axes.set_ylabel("label")
    figure.colorbar(image, ax=axes, label="correlation", fraction=0.05, pad=0.02)
    return figure


def latent_distribution(
    gene: object,
    counts: ArrayLike,
    size_factors: ArrayLike,
    groups: ArrayLike,
    log_mean: ArrayLike,
    log_inv_disp: ArrayLike,
    names: Sequence[object] | None = None,
) -> Figure:
    """One gene: its counts, and the distribution of its latent expression lambda in every group.

    Lines are the fitted Gamma distributions, with mean mu and shape r; dots are the empirical distributions
    of x / s, which Poisson noise widens, above all where counts are few.

    Args:
        gene: its name.
        counts: (cells,) x.
        size_factors: (cells,) s; cells with 0 are left out.
        groups: (cells,) index of the group of each cell: components, or labels with a fit of their own.
        log_mean, log_inv_disp: (groups,) ln mu per unit of size factor, and ln r.
        names: (groups,) names, by default the indices.
    """
    sizes = np.asarray(size_factors, dtype=np.float64)
    filled = sizes > 0
    x, member = np.asarray(counts, dtype=np.float64)[filled], np.asarray(groups)[filled]
    ratio = x / sizes[filled]
    shape = np.exp(np.asarray(log_inv_disp, dtype=np.float64))
    scale = np.exp(np.asarray(log_mean, dtype=np.float64)) / shape
    n_groups = shape.size
    titles = [_short(name) for name in (range(n_groups) if names is None else names)]
    colors = _colors(n_groups)
    handles = [Line2D([], [], color=color, label=title) for color, title in zip(colors, titles, strict=True)]

    figure = _figure(5.6 + _legend_width(handles), 5.0)
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 2))
    most = int(x.max(initial=0.0))
    width = most // 60 + 1
    top.hist(x, bins=np.arange(0, most + width + 1, width) - 0.5, color="0.55")
    top.set_yscale("log")
    top.set_ylim(bottom=0.7)
    top.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.set_xlabel("molecules in a cell", fontsize="small")
    top.set_ylabel("cells")
    top.set_title(_short(gene), loc="left", fontsize="medium")
    found = [np.sort(ratio[member == k]) for k in range(n_groups)]
    # as far as the bulk of any group goes
    reach = float(gamma.ppf(0.99, shape, scale=scale).max())
    reach = max([reach, *(float(np.quantile(values, 0.95)) for values in found if values.size)])
    grid, at = np.linspace(0.0, reach, CDF_POINTS), np.linspace(0.0, reach, CDF_DOTS)
    for k, values in enumerate(found):
        bottom.plot(grid, gamma.cdf(grid, shape[k], scale=scale[k]), color=colors[k], linewidth=1.4)
        if values.size:
            below = np.searchsorted(values, at, side="right") / values.size
            bottom.plot(at, below, color=colors[k], linestyle="", marker="o", markersize=2.2, alpha=0.8)
    bottom.set_xlim(-0.01 * reach, reach)
    bottom.set_ylim(-0.02, 1.02)
    bottom.set_xlabel(r"latent expression $\lambda$ (lines) and $x / s$ (dots), per unit of size factor")
    bottom.set_ylabel("cumulative share of cells")
    _legend(bottom, handles, "component" if names is None else None)
    for axes in (top, bottom):
        _bare(axes)
    return figure


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
    figure = _figure(6.0, 4.0)
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
    _bare(axes)
    return figure


def reliability_diagram(curves: Mapping[str, Reliability]) -> Figure:
    """Accuracy against confidence, as in Niculescu-Mizil & Caruana (2005), and how many cells are how sure.

    On the diagonal, probabilities are right; below it they are too sure. Dots have an area in proportion to
    the root of their number of cells; empty bins have none.

    Args:
        curves: name to bins, as from `reliability`; the same number of them in each.
    """
    figure = _figure(5.0, 5.6)
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    top.plot([0.0, 1.0], [0.0, 1.0], color="0.6", linewidth=0.8, linestyle=":")
    for place, (color, (name, bins)) in enumerate(zip(_colors(len(curves)), curves.items(), strict=True)):
        filled = bins.n_cells > 0
        x, y, count = bins.confidence[filled], bins.accuracy[filled], bins.n_cells[filled]
        error = np.abs(y - x) @ count / max(1, count.sum())
        label = f"{_short(name)}: expected calibration error {error:.3f}"
        top.plot(x, y, color=color, linewidth=1.2, label=label)
        top.scatter(x, y, s=8.0 + 60.0 * np.sqrt(count / max(1, count.sum())), color=color)
        width = 1.0 / (len(bins.n_cells) * len(curves))
        left = np.arange(len(bins.n_cells)) / len(bins.n_cells) + place * width
        bottom.bar(left, bins.n_cells, width, align="edge", color=color)
    top.set_xlim(-0.02, 1.02)
    top.set_ylim(-0.02, 1.02)
    top.set_ylabel("share of cells that match their label")
    if curves:
        top.legend(frameon=False, loc="upper left", fontsize="small")
    most = max((int(bins.n_cells.max()) for bins in curves.values()), default=1)
    bottom.set_ylim(0.7, 2.0 * max(1, most))
    bottom.set_yscale("log")
    bottom.set_ylabel("cells")
    bottom.set_xlabel("probability of the assignment")
    for axes in (top, bottom):
        _bare(axes)
    return figure


def _say(axes: Axes, message: str) -> None:
    """Words where there is nothing to draw."""
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center")
    axes.set_xticks([])
    axes.set_yticks([])

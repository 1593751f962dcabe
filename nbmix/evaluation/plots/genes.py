"""Genes in the components."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from scipy.stats import gamma

from nbmix.evaluation.plots.style import (
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

LEAST_LOSS = 2.0  # nats; a gene that costs less has no count that is sure to be of the component
LARGEST_DOT = 90.0  # points squared
CDF_POINTS, CDF_DOTS = 400, 40


def log_mean_differences(
    log_mean: ArrayLike, names: Sequence[object] | None = None, shown: ArrayLike | None = None
) -> Figure:
    """Sorted differences of ln mu between each component and the mean over the others.

    d_kj = ln mu_kj - mean over l != k of ln mu_lj, sorted over the genes j. Two components have one
    difference, first minus second. A flat line at zero says that two components are the same.

    Args:
        log_mean: (components, genes); genes that are not finite in some component are left out.
        names: (components,) names, by default the indices.
        shown: indices of the components that take part; default all.
    """
    values = np.asarray(log_mean, dtype=np.float64)
    titles, colors, part = _taking_part(len(values), names, shown)
    values = values[part]
    values = values[:, np.isfinite(values).all(axis=0)]  # (components, genes)
    n_components, n_genes = values.shape

    figure = new_figure(6.8, 4.2)
    axes = figure.add_subplot()
    axes.set_xlabel("gene rank")
    axes.set_ylabel(r"difference in $\ln \mu$")
    open_frame(axes)
    if n_components < 2:
        say(axes, "one group: nothing to compare with")
        return figure

    differences = (values - values.mean(axis=0)) * (n_components / (n_components - 1))
    if n_components == 2:
        differences, titles = differences[:1], [f"{titles[0]} minus {titles[1]}"]
    axes.axhline(0.0, color="0.6", linewidth=0.8, zorder=1)
    colors = colors[: len(titles)]
    for color, difference in zip(colors, differences, strict=True):
        axes.plot(np.arange(1, n_genes + 1), np.sort(difference), color=color, linewidth=1.2)
    title = "group" if n_components == 2 else "group minus the others"
    side_legend(axes, [Line2D([], [], color=c, label=t) for c, t in zip(colors, titles, strict=True)], title)
    return figure


def marker_dots(
    genes: Sequence[object],
    marker_of: ArrayLike,
    log_mean: ArrayLike,
    share: ArrayLike | None = None,
    names: Sequence[object] | None = None,
    place: Place = None,
) -> Figure:
    """Markers (rows) over groups (columns): dots as large as the share of cells with a count.

    The colour is the mean of the gene in the group over that in the group where it is highest. The group that
    a gene is a marker of is framed.

    Args:
        genes: names.
        marker_of: (genes,) index of the group that each is a marker of.
        log_mean: (genes, groups) ln mu.
        share: (genes, groups) of the group's cells that have a count; None fills squares instead.
        names: (groups,) names, by default the indices.
        place: see ``style.Place``.
    """
    values = np.asarray(log_mean, dtype=np.float64)
    n_genes, n_groups = values.shape
    relative = np.exp(values - values.max(axis=1, keepdims=True))
    columns = [short_name(name) for name in (range(n_groups) if names is None else names)]
    height = 0.19 * max(n_genes, 13)  # of the axes: the legend and the bar below it need so much
    axes = axes_in(place, 3.6 + 0.26 * n_groups, height + 0.6 + 0.07 * max(map(len, columns)))
    drawn: ScalarMappable
    if share is None:
        drawn = axes.imshow(relative, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    else:
        drawn = _dots(axes, relative, np.asarray(share, dtype=np.float64))
    for row_of_gene, group in enumerate(np.asarray(marker_of)):
        corner = (group - 0.5, row_of_gene - 0.5)
        axes.add_patch(Rectangle(corner, 1.0, 1.0, facecolor="none", edgecolor="#d55e00", linewidth=0.9))
    axes.set(xlim=(-0.5, n_groups - 0.5), ylim=(n_genes - 0.5, -0.5), xlabel="group")
    axes.set_yticks(range(n_genes), [short_name(gene) for gene in genes], fontsize="small")
    name_columns(axes, columns)
    axes.tick_params(length=0)
    beside = axes.inset_axes((1.04, max(0.0, 1.0 - 2.4 / height), 0.03, 1.1 / height))
    bar = figure_of(axes).colorbar(drawn, cax=beside, ticks=[0.0, 0.5, 1.0])
    bar.set_label("mean, relative to\nthe highest group", fontsize="small")
    bar.ax.tick_params(labelsize="small")
    return figure_of(axes)


def _dots(axes: Axes, color: NDArray, share: NDArray) -> ScalarMappable:
    """Dots (rows, columns) with an area in proportion to ``share``, and their legend."""
    row, column = np.indices(share.shape)
    dots = axes.scatter(
        column.ravel(),
        row.ravel(),
        s=LARGEST_DOT * share.ravel(),
        c=color.ravel(),
        cmap="Blues",
        vmin=0.0,
        vmax=1.0,
        edgecolors="0.55",
        linewidths=0.4,
    )
    axes.legend(
        handles=[_share_of_cells(part) for part in (0.25, 0.5, 1.0)],
        title="% of cells\nwith a count",
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize="small",
        title_fontsize="small",
        alignment="left",
    )
    return dots


def _taking_part(
    n_components: int, names: Sequence[object] | None, shown: ArrayLike | None
) -> tuple[list[str], list[str], NDArray[np.int64]]:
    """Names, colours and indices of the components that are shown."""
    titles = [short_name(name) for name in (range(n_components) if names is None else names)]
    palette = component_colors(n_components)
    part = np.arange(n_components) if shown is None else np.asarray(shown, dtype=np.int64)
    return [titles[k] for k in part], [palette[k] for k in part], part


def _share_of_cells(share: float) -> Line2D:
    """Entry of a legend: a dot as large as ``marker_dots`` draws it."""
    size = (LARGEST_DOT * share) ** 0.5
    return Line2D([], [], marker="o", linestyle="", color="0.55", markersize=size, label=f"{share:.0%}")


def poisson_against_negative_binomial(
    poisson: ArrayLike,
    negative_binomial: ArrayLike,
    names: Sequence[object] | None = None,
    shown: ArrayLike | None = None,
) -> Figure:
    """Log likelihood of every gene under both fits, a panel a component: above the line cells vary.

    Axes are minus the log likelihood, logarithmic, and run from bad to good. Genes that are silent in the
    component, or nearly (`LEAST_LOSS`), are left out.

    Args:
        poisson, negative_binomial: (components, genes) nats, summed over the cells of the component.
        names: (components,) names, by default the indices.
        shown: indices of the components that have a panel; default all.
    """
    titles, colors, part = _taking_part(len(np.asarray(poisson)), names, shown)
    lost = [-np.asarray(values, dtype=np.float64)[part] for values in (poisson, negative_binomial)]
    heard = (lost[0] > LEAST_LOSS) & (lost[1] > LEAST_LOSS)  # (components, genes)
    n_components = heard.shape[0]
    columns = min(n_components, 5)
    rows = -(-n_components // columns)
    figure = new_figure(1.2 + 2.1 * columns, 0.9 + 2.2 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    low, high = 1.0, 10.0
    if heard.any():
        low = min(float(values[heard].min()) for values in lost) / 1.5
        high = max(float(values[heard].max()) for values in lost) * 1.5
    for axes in grid.flat[n_components:]:
        axes.set_visible(False)
    for k, (axes, color) in enumerate(zip(grid.flat[:n_components], colors, strict=True)):
        axes.plot([low, high], [low, high], color="0.4", linewidth=0.8, linestyle=":")
        x, y = (values[k, heard[k]] for values in lost)
        axes.scatter(x, y, s=2.5, color=color, alpha=0.25, linewidths=0.0, rasterized=True)
        axes.set(xscale="log", yscale="log", xlim=(high, low), ylim=(high, low))
        axes.minorticks_off()  # of thirty panels they take seconds
        axes.set_title(f"{titles[k]}\ngain {(x - y).sum():,.0f} nats", loc="left", fontsize="small")
        axes.tick_params(labelsize="small")
        open_frame(axes)
    figure.supxlabel("minus log likelihood, Poisson (nats)", fontsize="medium")
    figure.supylabel("minus log likelihood,\nnegative binomial (nats)", fontsize="medium", ma="center")
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
        counts: (cells,) x; at least one cell.
        size_factors: (cells,) s; cells with 0 are left out.
        groups: (cells,) index of the group of each cell: components, or labels with a fit of their own. A
            group without cells is left out.
        log_mean, log_inv_disp: (groups,) ln mu per unit of size factor, and ln r.
        names: (groups,) names, by default the indices.
    """
    sizes = np.asarray(size_factors, dtype=np.float64)
    filled = sizes > 0
    x, member = np.asarray(counts, dtype=np.float64)[filled], np.asarray(groups)[filled]
    ratio = x / sizes[filled]
    shape = np.exp(np.asarray(log_inv_disp, dtype=np.float64))
    scale = np.exp(np.asarray(log_mean, dtype=np.float64)) / shape
    titles, colors, part = _taking_part(shape.size, names, np.unique(member))
    handles = [Line2D([], [], color=color, label=title) for color, title in zip(colors, titles, strict=True)]
    figure = new_figure(5.6 + side_legend_width(handles), 5.0)
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 2))
    _count_histogram(top, x, short_name(gene))
    found = [np.sort(ratio[member == k]) for k in part]
    _gamma_and_empirical(bottom, found, shape[part], scale[part], colors)
    side_legend(bottom, handles, "group" if names is None else None)
    for axes in (top, bottom):
        open_frame(axes)
    return figure


def _count_histogram(axes: Axes, counts: NDArray, title: str) -> None:
    """Cells by their number of molecules (cells,), at most 60 bars."""
    most = int(counts.max(initial=0.0))
    width = most // 60 + 1
    edges = (np.arange(0, most + width + 1, width) - 0.5).tolist()
    axes.hist(counts, bins=edges, color="0.55")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("molecules in a cell", fontsize="small")
    axes.set_ylabel("cells")
    axes.set_title(title, loc="left", fontsize="medium")


def _gamma_and_empirical(
    axes: Axes, found: Sequence[NDArray], shape: NDArray, scale: NDArray, colors: Sequence[str]
) -> None:
    """Distribution functions of each group: Gamma(shape, scale), and of its sorted values ``found``."""
    # as far as the bulk of any group goes
    reach = float(gamma.ppf(0.99, shape, scale=scale).max())
    reach = max([reach, *(float(np.quantile(values, 0.95)) for values in found)])
    grid, at = np.linspace(0.0, reach, CDF_POINTS), np.linspace(0.0, reach, CDF_DOTS)
    for k, (values, color) in enumerate(zip(found, colors, strict=True)):
        axes.plot(grid, gamma.cdf(grid, shape[k], scale=scale[k]), color=color, linewidth=1.4)
        below = np.searchsorted(values, at, side="right") / values.size
        axes.plot(at, below, color=color, linestyle="", marker="o", markersize=2.2, alpha=0.8)
    axes.set_xlim(-0.01 * reach, reach)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(r"latent expression $\lambda$ (lines) and $x / s$ (dots), per unit of size factor")
    axes.set_ylabel("cumulative share of cells")

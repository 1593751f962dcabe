"""Genes in the components."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from scipy.stats import gamma

from nbmix.evaluation.plots.style import (
    component_colors,
    new_figure,
    open_frame,
    say,
    short_name,
    side_legend,
    side_legend_width,
)

LEAST_LOSS = 2.0  # nats; a gene that costs less has no count that is sure to be of the component
CDF_POINTS, CDF_DOTS = 400, 40


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
    titles = [short_name(name) for name in (range(n_components) if names is None else names)]

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
    colors = component_colors(len(titles))
    for color, difference in zip(colors, differences, strict=True):
        axes.plot(np.arange(1, n_genes + 1), np.sort(difference), color=color, linewidth=1.2)
    title = "group" if n_components == 2 else "group minus the others"
    side_legend(axes, [Line2D([], [], color=c, label=t) for c, t in zip(colors, titles, strict=True)], title)
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
    titles = [short_name(name) for name in (range(n_components) if names is None else names)]
    columns = min(n_components, 5)
    rows = -(-n_components // columns)
    figure = new_figure(1.2 + 2.1 * columns, 0.9 + 2.2 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    low, high = 1.0, 10.0
    if heard.any():
        low = min(float(values[heard].min()) for values in lost) / 1.5
        high = max(float(values[heard].max()) for values in lost) * 1.5
    for k, (axes, color) in enumerate(zip(grid.flat, component_colors(grid.size), strict=True)):
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
    titles = [short_name(name) for name in (range(shape.size) if names is None else names)]
    handles = [
        Line2D([], [], color=color, label=title)
        for color, title in zip(component_colors(shape.size), titles, strict=True)
    ]
    figure = new_figure(5.6 + side_legend_width(handles), 5.0)
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 2))
    _count_histogram(top, x, short_name(gene))
    _gamma_and_empirical(bottom, [np.sort(ratio[member == k]) for k in range(shape.size)], shape, scale)
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


def _gamma_and_empirical(axes: Axes, found: Sequence[NDArray], shape: NDArray, scale: NDArray) -> None:
    """Distribution functions of each group: Gamma(shape, scale), and of its sorted values ``found``."""
    # as far as the bulk of any group goes
    reach = float(gamma.ppf(0.99, shape, scale=scale).max())
    reach = max([reach, *(float(np.quantile(values, 0.95)) for values in found if values.size)])
    grid, at = np.linspace(0.0, reach, CDF_POINTS), np.linspace(0.0, reach, CDF_DOTS)
    for k, (values, color) in enumerate(zip(found, component_colors(len(found)), strict=True)):
        axes.plot(grid, gamma.cdf(grid, shape[k], scale=scale[k]), color=color, linewidth=1.4)
        if values.size:
            below = np.searchsorted(values, at, side="right") / values.size
            axes.plot(at, below, color=color, linestyle="", marker="o", markersize=2.2, alpha=0.8)
    axes.set_xlim(-0.01 * reach, reach)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(r"latent expression $\lambda$ (lines) and $x / s$ (dots), per unit of size factor")
    axes.set_ylabel("cumulative share of cells")

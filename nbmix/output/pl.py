"""Pictures of a fit that is in an AnnData, as scanpy draws them: ``nbmix.pl``.

Each draws what ``nbmix.cluster`` or ``train.py`` (result.h5ad) has written, by the function of
``nbmix.evaluation.plots`` that draws it in the report. Groups have the colours that scanpy gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nbmix.core.joins import Group
from nbmix.data.from_anndata import unique_names
from nbmix.errors import InputError, naming_the_nearest
from nbmix.evaluation import plots
from nbmix.evaluation.markers import top_markers
from nbmix.evaluation.plots.style import Place, component_colors
from nbmix.output.grouping import colors_of
from nbmix.output.groups import members

BASES = ("X_{key}_umap", "X_umap", "X_tsne", "X_pca")  # of the embedding, the first that is there


class _Fit(NamedTuple):
    """What an AnnData says of the groups of a fit.

    Attributes:
        adata, key: where it is.
        posterior: (cells, K) probabilities.
        names: (K,) of the groups; "" of those without cells.
        own: uns[key].
    """

    adata: ad.AnnData
    key: str
    posterior: NDArray[np.float64]
    names: list[str]
    own: dict[str, Any]

    @property
    def shown(self) -> list[int]:
        """Groups with cells."""
        return [k for k, name in enumerate(self.names) if name]

    @property
    def colors(self) -> list[str]:
        """(K,) of scanpy, where ``uns`` has one for each category of obs[key]; else those of nbmix."""
        usual = component_colors(len(self.names))
        known, groups = colors_of(self.adata, self.key), self.adata.obs[self.key]
        if not isinstance(groups.dtype, pd.CategoricalDtype) or len(known) != len(groups.cat.categories):
            return usual
        given = dict(zip(groups.cat.categories.astype(str), known, strict=True))
        found = [given.get(name, color) for name, color in zip(self.names, usual, strict=True)]
        return [color if is_color_like(color) else other for color, other in zip(found, usual, strict=True)]

    def table(self, name: str, remedy: str) -> pd.DataFrame:
        """A table of uns[key]."""
        self.check_is_fit()
        found = self.own.get(name)
        if not isinstance(found, pd.DataFrame) or not len(found):
            raise InputError(f"adata: uns[{self.key!r}] has no {name}; {remedy}")
        return found

    def check_is_fit(self) -> None:
        """Raise ``InputError`` where groups are those of a prediction or of ``nbmix.regroup``."""
        if f"{self.key}_log_mean" not in self.adata.varm:
            raise InputError(
                f"adata: lacks varm['{self.key}_log_mean'], which a fit of all genes has written; of groups "
                "by nbmix.regroup or nbmix.predict only embedding and sizes can be drawn: give a fit's key"
            )

    def number(self, group: object) -> int:
        """Of a group with cells, by its name or its first number; -1 of any other."""
        if str(group) in self.names:
            return self.names.index(str(group))
        return int(str(group)) if str(group) in map(str, self.shown) else -1


@naming_the_nearest
def embedding(
    adata: ad.AnnData,
    color: Literal["group", "probability"] = "group",
    *,
    basis: str | None = None,
    key: str = "nbmix",
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Cells in the plane, by group or by the probability of their group.

    Args:
        adata: with what ``nbmix.cluster`` or ``train.py`` (result.h5ad) has written.
        key: what the names of the fit begin with.
        ax: Matplotlib axes to draw into; default those of a new figure.
        show: whether to show the figure; default, as in scanpy, where ``ax`` is not given.
        color: "group", whose opacity is the probability; or "probability".
        basis: the coordinates in obsm, as "umap" or "X_umap"; default the first that is there of what nbmix
            has made, UMAP, t-SNE and PCA.

    Returns:
        The axes, or None where the figure was shown.

    >>> import anndata, nbmix
    >>> adata = anndata.AnnData(nbmix.simulate(n=200, p=50, k=2, seed=1).counts)
    >>> nbmix.cluster(adata, n_components=2, start="kmeans")
    >>> adata.obsm["X_pca"] = adata.X[:, :2].toarray()  # by scanpy.pp.pca
    >>> nbmix.pl.embedding(adata, basis="pca", show=False).get_xlabel()
    'PCA 1'
    """
    fit = _fit(adata, key)
    if color not in ("group", "probability"):
        raise InputError(f"color={color!r}: must be 'group' or 'probability'")
    name, points = _points(fit, basis)
    placed = np.isfinite(points).all(axis=1)
    points, posterior = points[placed], fit.posterior[placed]
    if color == "probability":
        return _draw(lambda place: plots.certainty_on_embedding(name, points, posterior, place), ax, show)
    shown = points, posterior, fit.names
    return _draw(lambda place: plots.groups_on_embedding(name, *shown, place, fit.colors), ax, show)


@naming_the_nearest
def markers(
    adata: ad.AnnData,
    n_genes: int | None = None,
    *,
    kind: Literal["dots", "matrix"] = "dots",
    layer: str | None = None,
    key: str = "nbmix",
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Marker genes (rows) over groups (columns).

    The colour is the fitted mean of the gene in a group over that in the group where it is highest. The group
    that a gene is a marker of is framed.

    Args:
        adata: with what ``nbmix.cluster`` or ``train.py`` (result.h5ad) has written.
        key: what the names of the fit begin with.
        ax: Matplotlib axes to draw into; default those of a new figure.
        show: whether to show the figure; default, as in scanpy, where ``ax`` is not given.
        n_genes: markers of each group; default as many as can be read.
        kind: "dots", whose size is the share of the group's cells with a count; or "matrix", without sizes.
        layer: where the counts are, for the dots; default X. Normalised or log counts do as well.

    Returns:
        The axes, or None where the figure was shown.

    >>> import anndata, nbmix
    >>> adata = anndata.AnnData(nbmix.simulate(n=200, p=50, k=2, seed=1).counts)
    >>> nbmix.cluster(adata, n_components=2, start="kmeans")
    >>> nbmix.pl.markers(adata, 3, show=False).get_xlabel()
    'group'
    """
    fit = _fit(adata, key)
    fit.check_is_fit()
    if kind not in ("dots", "matrix"):
        raise InputError(f"kind={kind!r}: must be 'dots' or 'matrix'")
    shown = [fit.names[k] for k in fit.shown]
    best = top_markers(fit.table("markers", "run nbmix.cluster, which finds them"), n_genes, shown)
    rows = unique_names(adata.var_names.astype(str)).get_indexer(best["gene"].astype(str))
    best, rows = best[rows >= 0], rows[rows >= 0]  # of genes that adata still has
    if not len(best):
        raise InputError(f"adata: has none of the marker genes in uns[{key!r}]['markers']")
    names = best["symbol" if "symbol" in best else "gene"].tolist()
    marker_of = best["component"].astype(str).map(shown.index)
    log_mean = np.asarray(adata.varm[f"{key}_log_mean"])[np.ix_(rows, fit.shown)]
    share = _shares(fit, rows, layer) if kind == "dots" else None
    return _draw(lambda place: plots.marker_dots(names, marker_of, log_mean, share, shown, place), ax, show)


@naming_the_nearest
def tree(
    adata: ad.AnnData, *, key: str = "nbmix", ax: Axes | None = None, show: bool | None = None
) -> Axes | None:
    """How components are joined to groups; the place of a join is the separation of its two sides.

    Args:
        adata: with what ``nbmix.cluster`` or ``train.py`` (result.h5ad) has written.
        key: what the names of the fit begin with.
        ax: Matplotlib axes to draw into; default those of a new figure.
        show: whether to show the figure; default, as in scanpy, where ``ax`` is not given.

    Returns:
        The axes, or None where the figure was shown.

    >>> import anndata, nbmix
    >>> adata = anndata.AnnData(nbmix.simulate(n=200, p=50, k=2, seed=1).counts)
    >>> nbmix.cluster(adata, n_components=2, max_umap_cells=0)
    >>> nbmix.pl.tree(adata, show=False) is not None
    True
    """
    fit = _fit(adata, key)
    table = fit.table("joins", "fit with folds of 2 or more, and draw before recluster")
    joins = [
        (members(row.first), members(row.second), float(row.separation), bool(row.gap))
        for row in table.itertuples()
    ]
    of_components = np.asarray(adata.obsm[f"X_{key}_components"])
    n_cells = np.bincount(of_components.argmax(axis=1), minlength=of_components.shape[1])
    groups: dict[str, Group] = {name: members(made) for name, made in fit.own["groups"].items()}
    return _draw(
        lambda place: plots.join_dendrogram(joins, n_cells, [*groups.values()], [*groups], place), ax, show
    )


@naming_the_nearest
def separations(
    adata: ad.AnnData, *, key: str = "nbmix", ax: Axes | None = None, show: bool | None = None
) -> Axes | None:
    """The separation of every two groups, in standard deviations; in brackets where there is no gap.

    Args:
        adata: with what ``nbmix.cluster`` or ``train.py`` (result.h5ad) has written.
        key: what the names of the fit begin with.
        ax: Matplotlib axes to draw into; default those of a new figure.
        show: whether to show the figure; default, as in scanpy, where ``ax`` is not given.

    Returns:
        The axes, or None where the figure was shown.

    >>> import anndata, nbmix
    >>> adata = anndata.AnnData(nbmix.simulate(n=200, p=50, k=2, seed=1).counts)
    >>> nbmix.cluster(adata, n_components=2, max_umap_cells=0)
    >>> len(nbmix.pl.separations(adata, show=False).images)
    1
    """
    fit = _fit(adata, key)
    table = fit.table("separations", "fit 2 groups or more, with folds of 2 or more")
    place_of = {k: place for place, k in enumerate(fit.shown)}
    first, second = (
        table[side].astype(str).map(lambda g: place_of.get(fit.number(g), -1)) for side in ("first", "second")
    )
    pairs = (first >= 0) & (second >= 0)
    if not pairs.any():
        raise InputError(f"adata: there are no two groups with cells in obs[{key!r}]")
    return _draw(
        lambda place: plots.separation_matrix(
            len(fit.shown),
            first[pairs],
            second[pairs],
            table.loc[pairs, "separation"],
            table.loc[pairs, "gap"],
            [fit.names[k] for k in fit.shown],
            place,
        ),
        ax,
        show,
    )


@naming_the_nearest
def sizes(
    adata: ad.AnnData, *, key: str = "nbmix", ax: Axes | None = None, show: bool | None = None
) -> Axes | None:
    """The number of cells of each group; in brackets the mean probability of their group.

    Args:
        adata: with what ``nbmix.cluster`` or ``train.py`` (result.h5ad) has written.
        key: what the names of the fit begin with.
        ax: Matplotlib axes to draw into; default those of a new figure.
        show: whether to show the figure; default, as in scanpy, where ``ax`` is not given.

    Returns:
        The axes, or None where the figure was shown.

    >>> import anndata, nbmix
    >>> adata = anndata.AnnData(nbmix.simulate(n=200, p=50, k=2, seed=1).counts)
    >>> nbmix.cluster(adata, n_components=2, max_umap_cells=0)
    >>> len(nbmix.pl.sizes(adata, show=False).patches)
    2
    """
    fit = _fit(adata, key)
    return _draw(lambda place: plots.component_sizes(fit.posterior, fit.names, place, fit.colors), ax, show)


@naming_the_nearest
def trace(
    adata: ad.AnnData, *, key: str = "nbmix", ax: Axes | None = None, show: bool | None = None
) -> Axes | None:
    """What the fit maximises, over its iterations, in nats per cell.

    Args:
        adata: with what ``nbmix.cluster`` or ``train.py`` (result.h5ad) has written.
        key: what the names of the fit begin with.
        ax: Matplotlib axes to draw into; default those of a new figure.
        show: whether to show the figure; default, as in scanpy, where ``ax`` is not given.

    Returns:
        The axes, or None where the figure was shown.

    >>> import anndata, nbmix
    >>> adata = anndata.AnnData(nbmix.simulate(n=200, p=50, k=2, seed=1).counts)
    >>> nbmix.cluster(adata, n_components=2, max_umap_cells=0)
    >>> len(nbmix.pl.trace(adata, show=False).lines)
    1
    """
    fit = _fit(adata, key)
    fit.check_is_fit()
    objective = np.atleast_1d(fit.own.get("objective", [])).astype(np.float64)
    if not objective.size:
        raise InputError(f"adata: uns[{key!r}] has no objective; run nbmix.cluster")
    first = max(int(fit.own.get("n_iterations", objective.size)) - objective.size, 0) + 1
    iterations = range(first, first + objective.size)
    return _draw(
        lambda place: plots.objective_trace(iterations, {"objective": objective.tolist()}, place), ax, show
    )


def _fit(adata: ad.AnnData, key: str) -> _Fit:
    if not isinstance(adata, ad.AnnData):
        raise InputError(f"adata is a {type(adata).__name__}; give the AnnData of a fit")
    if key not in adata.obs or f"X_{key}" not in adata.obsm:
        raise InputError(
            f"adata: has no obs[{key!r}] with obsm['X_{key}']; run nbmix.cluster, or name the fit by key"
        )
    posterior = np.asarray(adata.obsm[f"X_{key}"], dtype=np.float64)
    own = adata.uns.get(key)
    groups, number = adata.obs[key].astype(str).to_numpy(), posterior.argmax(axis=1)
    names = [""] * posterior.shape[1]
    for k in np.unique(number):
        found = np.unique(groups[number == k])
        if len(found) > 1 or found[0] in names:
            raise InputError(
                f"adata: obs[{key!r}] is not the group of the largest probability in obsm['X_{key}']; "
                "keep your own groups in another column"
            )
        names[k] = found[0]
    return _Fit(adata, key, posterior, names, own if isinstance(own, dict) else {})


def _points(fit: _Fit, basis: str | None) -> tuple[str, NDArray]:
    """Name and coordinates (cells, 2) of an embedding in obsm."""
    obsm = fit.adata.obsm
    if basis is None:
        bases = [name.format(key=fit.key) for name in BASES]
        remedy = "run scanpy.tl.umap, or name another one by basis"
    else:
        bases, remedy = [basis, f"X_{basis}"], f"it has {', '.join(map(repr, obsm)) or 'none'}"
    found = next((name for name in bases if name in obsm), None)
    if found is None:
        raise InputError(f"adata: obsm has none of {', '.join(bases)}; {remedy}")
    points = np.asarray(obsm[found])
    if points.ndim != 2 or points.shape[1] < 2:
        raise InputError(f"adata: obsm[{found!r}] has shape {points.shape}; needs 2 columns")
    name = found.removeprefix("X_").removeprefix(f"{fit.key}_")
    return {"umap": "UMAP", "tsne": "t-SNE", "pca": "PCA"}.get(name, name), points[:, :2]


def _shares(fit: _Fit, genes: NDArray[np.int64], layer: str | None) -> NDArray[np.float64]:
    """(genes, groups with cells) share of the cells of a group that have a count."""
    adata = fit.adata
    if layer is not None and layer not in adata.layers:
        raise InputError(f"layer={layer}: adata has the layers {', '.join(adata.layers) or '(none)'}")
    x = adata.X if layer is None else adata.layers[layer]
    if x is None:
        raise InputError("adata: has no X, which dots need; name a layer, or set kind='matrix'")
    some = sp.csc_array(x[:, genes])
    if some.data.size and some.data.min() < 0:
        raise InputError(
            "adata: X is scaled, which hides zeros; name a layer with counts, or set kind='matrix'"
        )
    number = fit.posterior.argmax(axis=1)
    member = sp.csr_array(np.equal.outer(fit.shown, number).astype(np.float64))  # (groups, cells)
    return ((member @ (some > 0)) / member.sum(axis=1)[:, None]).toarray().T


def _draw(draw: Callable[[Place], Figure], ax: Axes | None, show: bool | None) -> Axes | None:
    if ax is not None and not isinstance(ax, Axes):
        raise InputError(f"ax is a {type(ax).__name__}; give the axes of Matplotlib, one picture each")
    import matplotlib.pyplot as plt  # a display is looked for at its import

    if ax is None:
        axes = draw(plt.figure(layout="constrained")).axes[0]
    else:
        draw(axes := ax)
    if ax is None if show is None else show:
        plt.show()
        return None
    return axes

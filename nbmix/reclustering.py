"""One group of a fit clustered again, in its place among the others."""

from __future__ import annotations

import logging
import warnings
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd

from nbmix.data.counts import CountData
from nbmix.data.origins import CELLS_A_BATCH, FEWEST_CELLS
from nbmix.errors import InputError, refuse_unknown
from nbmix.estimator import NBMixture
from nbmix.output.editing import PROFILES, check_names, renew_markers, without_pairs
from nbmix.output.fitted_cells import fitted_cells, fitted_genes
from nbmix.output.grouping import Grouping, writable, write_grouping

LEAST_SHARE = 1e-6  # of a group in a cell outside it, below which it is divided as the group is

SIZES, BATCHES = "size_factor", "batch"

# of ``NBMixture``: what the first fit has settled
SETTLED = ("n_components", "layer", "size_factor_key", "prior_key", "batch_key")

log = logging.getLogger(__name__)


class _Parts(NamedTuple):
    """The new groups that a group is divided into.

    Attributes:
        shares: (cells, parts) of the group's probability in each cell; rows sum to 1.
        weights: (parts,) within the group, whose sum is 1.
        log_mean, log_inv_disp: (parts, genes) NaN for genes that are silent in the group.
    """

    shares: np.ndarray
    weights: np.ndarray
    log_mean: np.ndarray
    log_inv_disp: np.ndarray

    def only(self, kept: np.ndarray) -> _Parts:
        """The mixture without the other parts: what remains of shares and weights is scaled to sum to 1."""
        weights = self.weights[kept] / self.weights[kept].sum()
        shares = self.shares[:, kept]
        total = shares.sum(1, keepdims=True)
        shares = np.where(total > 0, shares / np.where(total > 0, total, 1), weights)
        return _Parts(shares, weights, self.log_mean[kept], self.log_inv_disp[kept])


def recluster(
    adata: ad.AnnData,
    group: str,
    n_groups: int | str = "auto",
    *,
    key: str = "nbmix",
    layer: str | None = None,
    copy: bool = False,
    **arguments: Any,
) -> ad.AnnData | None:
    """Split a group, in place, by a new fit of its cells alone.

    Group "3" becomes "3.0" (most cells), "3.1" and so on. The probability of "3.1" is the probability of "3"
    times that of "3.1" in the new mixture, for all cells, so that rows still sum to 1. As always, a cell is
    in the group of its largest probability. New groups that no cell is in are left out of the new mixture.
    Misfits and log likelihoods stay those of the first fit.

    The new groups do not consist of components of the first fit. So its joins, and the separations of "3"
    from others, are removed, and ``nbmix.regroup`` is refused from then on. Regroup first, or give
    ``copy=True``.

    Args:
        adata: with what ``nbmix.cluster`` or ``train.py`` (result.h5ad) has written, and the counts.
        group: the label of the group.
        n_groups: the number of new groups. With "auto", or a range such as "2-5", as many as have gaps
            between them.
        key: what the names of the fit begin with, or those of ``nbmix.regroup``.
        layer: where the counts are; default where the fit had them, if that is there, else X.
        copy: whether to write into a copy, and return it.
        arguments: arguments of ``NBMixture``, such as ``start`` and ``random_state``.

    Raises:
        InputError: the group does not exist or has too few cells, or there are no counts.

    Warns:
        UserWarning: the cells show no gap, or all are in one new group, so that the group stays one; or some
            new groups have no cells.

    >>> import anndata, nbmix
    >>> adata = anndata.AnnData(nbmix.simulate(n=300, p=80, k=3, seed=1).counts)
    >>> nbmix.cluster(adata, n_components=2, start="kmeans")
    >>> nbmix.recluster(adata, "0", 2, start="kmeans")
    >>> adata.obs["nbmix"].cat.categories.tolist(), adata.obsm["X_nbmix"].shape
    (['0.0', '0.1', '1'], (300, 3))
    """
    allowed = [name for name in NBMixture._get_param_names() if name not in SETTLED]
    refuse_unknown("recluster", arguments, [*allowed, "n_groups", "key", "layer", "copy"])
    before = Grouping.of(adata, key)
    place = before.position(group)
    adata = writable(adata, copy)
    cells = fitted_cells(adata, before.fit, layer)
    inside = before.codes == place
    if not inside.any():
        raise InputError(f"recluster: {group!r} has no cells")
    found = _divided(cells, inside, before.probabilities[:, place], n_groups, arguments)
    parts = _with_cells(found, before.probabilities, place)
    n_found, n_new = len(found.weights), len(parts.weights)
    if n_new < n_found or n_new == 1:
        warnings.warn(_fewer(group, n_found, n_new), stacklevel=2)
    if n_new == 1:
        return adata if copy else None
    labels = list(before.labels)
    labels[place : place + 1] = [f"{group}.{k}" for k in range(n_new)]
    check_names(labels)
    q = _in_place(before.probabilities, place, parts.shares)
    of_fit: dict[str, Any] = {}
    if before.is_of_fit:
        own, gone = adata.uns[key], {before.labels[place]}
        log_weights = np.asarray(own["log_weights"], dtype=np.float64)
        new = log_weights[place] + np.log(np.maximum(parts.weights, np.finfo(np.float64).tiny))
        of_fit = {
            "joins": None,
            "cuts": None,
            "log_weights": np.concatenate([log_weights[:place], new, log_weights[place + 1 :]]),
            "separations": without_pairs(own.get("separations"), before.labels, gone, labels),
        }
        adata.obsm.pop(f"X_{key}_components", None)
        _write_profiles(adata, key, place, parts)
    write_grouping(adata, before, q, labels, None, **of_fit)
    renew_markers(adata, key, layer)
    return adata if copy else None


def _divided(
    cells: CountData, inside: np.ndarray, share: np.ndarray, n_groups: int | str, arguments: dict[str, Any]
) -> _Parts:
    """The groups of a mixture of the cells of a group.

    Args:
        cells: of the first fit.
        inside: (cells,) whether they are of the group.
        share: (cells,) probability of the group.
        n_groups, arguments: see ``recluster``.
    """
    own = _as_anndata(cells.select_cells(np.flatnonzero(inside)))
    batch_key = BATCHES if _tells_batches(own) else None
    mixture = NBMixture(n_groups, size_factor_key=SIZES, batch_key=batch_key, **arguments).fit(own)
    weights = mixture.weights_ / mixture.weights_.sum()
    divided = np.tile(weights, (cells.n_cells, 1))
    divided[inside] = mixture.responsibilities_
    near = np.flatnonzero(~inside & (share > LEAST_SHARE))
    if near.size:
        divided[near] = mixture.predict_proba(_as_anndata(cells.select_cells(near)))
    return _Parts(divided, weights, mixture.log_mean_, mixture.log_inv_disp_)


def _in_place(q: np.ndarray, place: int, shares: np.ndarray) -> np.ndarray:
    """Probabilities (cells, groups) with that of one group divided."""
    return np.hstack([q[:, :place], q[:, [place]] * shares, q[:, place + 1 :]])


def _with_cells(parts: _Parts, q: np.ndarray, place: int) -> _Parts:
    """Those that some cell would be in, or the first alone."""
    codes = _in_place(q, place, parts.shares).argmax(1) - place
    kept = np.intersect1d(codes, np.arange(len(parts.weights)))
    if len(kept) == len(parts.weights):
        return parts
    return parts.only(kept if kept.size else np.array([0]))


def _fewer(group: str, n_found: int, n_new: int) -> str:
    """Why there are fewer new groups than one may expect."""
    if n_found == 1:
        stays = "it stays one group, unless n_groups is a number"
        return f"recluster: the cells of {group!r} show no gap; {stays}"
    if n_new == 1:
        return f"recluster: {group!r} stays one group: of {n_found} new groups only one would have cells"
    return f"recluster: of {n_found} new groups {n_new} have cells; the others are left out"


def _as_anndata(cells: CountData) -> ad.AnnData:
    obs = pd.DataFrame({SIZES: cells.size_factors}, index=cells.cell_names)
    if cells.origins is not None:
        obs[BATCHES] = np.array(cells.origin_names)[cells.origins]
    return ad.AnnData(cells.counts, obs, pd.DataFrame(index=cells.gene_names))


def _tells_batches(cells: ad.AnnData) -> bool:
    """Whether batches of some cells are many enough, and large enough, to be told apart."""
    if BATCHES not in cells.obs:
        return False
    sizes = cells.obs[BATCHES].value_counts()
    is_enough = sizes.min() >= FEWEST_CELLS and len(sizes) * CELLS_A_BATCH <= cells.n_obs
    if len(sizes) > 1 and not is_enough:
        log.warning("recluster: batches of a few cells each are not told apart within the group")
    return len(sizes) > 1 and bool(is_enough)


def _write_profiles(adata: ad.AnnData, key: str, place: int, parts: _Parts) -> None:
    """Columns of the new groups in that of the old one; genes silent in it are as they were."""
    new = dict(zip(PROFILES, (parts.log_mean, parts.log_inv_disp), strict=True))
    rows = fitted_genes(adata, key)
    for name, values in new.items():
        old = np.asarray(adata.varm[f"{key}_{name}"])
        columns = np.repeat(old[:, [place]], len(values), axis=1)
        columns[rows] = np.where(np.isfinite(values.T), values.T, columns[rows])
        adata.varm[f"{key}_{name}"] = np.hstack([old[:, :place], columns, old[:, place + 1 :]])

"""The cells of a fit, read again from the AnnData that holds its results, and what markers ask of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import torch

from nbmix.core.batch import Basis, Precision
from nbmix.core.folds import CELLS_A_BLOCK, by_origin, fold_shares
from nbmix.core.origins import OriginOffsets
from nbmix.core.parameters import Components
from nbmix.core.statistics import SufficientStatistics
from nbmix.data.arguments import settings_as_arguments
from nbmix.data.batches import CellBatches
from nbmix.data.counts import CountData
from nbmix.data.from_anndata import DEFAULT_SYMBOL_KEY, make_count_data
from nbmix.errors import InputError
from nbmix.output.grouping import Grouping


class GroupStatistics(NamedTuple):
    """What ``nbmix.evaluation.markers`` asks of groups: see ``find_markers``.

    Attributes:
        components: those of the groups, (K, genes); None where only their probabilities are known.
    """

    statistics: SufficientStatistics
    basis: Basis
    total_size: float
    components: Components | None


def fit_settings(adata: ad.AnnData, fit: str) -> Mapping[str, Any]:
    """How the cells of a fit were read, by the names in conf/data, as far as it is known."""
    try:
        config = json.loads(adata.uns[fit]["provenance"])["config"]
        return config.get("data", config)
    except (LookupError, TypeError, ValueError, AttributeError):
        return {}


def fitted_cells(adata: ad.AnnData, fit: str, layer: str | None = None) -> CountData:
    """The cells that are there, with the genes of the fit, its size factors and batches.

    Args:
        adata: with what the fit has written.
        fit: what its names begin with.
        layer: where the counts are; default where the fit had them, if that is there, else X.

    Raises:
        InputError: there are no counts, or not what the fit knew of its cells.
    """
    settings, means = fit_settings(adata, fit), adata.varm.get(f"{fit}_log_mean")
    if means is None:
        raise InputError(f"adata: lacks varm['{fit}_log_mean'], which the fit has written")
    if layer is None and settings.get("layer") in [*adata.layers, "raw.X"]:
        layer = settings["layer"]
    source = adata
    if layer == "raw.X":
        layer = None
        if adata.raw is not None and adata.var_names.isin(adata.raw.var_names).all():
            source = adata.raw[:, adata.var_names].to_adata()
    sizes = f"{fit}_size_factor"
    with settings_as_arguments():
        cells = make_count_data(
            source,
            where="adata",
            label_key=None,
            layer=layer,
            size_factor_key=sizes if sizes in adata.obs else settings.get("size_factor_key"),
            gene_symbol_key=settings.get("gene_symbol_key", DEFAULT_SYMBOL_KEY),
            batch_key=settings.get("batch_key"),
            min_counts=0,
        )
    return cells.select_genes(fitted_genes(adata, fit))


def fitted_genes(adata: ad.AnnData, fit: str) -> np.ndarray:
    """Positions of the genes that took part in a fit; others have NaN."""
    return np.flatnonzero(np.isfinite(np.asarray(adata.varm[f"{fit}_log_mean"])).all(1))


def group_statistics(adata: ad.AnnData, grouping: Grouping, cells: CountData) -> GroupStatistics:
    """Of all groups, weighted by the cells' probabilities; without the offsets of batches, if there are any.

    Args:
        adata: with what the fit has written.
        grouping: of its cells.
        cells: the same, from ``fitted_cells``.
    """
    basis = Basis.of(cells.counts, cells.size_factors, Precision.of(torch.float32))
    q = torch.from_numpy(np.ascontiguousarray(grouping.probabilities))
    cut, sizes = CellBatches(cells, basis), cells.size_factors
    parts = by_origin(np.arange(cells.n_cells), cells.origins)
    batches = (cut.batch(rows) for part in parts for rows in fold_shares(part, sizes[part], CELLS_A_BLOCK))
    offsets = _offsets(adata, grouping.fit, cells)
    if offsets is None:
        statistics = SufficientStatistics.zeros(basis, q.shape[1], "cpu")
        for batch in batches:
            statistics.add_batch_(batch, basis, q[batch.rows])
    else:
        origins = OriginOffsets(1, *offsets.shape)
        origins.offsets[-1] = offsets
        statistics, basis = origins.statistics(batches, basis, q)
    return GroupStatistics(statistics, basis, float(sizes.sum()), _components(adata, grouping))


def _offsets(adata: ad.AnnData, fit: str, cells: CountData) -> torch.Tensor | None:
    """(batches of the cells, genes)."""
    if cells.origins is None:
        return None
    known = [str(name) for name in adata.uns[fit].get("batches", ())]
    if new := [name for name in cells.origin_names if name not in known]:
        raise InputError(f"adata: the fit has not seen the batch {new[0]!r} of some cells; leave them out")
    places = [known.index(name) for name in cells.origin_names]
    return torch.from_numpy(_of_genes(adata, fit, "batch_offsets")[:, places].T.copy())


def _components(adata: ad.AnnData, grouping: Grouping) -> Components | None:
    if not grouping.is_of_fit:
        return None
    names = "log_mean", "log_inv_disp"
    return Components(*(torch.from_numpy(_of_genes(adata, grouping.fit, n).T.copy()) for n in names))


def _of_genes(adata: ad.AnnData, fit: str, name: str) -> np.ndarray:
    """(genes of the fit, columns) of varm."""
    values = np.asarray(adata.varm[f"{fit}_{name}"], dtype=np.float64)
    return values[fitted_genes(adata, fit)]

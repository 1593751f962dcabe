"""What a fit says of cells and genes, written into an AnnData."""

from __future__ import annotations

import json
import logging

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from nbmix.core.joins import group_log_joint
from nbmix.output.batches import batch_lines
from nbmix.output.groups import group_name, joins_table
from nbmix.output.report import TOP_MARKERS
from nbmix.output.results import Results, named_markers

log = logging.getLogger(__name__)


def add_fields(adata: ad.AnnData, key: str, results: Results, genes: ArrayLike | None = None) -> None:
    """Write the fields that result.h5ad and ``nbmix.cluster``, which lists them, have in common.

    Args:
        adata: the cells of ``results``, in their order.
        key: what names begin with.
        results: of a fit, or of new cells.
        genes: (genes of ``results``,) their positions in ``adata``, whose other genes get NaN; None where
            there are no others.
    """
    q, groups = results.responsibilities, results.groups
    adata.obs[key] = pd.Categorical.from_codes(results.assignments, [str(k) for k in range(q.shape[1])])
    adata.obs[f"{key}_probability"] = q.max(1)
    adata.obs[f"{key}_log_likelihood"] = results.cells.log_likelihood.numpy()
    adata.obsm[f"X_{key}"] = q
    for name, values in results.profiles._asdict().items():  # (K, genes of the results)
        of_all = np.full((adata.n_vars, q.shape[1]), np.nan)
        of_all[slice(None) if genes is None else np.asarray(genes)] = values.T.numpy()
        adata.varm[f"{key}_{name}"] = of_all
    adata.uns[key] = {
        "model": results.model.kind,
        "log_weights": group_log_joint(results.log_weights, groups),
        "groups": {str(k): group_name(group) for k, group in enumerate(groups)},
        "objective": np.array(results.model.objective, dtype=np.float64),
        "provenance": json.dumps(results.provenance, default=repr),
    }
    origins = results.model.mixture.origins
    if origins is not None:
        adata.uns[key]["batches"] = np.array(results.model.origin_names)
        offsets = np.full((adata.n_vars, origins.n_origins), np.nan)
        offsets[slice(None) if genes is None else np.asarray(genes)] = origins.offsets[-1].cpu().numpy().T
        adata.varm[f"{key}_batch_offsets"] = offsets
    if results.joins is not None:
        adata.obsm[f"X_{key}_components"] = results.of_components
        adata.uns[key] |= {"joins": joins_table(results.joins), "cuts": json.dumps(results.joins.cuts)}
    if results.separations is not None:
        adata.uns[key]["separations"] = results.separations


def annotate(adata: ad.AnnData, key: str, results: Results, genes: ArrayLike) -> None:
    """Write all that ``nbmix.cluster`` says: the same fields, iterations, markers, and the choice of K.

    What is to be said of groups and batches goes into the log, too.

    Args:
        adata, key, results, genes: see ``add_fields``.
    """
    lines = batch_lines(results, adata.obs)  # before groups are among its columns
    add_fields(adata, key, results, genes)
    table = named_markers(results)
    adata.uns[key] |= {
        "n_iterations": results.model.n_iterations,
        "markers": table[table["rank"] <= TOP_MARKERS].reset_index(drop=True),
    }
    if results.choice is not None:
        adata.uns[key]["choice"] = results.choice.table()
    if lines:
        adata.uns[key]["remarks"] = np.array(lines)
    for line in lines:
        log.warning("%s", line)


def own_result(results: Results) -> ad.AnnData:
    """Counts that are in memory, with what nbmix itself knows of cells and genes, as in result.h5ad.

    Beside the fields of ``add_fields``, all beginning with "nbmix",

        obs["nbmix_held_out"]       whether the cell was held out of the fit
        obs["nbmix_size_factor"]    its size factor
        obs["cell_type"]            known labels, where there are any
    """
    data = results.data.data
    own = ad.AnnData(
        None if data.is_backed else data.counts,
        obs=pd.DataFrame(index=data.cell_names),
        var=pd.DataFrame(index=data.gene_names),
    )
    add_fields(own, "nbmix", results)
    own.obs["nbmix_held_out"] = np.isin(np.arange(data.n_cells), results.data.validation_rows)
    own.obs["nbmix_size_factor"] = data.size_factors
    if data.labels is not None:
        names, codes = np.unique(data.labels, return_inverse=True)
        own.obs["cell_type"] = pd.Categorical.from_codes(codes, names)
    return own

"""What a fit says, written into an AnnData by the names that result.h5ad has."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd

from nbmix.output.report import TOP_MARKERS
from nbmix.output.results import Results, named_markers
from nbmix.starts.choice import Choice


def annotate(
    adata: ad.AnnData, key: str, results: Results, genes: np.ndarray, choice: Choice | None = None
) -> None:
    """Write groups, posteriors, components, markers and provenance; see ``nbmix.cluster``.

    Args:
        adata: the cells of ``results``, in their order.
        key: what the names begin with.
        results: of a fit.
        genes: positions in ``adata`` of the genes that were fitted; the others get NaN.
        choice: of the number of components, where it was left open.
    """
    model, q = results.model, results.responsibilities
    table = named_markers(results)
    adata.obs[key] = pd.Categorical.from_codes(results.assignments, [str(k) for k in range(q.shape[1])])
    adata.obs[f"{key}_probability"] = q.max(1)
    adata.obs[f"{key}_log_likelihood"] = results.cells.log_likelihood.numpy()
    adata.obsm[f"X_{key}"] = q
    for name, values in model.mixture.components()._asdict().items():  # (K, fitted genes)
        of_all = np.full((adata.n_vars, len(values)), np.nan)
        of_all[genes] = values.T.numpy()
        adata.varm[f"{key}_{name}"] = of_all
    adata.uns[key] = {
        "model": model.kind,
        "log_weights": model.mixture.log_weights.data[-1].numpy(),
        "objective": np.array(model.objective, dtype=np.float64),
        "n_iterations": model.n_iterations,
        "markers": table[table["rank"] <= TOP_MARKERS].reset_index(drop=True),
        "provenance": json.dumps(results.provenance, default=repr),
    }
    if choice is not None:
        adata.uns[key]["choice"] = choice.table()

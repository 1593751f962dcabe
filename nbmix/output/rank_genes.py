"""Markers in the form of scanpy's ``rank_genes_groups``, so that its tables and dot plots work."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nbmix.output.results import Results

UNKNOWN = 0.5  # false sign rate of a gene of which nothing is known


def rank_genes_groups(
    results: Results, groupby: str, gene_names: np.ndarray, genes: ArrayLike | None = None
) -> dict[str, Any] | None:
    """Every group with cells against all other cells, all genes, the best marker first; None of one group.

        names              gene
        scores             what genes are ranked by, see ``nbmix.evaluation.markers.Markers.score``
        logfoldchanges     log2, posterior mean
        pvals, pvals_adj   both the local false sign rate, which needs no correction for many genes

    Each is a record array with a field for each group.

    Args:
        results: of a fit, or of new cells.
        groupby: column of obs with the groups.
        gene_names: (all genes,).
        genes: (genes of ``results``,) their positions among them; the others come last, as unknown: fold
            change 0, the lowest score. None: there are no others.
    """
    filled = np.unique(results.assignments)
    if len(results.groups) == 1:
        return None
    markers = results.markers
    n_genes = len(gene_names)
    here = np.arange(n_genes) if genes is None else np.asarray(genes)
    others = np.setdiff1d(np.arange(n_genes), here)
    columns: dict[str, list[np.ndarray]] = {}
    for k in filled.tolist():
        score = markers.score[k].numpy()
        order = np.argsort(-score, kind="stable")  # that of the table of markers
        fold_change = markers.from_rest.log2_fold_change[k].numpy()[order]
        false_sign_rate = markers.from_rest.false_sign_rate[k].numpy()[order]
        for name, known, unknown in (
            ("names", gene_names[here[order]], gene_names[others]),
            ("scores", score[order].astype(np.float32), np.full(others.size, score.min(), np.float32)),
            ("logfoldchanges", fold_change.astype(np.float32), np.zeros(others.size, np.float32)),
            ("pvals", false_sign_rate, np.full(others.size, UNKNOWN)),
        ):
            columns.setdefault(name, []).append(np.concatenate([known, unknown]))
    labels = [str(k) for k in filled]
    ranked: dict[str, Any] = {
        name: np.rec.fromarrays(values, dtype=[(label, _kind(values[0])) for label in labels])
        for name, values in columns.items()
    }
    ranked["pvals_adj"] = ranked["pvals"].copy()
    ranked["params"] = {
        "groupby": groupby,
        "reference": "rest",
        "method": "nbmix",
        "use_raw": False,
        "corr_method": "none: local false sign rates",
    }
    return ranked


def _kind(values: np.ndarray) -> Any:
    return values.dtype if values.dtype.kind == "f" else object

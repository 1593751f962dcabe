"""Markers in the form of scanpy's ``rank_genes_groups``, so that its tables and dot plots work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nbmix.evaluation.markers import Markers

UNKNOWN = 0.5  # false sign rate of a gene of which nothing is known


def rank_genes_groups(
    markers: Markers,
    labels: Mapping[int, str],
    groupby: str,
    gene_names: np.ndarray,
    genes: ArrayLike | None = None,
) -> dict[str, Any]:
    """Groups against all other cells, all genes, the best marker first.

        names              gene
        scores             what genes are ranked by, see ``nbmix.evaluation.markers.Markers.score``
        logfoldchanges     log2, posterior mean
        pvals, pvals_adj   both the local false sign rate, which needs no correction for many genes

    Each is a record array with a field for each group.

    Args:
        markers: of two groups or more.
        labels: of the groups that are wanted, by their numbers.
        groupby: column of obs with these labels.
        gene_names: (all genes,).
        genes: (genes of ``markers``,) their positions among them; the others come last, as unknown: fold
            change 0, the lowest score. None: there are no others.
    """
    here = np.arange(len(gene_names)) if genes is None else np.asarray(genes)
    others = np.setdiff1d(np.arange(len(gene_names)), here)
    columns: dict[str, list[np.ndarray]] = {}
    for k in labels:
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
    ranked: dict[str, Any] = {
        name: np.rec.fromarrays(values, dtype=[(label, _kind(values[0])) for label in labels.values()])
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

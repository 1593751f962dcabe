"""Fold changes between any groups of a fit that is there already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from nbmix.errors import InputError, naming_the_nearest
from nbmix.evaluation.markers import compare_sets, comparison_table
from nbmix.output.fitted_cells import fitted_cells, group_statistics
from nbmix.output.grouping import REST, Grouping
from nbmix.output.results import with_symbols


@naming_the_nearest
def compare(
    adata: ad.AnnData,
    groups: str | Sequence[str],
    reference: str | Sequence[str] = REST,
    *,
    key: str = "nbmix",
    layer: str | None = None,
) -> pd.DataFrame:
    """Compare the genes of a group, or of several seen as one, with those of others.

    Fold changes are posterior means of ln mu with what is known of every group taken into account, see
    ``nbmix.evaluation.markers``; where the fit knows batches they are within batches. Cells count by
    their probabilities. Counts are read again, and the cells may be fewer than those of the fit.

        rank                    the best marker of ``groups`` first
        gene, symbol            symbols where there are any
        log_mean, log_mean_se   ln mu of ``groups`` per unit of size factor, and its standard error
        share, share_reference  of the cells of either with a count
        ln_fc, ln_fc_se         natural logarithm of the fold change, ``groups`` over ``reference``
        log2_fc, lfsr           binary logarithm, and the probability that its sign is wrong

    Args:
        adata: with what ``nbmix.cluster`` or ``train.py`` (result.h5ad) has written, and the counts.
        groups: the label of a group, or a list of labels.
        reference: a label or a list of labels; "rest" stands for all other groups.
        key: what the names of the fit begin with, or those of ``nbmix.regroup``.
        layer: where the counts are; default where the fit had them, if that is there, else X.

    Returns:
        The table, with a row for each gene.

    Raises:
        InputError: a group does not exist, has no cells, or is on both sides; or there are no counts.

    >>> import anndata, nbmix
    >>> adata = anndata.AnnData(nbmix.simulate(n=300, p=80, k=3, seed=1).counts)
    >>> nbmix.cluster(adata, n_components=3, start="kmeans")
    >>> nbmix.compare(adata, "1", ["0", "2"])[["rank", "log2_fc", "ln_fc_se", "lfsr"]].shape
    (80, 4)
    """
    grouping = Grouping.of(adata, key)
    first = _positions(grouping, groups, reference)
    second = _positions(grouping, reference, groups)
    if both := set(first) & set(second):
        raise InputError(
            f"compare: group {grouping.labels[both.pop()]!r} is on both sides; leave it out of one"
        )
    for positions in (first, second):
        if not np.isin(grouping.codes, positions).any():
            names = ", ".join(grouping.labels[k] for k in positions)
            raise InputError(f"compare: {names or 'the rest'} has no cells, which says nothing of its genes")
    cells = fitted_cells(adata, grouping.fit, layer)
    known = group_statistics(adata, grouping, cells)
    found = compare_sets(known.statistics, known.basis, known.total_size, (first, second), known.components)
    return with_symbols(comparison_table(found, cells.gene_names), cells)


def _positions(grouping: Grouping, groups: Any, others: Any) -> list[int]:
    if not isinstance(groups, str) or groups != REST:
        return grouping.positions(groups)
    if isinstance(others, str) and others == REST:
        raise InputError("compare: both sides are the rest; name the groups of one")
    named = grouping.positions(others)
    return [k for k in range(len(grouping.labels)) if k not in named]

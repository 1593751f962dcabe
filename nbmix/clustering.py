"""The Python face with scanpy's habits: ``cluster`` fits an AnnData and writes into it what comes of it."""

from __future__ import annotations

from typing import Any

import anndata as ad

from nbmix.core.declared import check_value, declared
from nbmix.data.arguments import settings_as_arguments
from nbmix.errors import InputError, refuse_unknown
from nbmix.estimator import RENAMED, NBMixture
from nbmix.evaluation.embedding import MOST_UMAP_CELLS, embed
from nbmix.output.annotate import annotate
from nbmix.output.grouping import writable
from nbmix.output.results import Results
from nbmix.training.provenance import provenance


def cluster(
    adata: ad.AnnData,
    n_components: int | str = 4,
    *,
    key_added: str = "nbmix",
    copy: bool = False,
    max_umap_cells: int = MOST_UMAP_CELLS,
    **arguments: Any,
) -> ad.AnnData | None:
    """Find groups of cells in an AnnData, by a mixture of negative binomials of their raw counts.

    The results are written into ``adata``, with the same names as in ``result.h5ad`` of ``train.py``. Where
    ``key_added`` is another word, it stands in the place of "nbmix":

        obs["nbmix"]                   group of the largest responsibility, "0" (most cells) to "K - 1"
        obs["nbmix_probability"]       that responsibility
        obs["nbmix_log_likelihood"]    ln p(x_i) in nats
        obs["nbmix_held_out"]          whether the cell was held out of the fit; here none is
        obs["nbmix_size_factor"]       molecules that its rates are multiplied by
        obs["nbmix_second"]            group of the second largest responsibility
        obs["nbmix_margin"]            ln of the largest less ln of the second, nats
        obs["nbmix_ambiguous"]         whether that is below ln 9
        obs["nbmix_misfit"]            by how many nats the average cell, or one half of it, explains the cell
                                       better than all groups, see ``nbmix.evaluation.doubt``
        obs["nbmix_fits_no_group"]     whether that is ln 1000 or more
        obsm["X_nbmix"]                (cells, K) responsibilities; see ``NBMixture.responsibilities_``
        obsm["X_nbmix_components"]     (cells, C) responsibilities of the components, where there are joins
        obsm["X_nbmix_umap"]           (cells, 2) UMAP of the counts, or "X_nbmix_pca" their PCA beyond
                                       ``max_umap_cells``; NaN for cells that are too many for a picture
        varm["nbmix_log_mean"]         (genes, K) ln mu; NaN for genes without a count
        varm["nbmix_log_inv_disp"]     (genes, K) ln r
        varm["nbmix_batch_offsets"]    (genes, batches) ln offset, where there are batches
        uns["nbmix"]                   model, log_weights, objective (trace), n_iterations, converged, and as
                                       JSON in provenance the arguments and versions; and in it
            "markers"                  table of the best markers of each group, as in markers.csv, see
                                       ``nbmix.evaluation.markers.marker_table``; its components are
                                       groups, as in obs["nbmix"]
            "choice"                   where K was left open, see ``NBMixture.choice_``
            "remarks"                  lines, which are also logged as warnings, on groups nearly all of whose
                                       cells are of one batch; without ``batch_key``, on a column of obs that
                                       may be one of batches, since it tells two groups apart
            "labels"                   labels of the groups, in the order of columns
            "groups"                   the components of each group, as in 0+3
            "joins"                    how components are joined to groups, see ``NBMixture.joins_``;
                                       ``nbmix.regroup`` makes other groups of them
            "separations"              what is between every pair of groups
            "fit"                      what ``nbmix.predict`` and ``NBMixture.load`` need for new cells
        uns["nbmix_rank_genes_groups"] all markers, in the form of scanpy's ``rank_genes_groups``
        uns["nbmix_colors"]            (K,) the groups' colours, in which scanpy and ``nbmix.pl`` draw them

    The markers in scanpy's form and the UMAP are also in ``uns["rank_genes_groups"]`` and ``obsm["X_umap"]``,
    where scanpy looks for them, unless something else is there. Results of an earlier fit with the same
    ``key_added`` are removed.

    Args:
        adata: (cells, genes) with raw counts in X, or in ``layer``.
        n_components: K, the number of groups; or "auto", up to 12, or a range such as "2-10": as many as have
            gaps.
        key_added: what the names of the results begin with.
        copy: whether to write into a copy, and return it.
        max_umap_cells: the embedding is a UMAP, which takes time, up to so many cells, and a PCA beyond.
            With 0 it is always a PCA.
        arguments: all other arguments of ``NBMixture``, such as ``layer``, ``batch_key``, ``start`` and
            ``random_state``.

    Returns:
        None, or with ``copy`` the changed copy.

    Raises:
        InputError: counts that are not raw counts, or a setting that cannot be used.

    Warns:
        ConvergenceWarning: EM reached ``max_iter`` before it converged.

    >>> import anndata, nbmix
    >>> adata = anndata.AnnData(nbmix.simulate(n=200, p=50, k=2, seed=1).counts)
    >>> nbmix.cluster(adata, n_components=2, start="kmeans")
    >>> adata.obs["nbmix"].cat.categories.tolist(), adata.obsm["X_nbmix"].shape
    (['0', '1'], (200, 2))
    >>> markers = adata.uns["nbmix"]["markers"]
    >>> markers[markers["rank"] == 1][["component", "share"]].shape
    (2, 2)
    """
    if not isinstance(adata, ad.AnnData):
        raise InputError(f"adata is a {type(adata).__name__}; for other data use nbmix.NBMixture")
    if not isinstance(key_added, str) or not key_added or "/" in key_added:
        raise InputError(
            f"key_added={key_added!r}: must be a text without '/', which files cannot have in names"
        )
    is_copied = copy and adata.isbacked
    if adata.isbacked:  # what cannot be written to, before the fit
        adata = writable(adata, copy)
    own = ("key_added", "copy", "max_umap_cells")
    refuse_unknown("cluster", arguments, [*NBMixture._get_param_names(), *own])
    check_value("max_umap_cells", max_umap_cells, declared(embed)["max_umap_cells"])
    mixture = NBMixture(n_components, **arguments)
    with settings_as_arguments(RENAMED), mixture._shown():
        fitted = mixture._fit(adata, None, None, None)
        if copy and not is_copied:
            adata = adata.copy()
        made_by = provenance(mixture.get_params(deep=False))
        results = Results(*fitted, made_by, max_umap_cells, mixture._plain_arguments())
        annotate(adata, key_added, results, mixture._taking_part)
    return adata if copy else None

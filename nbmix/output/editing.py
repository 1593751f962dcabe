"""Groups of a fit merged and renamed, with all that follows from them.

    obs        the group, its probability, the second one, margin and ambiguity
    obsm       probabilities; those of components stay
    varm       ln mu and ln r of each group
    uns        labels, components and weights of groups; markers, of all groups anew; separations, but for
               those of groups that are no more; tables of ranked genes in scanpy's form.
               Joins are of components, and stay

Log likelihoods and misfits are of the mixture, whatever its groups, and stay as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from nbmix.core.joins import Group, group_components, group_log_joint, group_probabilities
from nbmix.errors import InputError, naming_the_nearest
from nbmix.evaluation.markers import find_markers
from nbmix.output.fitted_cells import fitted_cells, fitted_genes, group_statistics
from nbmix.output.grouping import REST, Grouping, with_labels, writable, write_grouping
from nbmix.output.rank_genes import rank_genes_groups
from nbmix.output.report import TOP_MARKERS
from nbmix.output.results import markers_with_names

PROFILES = ("log_mean", "log_inv_disp")  # of groups, in varm


@naming_the_nearest
def merge(
    adata: ad.AnnData,
    groups: Sequence[str],
    *,
    name: str | None = None,
    key: str = "nbmix",
    layer: str | None = None,
    copy: bool = False,
) -> ad.AnnData | None:
    """Join several groups to one, in place. The probability of the new group is the sum of theirs.

    ``nbmix.regroup`` still cuts the joins of the fit as before, and takes labels from the groups as they are
    now. Asked for as many groups as there are, it gives the groups as they are.

    Args:
        adata: with what ``nbmix.cluster`` or ``train.py`` (result.h5ad) has written.
        groups: the labels of two groups or more.
        name: the label of the new group; default the label of the group with most cells.
        key: what the names of the fit begin with, or those of ``nbmix.regroup``.
        layer: where the counts are, from which markers are found anew; default where the fit had them.
        copy: whether to write into a copy, and return it.

    Raises:
        InputError: a group does not exist, or another group has the name.

    Warns:
        UserWarning: there are no counts, so the markers are removed.

    >>> import anndata, nbmix
    >>> adata = anndata.AnnData(nbmix.simulate(n=300, p=80, k=3, seed=1).counts)
    >>> nbmix.cluster(adata, n_components=3, start="kmeans")
    >>> nbmix.merge(adata, ["1", "2"], name="others")
    >>> adata.obs["nbmix"].cat.categories.tolist(), adata.obsm["X_nbmix"].shape
    (['0', 'others'], (300, 2))
    """
    before = Grouping.of(adata, key)
    chosen = sorted(before.positions(groups))
    if len(chosen) < 2:
        raise InputError(f"groups={groups}: name two groups or more to merge")
    n_cells = np.bincount(before.codes, minlength=len(before.labels))
    largest = max(chosen, key=lambda k: n_cells[k])
    parts: list[Group] = [
        tuple(chosen) if k == largest else (k,)
        for k in range(len(before.labels))
        if k == largest or k not in chosen
    ]
    label = before.labels[largest] if name is None else name
    others = [before.labels[k] for k in range(len(before.labels)) if k not in chosen]
    check_names([*others, label])
    labels = [label if largest in part else before.labels[part[0]] for part in parts]
    adata = writable(adata, copy)
    components = None
    if before.components is not None:
        of_groups = [[before.components[before.labels[k]] for k in part] for part in parts]
        components = {label: _sum(names) for label, names in zip(labels, of_groups, strict=True)}
    of_fit: dict[str, Any] = {}
    if before.is_of_fit:
        gone = {before.labels[k] for k in chosen}
        of_fit = _merged_profiles(adata, key, parts)
        of_fit["separations"] = without_pairs(adata.uns[key].get("separations"), before.labels, gone, labels)
    q = group_probabilities(before.probabilities, parts)
    write_grouping(adata, before, q, labels, components, **of_fit)
    renew_markers(adata, key, layer)
    return adata if copy else None


@naming_the_nearest
def rename(
    adata: ad.AnnData, names: Mapping[str, str], *, key: str = "nbmix", copy: bool = False
) -> ad.AnnData | None:
    """Give groups other labels, in place, in all results of the fit.

    Args:
        adata: with what ``nbmix.cluster`` or ``train.py`` (result.h5ad) has written.
        names: a dict from present to new labels; other groups keep theirs.
        key: what the names of the fit begin with, or those of ``nbmix.regroup``.
        copy: whether to write into a copy, and return it.

    Raises:
        InputError: a group does not exist, or two groups would have the same label (``nbmix.merge`` joins
            them).

    >>> import anndata, nbmix
    >>> adata = anndata.AnnData(nbmix.simulate(n=300, p=80, k=2, seed=1).counts)
    >>> nbmix.cluster(adata, n_components=2, start="kmeans")
    >>> nbmix.rename(adata, {"0": "CD4 T"})
    >>> adata.obs["nbmix"].cat.categories.tolist()
    ['CD4 T', '1']
    """
    before = Grouping.of(adata, key)
    places = {before.position(old): new for old, new in names.items()}
    labels = [places.get(k, label) for k, label in enumerate(before.labels)]
    check_names(labels)
    adata = writable(adata, copy)
    components = before.components
    if components is not None:
        components = dict(zip(labels, components.values(), strict=True))
    of_fit: dict[str, Any] = {}
    if before.is_of_fit:
        new = dict(zip(before.labels, labels, strict=True))
        for table, columns in (("markers", ("component", "nearest")), ("separations", ("first", "second"))):
            if table in adata.uns[key]:
                of_fit[table] = _relabelled(adata.uns[key][table], columns, new)
    write_grouping(adata, before, before.probabilities, labels, components, **of_fit)
    _follow_ranks(adata, key, dict(zip(before.labels, labels, strict=True)))
    return adata if copy else None


def check_names(labels: Sequence[Any]) -> None:
    """Raise ``InputError`` where labels cannot be those of groups."""
    for label in labels:
        if not isinstance(label, str) or not label.strip() or "/" in label or label == REST:
            raise InputError(
                f"name={label!r}: must be a text without '/', which files cannot have in names, and not "
                f"{REST!r}"
            )
    twice = [label for k, label in enumerate(labels) if label in labels[:k]]
    if twice:
        raise InputError(
            f"name={twice[0]!r}: two groups would have it; choose another, or make one group of them by "
            "nbmix.merge"
        )


def renew_markers(adata: ad.AnnData, key: str, layer: str | None = None) -> None:
    """Find markers anew for groups that are other ones, where a fit has any; without counts they go.

    With them go nbmix's tables in scanpy's form.
    """
    ranked = [name for name, table in _ranked(adata, key) if table["params"].get("method") == "nbmix"]
    for name in ranked:
        del adata.uns[name]
    if "markers" not in adata.uns[key]:
        return
    grouping = Grouping.of(adata, key)
    own = dict(adata.uns[key])
    try:
        cells = fitted_cells(adata, grouping.fit, layer)
        found = find_markers(*group_statistics(adata, grouping, cells))
        table = markers_with_names(found, cells, grouping.codes)
        table = with_labels(table, grouping.labels, ("component", "nearest"))
        own["markers"] = table[table["rank"] <= TOP_MARKERS].reset_index(drop=True)
        filled = {k: grouping.labels[k] for k in np.unique(grouping.codes).tolist()}
        if ranked and len(grouping.labels) > 1:
            names, genes = adata.var_names, fitted_genes(adata, grouping.fit)
            new = rank_genes_groups(found, filled, key, names.to_numpy(), genes)
            adata.uns |= dict.fromkeys(ranked, new)
    except InputError as error:
        del own["markers"]
        warnings.warn(f"uns[{key!r}] has no markers any more: {error}", stacklevel=3)
    adata.uns[key] = own


def _follow_ranks(adata: ad.AnnData, key: str, new: Mapping[str, str]) -> None:
    """Give groups in tables of scanpy's form, whose fields they are, their new labels, by earlier ones."""
    for name, table in _ranked(adata, key):
        adata.uns[name] = {entry: _with_fields(values, new) for entry, values in table.items()}


def _ranked(adata: ad.AnnData, key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Tables of ``rank_genes_groups`` of a column of obs, by their names."""
    found = []
    for name, table in adata.uns.items():
        params = table.get("params") if isinstance(table, Mapping) else None
        if isinstance(params, Mapping) and params.get("groupby") == key:
            found.append((name, table))
    return found


def _with_fields(values: Any, new: Mapping[str, str]) -> Any:
    fields = getattr(getattr(values, "dtype", None), "names", None)
    if fields is None:
        return values
    # another type: copies of an array share one, so that other tables would be renamed as well
    kinds = [(new.get(label, label), values.dtype[label]) for label in fields]
    return np.rec.fromarrays([values[label] for label in fields], dtype=kinds)


def _sum(names: Sequence[str]) -> str:
    """The components of several groups, as in 0+3."""
    return "+".join(sorted((c for name in names for c in name.split("+")), key=int))


def _merged_profiles(adata: ad.AnnData, key: str, parts: Sequence[Group]) -> dict[str, Any]:
    """Means and dispersions of the new groups, written; their ln weights."""
    log_weights = np.asarray(adata.uns[key]["log_weights"], dtype=np.float64)
    means, inv_disps = (np.asarray(adata.varm[f"{key}_{name}"]).T for name in PROFILES)
    with np.errstate(invalid="ignore"):  # NaN for genes that take no part
        merged = group_components(means, inv_disps, log_weights, parts)
    for name, values in zip(PROFILES, merged, strict=True):
        adata.varm[f"{key}_{name}"] = values.T
    return {"log_weights": group_log_joint(log_weights, parts)}


def _text_of(column: pd.Series, labels: Sequence[str]) -> pd.Series:
    """Groups as labels, where a table has them so or by their positions; "" for none."""
    if pd.api.types.is_integer_dtype(column):
        return column.map(lambda k: labels[k] if k >= 0 else "")
    return column.astype(object).where(column.notna(), "").astype(str)


def _relabelled(table: pd.DataFrame, columns: Sequence[str], new: Mapping[str, str]) -> pd.DataFrame:
    before = list(new)
    named = {
        c: pd.Categorical(_text_of(table[c], before).map(new), categories=list(new.values()))
        for c in columns
        if c in table
    }
    return table.assign(**named)


def without_pairs(
    table: pd.DataFrame | None, before: Sequence[str], gone: set[str], labels: Sequence[str]
) -> pd.DataFrame | None:
    """Separations of pairs of groups that are still there."""
    if table is None:
        return None
    ends = {c: _text_of(table[c], before) for c in ("first", "second")}
    kept = ~(ends["first"].isin(gone) | ends["second"].isin(gone))
    named = {c: pd.Categorical(values[kept], categories=list(labels)) for c, values in ends.items()}
    return table[kept].assign(**named).reset_index(drop=True)

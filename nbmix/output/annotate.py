"""What a fit says of cells and genes, as fields of an AnnData: of one in memory, or of one in a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, write_elem
from numpy.typing import ArrayLike

from nbmix.core.joins import group_log_joint
from nbmix.data.kept_fit import KEPT, as_fields
from nbmix.data.source import LIGHT
from nbmix.errors import in_one_line
from nbmix.output.batches import batch_lines
from nbmix.output.grouping import write_probabilities
from nbmix.output.groups import group_name, joins_table
from nbmix.output.rank_genes import rank_genes_groups
from nbmix.output.report import TOP_MARKERS
from nbmix.output.results import Results, named_markers
from nbmix.progress import say

log = logging.getLogger(__name__)


def add_fields(adata: ad.AnnData, key: str, results: Results, genes: ArrayLike | None = None) -> None:
    """Write what a fit says of each cell and gene by itself; ``annotate`` writes the rest.

    Args:
        adata: the cells of ``results``, in their order.
        key: what names begin with.
        results: of a fit, or of new cells.
        genes: (genes of ``results``,) their positions in ``adata``, whose other genes get NaN; None where
            there are no others.
    """
    q, groups, data = results.responsibilities, results.groups, results.data
    labels = [str(k) for k in range(q.shape[1])]
    write_probabilities(adata, key, q, labels)
    adata.obs[f"{key}_log_likelihood"] = results.cells.log_likelihood.numpy()
    adata.obs[f"{key}_misfit"] = results.doubt.misfit
    adata.obs[f"{key}_fits_no_group"] = results.doubt.fits_no_group
    adata.obs[f"{key}_held_out"] = np.isin(np.arange(data.data.n_cells), data.validation_rows)
    adata.obs[f"{key}_size_factor"] = data.data.size_factors
    for name, values in results.profiles._asdict().items():  # (K, genes of the results)
        of_all = np.full((adata.n_vars, q.shape[1]), np.nan)
        of_all[slice(None) if genes is None else np.asarray(genes)] = values.T.numpy()
        adata.varm[f"{key}_{name}"] = of_all
    adata.uns[key] = {
        "model": results.model.kind,
        "log_weights": group_log_joint(results.log_weights, groups),
        "labels": np.array(labels),
        "groups": {label: group_name(group) for label, group in zip(labels, groups, strict=True)},
        "objective": np.array(results.model.objective, dtype=np.float64),
        "provenance": json.dumps(results.provenance, default=repr),
    }
    if results.model.n_genes_missing is None:  # of a fit, not of new cells
        adata.uns[key]["n_iterations"] = results.model.n_iterations
        if results.model.converged is not None:
            adata.uns[key]["converged"] = bool(results.model.converged)
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
    if results.choice is not None:
        adata.uns[key]["choice"] = results.choice.table()
    if results.model.in_python:
        checkpoint = results.model.as_checkpoint(results.data, results.model.state_dict())
        adata.uns[key][KEPT] = as_fields(checkpoint, results.arguments)


def annotate(
    adata: ad.AnnData, key: str, results: Results, genes: ArrayLike | None = None, *, embed: bool = True
) -> None:
    """Write all that ``nbmix.cluster`` lists: the fields of ``add_fields``, markers, and the embedding.

    What an earlier fit has written under the same key goes. Markers and embedding are left out with a warning
    where they cannot be made.

    What is to be said of groups and batches goes into the log, too.

    Args:
        adata, key, results, genes: see ``add_fields``.
        embed: write the embedding, which may have to be made.
    """
    earlier = _aliased(adata.obsm, adata.uns, key)
    forget(adata, key)
    _fill(adata, key, results, genes, adata.var_names.to_numpy(), embed=embed, obs=adata.obs.copy())
    add_aliases(adata.obsm, adata.uns, key, earlier)
    for line in adata.uns[key].get("remarks", ()):
        log.warning("%s", line)


def forget(adata: ad.AnnData, key: str) -> None:
    """Take out what a fit, or a prediction, has written under ``key``, and what ``regroup`` made of it."""
    for slot, names in _names_to_forget(key, adata.uns).items():
        for name in names:
            if name in getattr(adata, slot):
                del getattr(adata, slot)[name]


def _fill(
    adata: ad.AnnData,
    key: str,
    results: Results,
    genes: ArrayLike | None,
    gene_names: np.ndarray,
    *,
    embed: bool,
    obs: pd.DataFrame | None = None,
) -> None:
    add_fields(adata, key, results, genes)
    with _sparing("markers"):
        say("finding markers")
        best = named_markers(results, TOP_MARKERS)
        for name in ("component", "nearest"):  # as obs has them; of a single group none is nearest
            best[name] = pd.Categorical.from_codes(best[name], adata.obs[key].cat.categories)
        adata.uns[key]["markers"] = best
        if len(results.groups) > 1:
            labels = {k: str(k) for k in np.unique(results.assignments).tolist()}  # of groups with cells
            ranked = rank_genes_groups(results.markers, labels, key, gene_names, genes)
            adata.uns[f"{key}_rank_genes_groups"] = ranked
    if embed:
        with _sparing("embedding"):
            say("embedding cells")
            name, coordinates = results.embedding
            of_all = np.full((adata.n_obs, 2), np.nan, dtype=coordinates.dtype)
            of_all[results.shown_rows] = coordinates
            adata.obsm[f"X_{key}_{name.lower()}"] = of_all
    with _sparing("remarks"):
        if lines := batch_lines(results, obs):
            adata.uns[key]["remarks"] = np.array(lines)


@contextmanager
def _sparing(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the fit must not be lost to it
        log.warning("%s: left out of the fields of the AnnData: %s", what, in_one_line(error))


def _own_names(key: str) -> dict[str, list[str]]:
    """What a fit may write, by slot."""
    of_groups = ("", "_probability", "_second", "_margin", "_ambiguous")
    of_cells = (*of_groups, "_log_likelihood", "_misfit", "_fits_no_group", "_held_out", "_size_factor")
    return {
        "obs": [f"{key}{end}" for end in of_cells],
        "obsm": [f"X_{key}{end}" for end in ("", "_components", "_umap", "_pca")],
        "varm": [f"{key}_{end}" for end in ("log_mean", "log_inv_disp", "batch_offsets")],
        "uns": [key, f"{key}_rank_genes_groups", f"{key}_colors"],
    }


def _names_to_forget(key: str, uns: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of ``_own_names``, and of the groups of ``nbmix.regroup`` where these are no other fit."""
    own, groups = _own_names(key), f"{key}_groups"
    if groups in uns and "provenance" not in uns[groups]:
        for slot, names in _own_names(groups).items():
            own[slot] += names
    return own


def _aliases(key: str) -> dict[str, tuple[str, str]]:
    """Slot -> the name that scanpy looks for, and ours of the same."""
    return {
        "obsm": ("X_umap", f"X_{key}_umap"),
        "uns": ("rank_genes_groups", f"{key}_rank_genes_groups"),
    }


def _aliased(obsm: MutableMapping[str, Any], uns: MutableMapping[str, Any], key: str) -> set[str]:
    """Slots whose name for scanpy is free, or holds what an earlier fit of this key has put there."""
    free = {slot for slot, (name, _) in _aliases(key).items() if name not in {"obsm": obsm, "uns": uns}[slot]}
    theirs, ours = _aliases(key)["obsm"]
    if theirs in obsm and ours in obsm:
        one, other = (_whole(obsm[name]) for name in (theirs, ours))
        if isinstance(one, np.ndarray) and np.array_equal(one, other, equal_nan=True):
            free.add("obsm")
    theirs, ours = _aliases(key)["uns"]
    if theirs in uns and ours in uns:
        one, other = (_whole(uns[name]) for name in (theirs, ours))
        if isinstance(one, dict) and one.get("params") == other.get("params"):
            free.add("uns")
    return free


def _whole(value: Any) -> Any:
    return read_elem(value) if isinstance(value, h5py.Group | h5py.Dataset) else value


def add_aliases(
    obsm: MutableMapping[str, Any],
    uns: MutableMapping[str, Any],
    key: str,
    free: Collection[str] = ("obsm", "uns"),
) -> None:
    """Have embedding and markers also where scanpy looks for them.

    Args:
        obsm, uns: of an AnnData, or the groups in its file.
        key: what our names begin with.
        free: of "obsm" and "uns" those where what is there may go.
    """
    for slot, target in (("obsm", obsm), ("uns", uns)):
        theirs, ours = _aliases(key)[slot]
        if slot in free and theirs in target:
            del target[theirs]
        if slot in free and ours in target:
            target[theirs] = target[ours]  # in a file a second name, which takes no room


def fields_of(
    results: Results, key: str, genes: np.ndarray, positions: ArrayLike, *, embed: bool
) -> ad.AnnData:
    """All that ``annotate`` writes, alone; cells and genes are numbered, since names can be repeated.

    Args:
        results, key, embed: as there.
        genes: (all genes,) names.
        positions: of those of ``results`` among them.
    """
    obs, var = (pd.RangeIndex(n).astype(str) for n in (results.data.data.n_cells, len(genes)))
    own = ad.AnnData(obs=pd.DataFrame(index=obs), var=pd.DataFrame(index=var))
    _fill(own, key, results, positions, genes, embed=embed)
    return own


def annotate_file(file: h5py.File, key: str, results: Results, *, embed: bool) -> None:
    """``annotate`` an .h5ad file that is a copy of the one that the cells were read from.

    Nothing else in it is touched. Genes of raw have what is said of them in raw/varm, and in varm as far as
    they are there.
    """
    source = results.data.data.source
    assert source is not None
    names = read_elem(file[source.var_element]).index.astype(str)
    own = fields_of(results, key, names.to_numpy(), source.genes, embed=embed)
    say("writing result.h5ad")
    for slot in ("obsm", "varm", "uns"):
        if slot not in file:
            write_elem(file, slot, {})
    earlier = _aliased(file["obsm"], file["uns"], key)
    ours = _names_to_forget(key, file["uns"])
    for slot, of_slot in [*ours.items(), ("raw/varm", ours["varm"])]:
        for name in of_slot:
            if f"{slot}/{name}" in file:
                del file[slot][name]
    columns = [n.decode() if isinstance(n, bytes) else str(n) for n in file["obs"].attrs["column-order"]]
    columns = [name for name in columns if name in file["obs"]] + list(own.obs)
    file["obs"].attrs["column-order"] = np.array(columns, dtype=object)
    _write_all(file["obs"], {name: _values(own.obs[name]) for name in own.obs})
    _write_all(file["obsm"], own.obsm)
    _write_all(file["uns"], own.uns)
    if source.var_element == "var":
        _write_all(file["varm"], own.varm)
    else:
        if "varm" not in file["raw"]:
            write_elem(file["raw"], "varm", {})
        _write_all(file["raw/varm"], own.varm)
        first = pd.Series(np.arange(names.size), index=names)[~names.duplicated()]
        here = first.reindex(read_elem(file["var"]).index.astype(str)).fillna(-1).to_numpy(dtype=np.int64)
        shared = {name: np.where(here[:, None] < 0, np.nan, of[here]) for name, of in own.varm.items()}
        _write_all(file["varm"], shared)
    add_aliases(file["obsm"], file["uns"], key, earlier)


def _values(column: pd.Series) -> Any:
    return column.array if isinstance(column.dtype, pd.CategoricalDtype) else column.to_numpy()


def _write_all(group: h5py.Group, entries: Mapping[str, Any]) -> None:
    for name, value in entries.items():
        write_elem(group, name, value, dataset_kwargs=LIGHT)

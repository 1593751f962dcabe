"""The door: whatever comes in is checked here, once, and leaves as ``CountData``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.utils import make_index_unique

from nbmix.core.declared import Setting
from nbmix.core.raw_counts import check_counts
from nbmix.data.backed import BackedCounts, survey
from nbmix.data.counts import CountData
from nbmix.data.files import check_structure, reading
from nbmix.data.origins import BatchKey, read_origins
from nbmix.data.source import SourceFile
from nbmix.errors import InputError

DEFAULT_LABEL_KEY = "cell_type"

DEFAULT_SYMBOL_KEY = "symbol"

LabelKey = Annotated[
    str | None,
    Setting(
        "The column of obs that holds known labels. cell_type may be missing, another "
        "name may not. With null there are no labels."
    ),
]

Layer = Annotated[str | None, Setting("The layer that holds the raw counts. null is X, raw.X is X of raw.")]

SizeFactorKey = Annotated[
    str | None,
    Setting(
        "The column of obs that holds size factors. With null a cell's size factor is "
        "its counts in all genes."
    ),
]

PriorKey = Annotated[
    str | None, Setting("The field of obsm that holds weights (cells, components), for model.weights=given.")
]

SymbolKey = Annotated[
    str | None,
    Setting(
        "The column of var that is shown beside gene names. symbol may be missing, "
        "another name may not. With null no column is shown."
    ),
]

MinCounts = Annotated[int, Setting("The number of counts that a gene needs to take part.", least=0)]

PRIOR_TOLERANCE = 1e-3

log = logging.getLogger(__name__)


def make_count_data(
    adata: ad.AnnData,
    *,
    where: str,
    label_key: LabelKey = DEFAULT_LABEL_KEY,
    layer: Layer = None,
    size_factor_key: SizeFactorKey = None,
    prior_key: PriorKey = None,
    gene_symbol_key: SymbolKey = DEFAULT_SYMBOL_KEY,
    batch_key: BatchKey = None,
    min_counts: MinCounts = 1,
    backed: BackedCounts | None = None,
    others: Mapping[str, Callable[[], Any]] | None = None,
    annotate: bool = False,
    source: SourceFile | None = None,
) -> CountData:
    """Check one annotated matrix and keep what the model reads of it.

    Size factors default to the row sums s_i = sum_j x_ij of the chosen matrix, taken before the
    gene filter. Empty cells stay, with a warning in the log.

    Args:
        adata: (cells, genes), in memory or backed; not modified.
        where: its name in messages, e.g. ``"data.path=pbmc.h5ad"``.
        size_factor_key: molecules, finite, positive for every cell with counts.
        prior_key: rows sum to 1.
        gene_symbol_key: a gene without a symbol keeps its name.
        batch_key: no cell may lack a value.
        min_counts: over all cells; 0 keeps silent genes, whose zeros tell something about new cells, for a
            prediction.
        backed: the matrix of these cells in its file, in place of the one in ``adata``.
        others: setting -> loader of a matrix outside ``adata`` that the setting would read instead.
        annotate: keep obs and var, to pass them on with the results.
        source: the file that ``adata`` is of.

    Raises:
        InputError: one line that names the file and the field, and says what to do.
    """
    if min_counts < 0:
        raise InputError(f"data.min_counts={min_counts}: must be 0 or more")
    counts, totals, gene_totals = _checked(adata, where, layer, backed, others or {})
    if min_counts and not totals.any():  # a prediction can be of empty cells alone
        raise InputError(f"{where}: every cell is empty; nbmix needs raw counts")
    origins, names = (None, ()) if batch_key is None else read_origins(adata.obs, where, batch_key)
    data = CountData(
        counts=counts,
        size_factors=totals
        if size_factor_key is None
        else _read_size_factors(adata, where, size_factor_key, totals),
        cell_names=adata.obs_names.astype(str).to_numpy(),
        gene_names=_unique_gene_names(adata, where),
        labels=None if label_key is None else _read_labels(adata, where, label_key),
        prior=None if prior_key is None else _read_prior(adata, where, prior_key),
        gene_symbols=None if gene_symbol_key is None else _read_symbols(adata, where, gene_symbol_key),
        annotations=ad.AnnData(obs=adata.obs, var=adata.var) if annotate else None,
        source=source,
        origins=origins,
        origin_names=names,
    )
    keep = np.flatnonzero(gene_totals >= min_counts)
    if not keep.size:
        raise InputError(
            f"{where}: no gene has data.min_counts={min_counts} counts (the largest total is "
            f"{gene_totals.max():.0f}); set a lower data.min_counts"
        )
    if keep.size < data.n_genes:
        log.info("%s: dropped %d genes below %d counts", where, data.n_genes - keep.size, min_counts)
        data = data.select_genes(keep)
    if n_empty := int(data.empty_cells.sum()):
        log.warning("%s: %d of %d cells have no counts; they are kept", where, n_empty, data.n_cells)
    return data


def _checked(
    adata: ad.AnnData,
    where: str,
    layer: str | None,
    backed: BackedCounts | None,
    others: Mapping[str, Callable[[], Any]],
) -> tuple[Any, np.ndarray, np.ndarray]:
    """The counts, and their (cells,) and (genes,) totals."""
    field = f"{where}: {'X' if layer is None else f'layer {layer!r}'}"
    if backed is not None:
        found = survey(backed, field, adata.obs_names, adata.var_names)
        return replace(backed, census=found.census), found.cell_totals, found.gene_totals
    layers: dict[str, Callable[[], Any]] = {
        f"data.layer={name}": partial(_choose_matrix, adata, where, name)
        for name in adata.layers
        if name != layer
    }
    if adata.raw is not None:  # in memory, where it takes the place of adata
        layers["adata = adata.raw.to_adata()"] = lambda: _in_memory(adata.raw.X)
    counts = check_counts(
        _choose_matrix(adata, where, layer),
        field,
        cells=adata.obs_names,
        genes=adata.var_names,
        alternatives={name: partial(_loaded, where, load) for name, load in (layers | dict(others)).items()},
    )
    return counts, *(np.asarray(counts.sum(axis=axis, dtype=np.float64)).ravel() for axis in (1, 0))


def _loaded(where: str, load: Callable[[], Any]) -> Any:
    with reading(where):
        return load()


def _in_memory(x: Any) -> Any:
    """A matrix that is still in an open file, or yet to be computed (dask), read."""
    if isinstance(x, h5py.Dataset):
        return x[()]
    if hasattr(x, "__dask_graph__"):
        return x.compute()
    return x.to_memory() if hasattr(x, "to_memory") else x


def _choose_matrix(adata: ad.AnnData, where: str, layer: str | None) -> Any:
    names = ", ".join(map(str, adata.layers)) or "none"
    if layer is None and adata.X is None:
        raise InputError(f"{where}: X is missing; set data.layer to one of its layers ({names})")
    if layer is not None and layer not in adata.layers:
        raw = ", or give adata.raw.to_adata()" if layer == "raw.X" and adata.raw is not None else ""
        raise InputError(f"{where}: no layer {layer!r}; set data.layer to one of its layers ({names}){raw}")
    with reading(where):
        x = _in_memory(adata.X if layer is None else adata.layers[layer])
        if sp.issparse(x) and x.format in ("csr", "csc"):
            x = check_structure(x)
    return x


def _obs_column(adata: ad.AnnData, where: str, key: str, setting: str) -> pd.Series:
    if key not in adata.obs:
        names = ", ".join(map(str, adata.obs.columns)) or "none"
        raise InputError(f"{where}: obs has no column {key!r}; set {setting} to one of its columns ({names})")
    return adata.obs[key]


def _read_labels(adata: ad.AnnData, where: str, key: str) -> np.ndarray | None:
    if key == DEFAULT_LABEL_KEY and key not in adata.obs:
        return None
    labels = _obs_column(adata, where, key, "data.label_key")
    return known_labels(labels, f"{where}: obs[{key!r}]", "drop them, or set data.label_key=null")


def known_labels(labels: pd.Series, what: str, ways_out: str) -> np.ndarray:
    """(cells,) labels as texts.

    Args:
        labels: of any type.
        what: they are, in a message.
        ways_out: other than labelling all cells.

    Raises:
        InputError: some are missing.
    """
    if missing := int(labels.isna().sum()):
        raise InputError(
            f"{what} misses the label of {missing} of {labels.size} cells; label them, {ways_out}"
        )
    return labels.to_numpy().astype(str)


def _read_symbols(adata: ad.AnnData, where: str, key: str) -> np.ndarray | None:
    if key not in adata.var:
        if key == DEFAULT_SYMBOL_KEY:
            return None
        names = ", ".join(map(str, adata.var.columns)) or "none"
        raise InputError(
            f"{where}: var has no column {key!r}; set data.gene_symbol_key to one of its columns ({names})"
        )
    column = adata.var[key]
    symbols = column.astype(str).to_numpy().astype(str)
    unknown = column.isna().to_numpy() | (np.char.strip(symbols) == "")
    return np.where(unknown, adata.var_names.to_numpy().astype(str), symbols)


def _read_size_factors(adata: ad.AnnData, where: str, key: str, totals: np.ndarray) -> np.ndarray:
    column = _obs_column(adata, where, key, "data.size_factor_key")
    field = f"{where}: obs[{key!r}]"
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        raise InputError(f"{field} holds values of type {column.dtype}; size factors must be numbers")
    size_factors = column.to_numpy(dtype=np.float64, na_value=np.nan)
    bad = ~np.isfinite(size_factors) | (size_factors < 0) | ((size_factors == 0) & (totals > 0))
    if bad.any():
        first = int(np.argmax(bad))
        raise InputError(
            f"{field} is {size_factors[first]} at cell {str(adata.obs_names[first])!r} "
            f"({bad.sum()} such cells); size factors must be finite and positive: mend the column or "
            "set data.size_factor_key=null"
        )
    return size_factors


def _read_prior(adata: ad.AnnData, where: str, key: str) -> np.ndarray:
    if key not in adata.obsm:
        names = ", ".join(map(str, adata.obsm)) or "none"
        raise InputError(
            f"{where}: obsm has no entry {key!r}; set data.prior_key to one of its entries ({names})"
        )
    field = f"{where}: obsm[{key!r}]"
    given = _in_memory(adata.obsm[key])
    try:
        prior = np.asarray(given.toarray() if sp.issparse(given) else given, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{field} does not hold numbers; prior weights must be numbers") from None
    if prior.ndim != 2 or prior.shape[1] == 0:
        raise InputError(f"{field} has shape {prior.shape}; prior weights must be (cells, components)")
    sums = prior.sum(axis=1)  # (cells,)
    for what, bad in {
        "NaN or infinite weights": ~np.isfinite(prior).all(axis=1),
        "negative weights": (prior < 0).any(axis=1),
        "rows that do not sum to 1": np.abs(sums - 1) > PRIOR_TOLERANCE,
    }.items():
        if bad.any():
            cell = str(adata.obs_names[int(np.argmax(bad))])
            raise InputError(f"{field} holds {what} (first: cell {cell!r}); each row must be a distribution")
    return prior / sums[:, None]


def _unique_gene_names(adata: ad.AnnData, where: str) -> np.ndarray:
    names = adata.var_names.astype(str)
    if duplicated := int(names.duplicated().sum()):
        log.warning("%s: %d gene names are repeated; a number is appended to them", where, duplicated)
    return unique_names(names).to_numpy().astype(str)


def unique_names(names: pd.Index) -> pd.Index:
    """Names with a number appended to those that are repeated: as a fit calls genes."""
    if names.is_unique:
        return names
    with warnings.catch_warnings():  # of names that already end in "-1"
        warnings.filterwarnings("ignore", message="Suffix used", category=UserWarning)
        return make_index_unique(names)

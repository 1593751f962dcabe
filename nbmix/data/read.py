"""Counts from an .h5ad file."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem, sparse_dataset

from nbmix.core.declared import Setting
from nbmix.data.backed import SLAB_NONZEROS, open_backed
from nbmix.data.counts import CountData
from nbmix.data.files import check_links, check_structure, existing, open_h5, reading
from nbmix.data.from_anndata import (
    DEFAULT_LABEL_KEY,
    DEFAULT_SYMBOL_KEY,
    LabelKey,
    Layer,
    MinCounts,
    PriorKey,
    SizeFactorKey,
    SymbolKey,
    make_count_data,
)
from nbmix.data.origins import BatchKey
from nbmix.data.recognise import what_it_is
from nbmix.data.source import SourceFile
from nbmix.errors import InputError

UNKNOWN_HDF5 = "is HDF5 but no AnnData (no obs and var); give an .h5ad file as AnnData.write_h5ad writes it"

RAW, RAW_ELEMENT = "raw.X", "raw/X"  # counts put aside before X was normalised: as data.layer, in the file

Subsample = Annotated[
    int | None, Setting("The number of cells to draw at random. With null all cells are taken.", least=1)
]

log = logging.getLogger(__name__)


def read_h5ad(
    path: str | os.PathLike[str] | None,
    *,
    label_key: LabelKey = DEFAULT_LABEL_KEY,
    layer: Layer = None,
    size_factor_key: SizeFactorKey = None,
    prior_key: PriorKey = None,
    gene_symbol_key: SymbolKey = DEFAULT_SYMBOL_KEY,
    batch_key: BatchKey = None,
    min_counts: MinCounts = 1,
    populations: Annotated[
        Sequence[str] | str | None, Setting("Cells with these labels are kept. With null all cells are kept.")
    ] = None,
    subsample: Subsample = None,
    backed: Annotated[bool, Setting("With true the counts stay in the file and are read in parts.")] = False,
    slab_nonzeros: int = SLAB_NONZEROS,
    seed: int = 0,
) -> CountData:
    """Read the raw counts of an AnnData file, and what it says of its cells and genes.

    What else is in it stays there, and nothing in it is executed. What cannot be read and is not asked for is
    passed over with a warning.

    Cells are picked first (``populations``, then ``subsample``), the gene filter sees those alone.

    Args:
        path: the .h5ad file.
        label_key, layer, size_factor_key, prior_key, gene_symbol_key, batch_key: see ``make_count_data``.
        min_counts: over the picked cells.
        subsample: the cells drawn stay in file order.
        backed: the counts are checked; the file must hold them as CSR.
        slab_nonzeros: of the file, to read at once where they are backed.
        seed: of ``np.random.default_rng`` for the subsample.

    Raises:
        InputError: one line that names the file and what in it cannot be used.
    """
    if path is None:
        raise InputError("data.path is not set: give an .h5ad file, e.g. data.path=counts.h5ad")
    where = f"data.path={os.fspath(path)}"
    with warnings.catch_warnings():
        # names are dealt with in make_count_data, and older encodings read well
        warnings.filterwarnings("ignore", message=r"(Observation|Variable) names are not unique")
        warnings.filterwarnings("ignore", category=ad.OldFormatWarning)
        file_path = existing(path, where)
        if file_path.is_dir():
            raise InputError(f"{where}: {what_it_is(file_path) or 'is a folder; give the .h5ad file in it'}")
        with open_h5(file_path, where, "an .h5ad file as AnnData.write_h5ad writes it") as file:
            with reading(where):
                element, others = _element(file, layer), _others(file, layer)
                adata = _lazy_anndata(file, where, element, layer, prior_key, backed=backed)
                counts = open_backed(file, element, where, adata.shape, slab_nonzeros) if backed else None
            rows = picked_rows(
                adata,
                where=where,
                label_key=label_key,
                populations=populations,
                subsample=subsample,
                seed=seed,
            )
            of_raw = element == RAW_ELEMENT and "raw" in file
            source = SourceFile.of(file_path, rows, adata.shape, "raw/var" if of_raw else "var")
            if rows.size < adata.n_obs:
                adata = adata[rows]
                counts = None if counts is None else counts[rows]
            return make_count_data(
                adata,
                where=where,
                label_key=label_key,
                layer=layer,
                size_factor_key=size_factor_key,
                prior_key=prior_key,
                gene_symbol_key=gene_symbol_key,
                batch_key=batch_key,
                min_counts=min_counts,
                backed=counts,
                others=others,
                annotate=True,
                source=source,
            )


def pick_cells(
    adata: ad.AnnData,
    *,
    where: str,
    label_key: str | None,
    populations: Sequence[str] | str | None,
    subsample: int | None,
    seed: int,
) -> ad.AnnData:
    """The cells of some populations, then a random subsample of those, in their given order.

    Raises:
        InputError: a population that is not there, or more cells asked for than there are.
    """
    rows = picked_rows(
        adata, where=where, label_key=label_key, populations=populations, subsample=subsample, seed=seed
    )
    return adata if rows.size == adata.n_obs else adata[rows]


def picked_rows(
    adata: ad.AnnData,
    *,
    where: str,
    label_key: str | None,
    populations: Sequence[str] | str | None,
    subsample: int | None,
    seed: int,
) -> np.ndarray:
    """Ascending positions of the cells that ``pick_cells`` picks."""
    rows = np.arange(adata.n_obs)
    if populations is not None:
        if label_key is None or label_key not in adata.obs:
            columns = ", ".join(map(str, adata.obs.columns)) or "none"
            raise InputError(
                f"{where}: data.populations needs labels, and obs has no column {label_key!r}; "
                f"set data.label_key to one of its columns ({columns})"
            )
        wanted = [populations] if isinstance(populations, str) else [str(name) for name in populations]
        column = adata.obs[label_key]
        known = column.notna().to_numpy()
        labels = column.astype(str).to_numpy()
        present = set(labels[known])
        wanted = _with_commas(wanted, present)
        if absent := sorted(set(wanted) - present):
            raise InputError(
                f"{where}: no cell has obs[{label_key!r}] = {', '.join(absent)} (data.populations); "
                f"there are: {', '.join(sorted(present))}"
            )
        if not wanted:
            raise InputError(f"data.populations is empty; name some of: {', '.join(sorted(present))}")
        rows = np.flatnonzero(np.isin(labels, wanted) & known)
    if subsample is not None:
        if not 1 <= subsample <= rows.size:
            raise InputError(
                f"{where}: data.subsample={subsample} must be from 1 to the {rows.size} cells there are"
            )
        rows = np.sort(np.random.default_rng(seed).choice(rows, size=subsample, replace=False))
    return rows


def _with_commas(wanted: list[str], present: Set[str]) -> list[str]:
    """Labels that the command line took apart at their commas, put together where there is one way to.

    >>> _with_commas(["CD4-positive", "T cell", "B cell"], {"CD4-positive, T cell", "B cell"})
    ['CD4-positive, T cell', 'B cell']
    """
    if set(wanted) <= present:
        return wanted

    def ways(items: list[str]) -> Iterator[list[str]]:
        if not items:
            yield []
        for end in range(1, len(items) + 1):
            for label in {comma.join(items[:end]) for comma in (", ", ",")} & present:
                yield from ([label, *others] for others in ways(items[end:]))

    found = list(islice(ways(wanted), 2))
    return found[0] if len(found) == 1 else wanted


def _element(file: h5py.File, layer: str | None) -> str:
    """Where in a file the counts are."""
    if layer is None:
        return "X"
    return RAW_ELEMENT if layer == RAW and f"layers/{RAW}" not in file else f"layers/{layer}"


def _others(file: h5py.File, layer: str | None) -> dict[str, Callable[[], Any]]:
    """Setting -> loader of the counts that were put aside, if there are any and they are not what is read."""
    if layer == RAW or RAW_ELEMENT not in file:
        return {}
    return {f"data.layer={RAW}": lambda: _sound(file[RAW_ELEMENT])}


def _lazy_anndata(
    file: h5py.File, where: str, element: str, layer: str | None, prior_key: str | None, *, backed: bool
) -> ad.AnnData:
    """What the model or the results may need: other layers stay in the file unless they are asked for."""
    if "obs" not in file or "var" not in file:
        raise InputError(f"{where}: {what_it_is(Path(file.filename)) or UNKNOWN_HDF5}")
    if isinstance(file["obs"], h5py.Dataset):
        raise InputError(
            f"{where}: dates from before anndata 0.7; rewrite it: read_h5ad(old).write_h5ad(new)"
        )
    raw = element == RAW_ELEMENT
    var = "raw/var" if raw and "raw" in file else "var"
    adata = ad.AnnData(obs=_table(file, "obs"), var=_table(file, var))
    if not backed and element in file:
        if layer is None:
            adata.X = _sound(file[element])
        else:
            adata.layers[layer] = _sound(file[element])
    if not raw:  # else they are of other genes
        _fill(adata.layers, file, "layers", where, _lazy)
    if prior_key is not None:
        _fill(adata.obsm, file, "obsm", where, read_elem, needed=prior_key)
    return adata


def _table(file: h5py.File, name: str) -> pd.DataFrame:
    check_links(file[name])
    table = read_elem(file[name])
    if not isinstance(table, pd.DataFrame):
        raise ValueError(f"{name} is no table")
    table.index = table.index.astype(str)
    return table


def _sound(element: h5py.Group | h5py.Dataset) -> Any:
    """A matrix, dense or sparse, whose parts fit together."""
    x = read_elem(element)
    if sp.issparse(x):
        return check_structure(x)
    if not isinstance(x, np.ndarray):
        raise ValueError(f"{element.name} is no matrix")
    return x


def _fill(
    target: Any,
    file: h5py.File,
    name: str,
    where: str,
    load: Callable[[Any], Any],
    *,
    needed: str | None = None,
) -> None:
    """Have all entries of a group in a file at hand, but those that only a warning speaks of."""
    group = file.get(name)
    for key in group if isinstance(group, h5py.Group) else ():
        if key in target:
            continue
        try:
            target[key] = load(group[key])
        except MemoryError:
            raise
        except Exception as error:  # h5py and anndata raise all kinds
            if key == needed:
                raise
            reason = " ".join(str(error).split())
            log.warning("%s: %s[%r] cannot be read, and is passed over (%s)", where, name, key, reason)


def _lazy(element: h5py.Group | h5py.Dataset) -> Any:
    if isinstance(element, h5py.Dataset):
        return element
    if element.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix"):
        return sparse_dataset(element)
    return read_elem(element)

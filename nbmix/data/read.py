"""Counts from an .h5ad file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
from anndata.io import read_elem, sparse_dataset

from nbmix.data.backed import open_backed
from nbmix.data.check import DEFAULT_LABEL_KEY, make_count_data
from nbmix.data.counts import CountData
from nbmix.errors import InputError


def read_h5ad(
    path: str | os.PathLike[str] | None,
    *,
    label_key: str | None = DEFAULT_LABEL_KEY,
    layer: str | None = None,
    size_factor_key: str | None = None,
    prior_key: str | None = None,
    min_counts: int = 1,
    populations: Sequence[str] | str | None = None,
    subsample: int | None = None,
    backed: bool = False,
    seed: int = 0,
) -> CountData:
    """Read the raw counts of an AnnData file; nothing else in it is loaded, or executed.

    Cells are picked first (``populations``, then ``subsample``), the gene filter sees those alone.

    Args:
        path: the .h5ad file.
        label_key: column of ``obs``; "cell_type" is used if it is there, any other must be.
        layer: layer with the raw counts; None for ``X``.
        size_factor_key: column of ``obs``; None for row sums before the gene filter.
        prior_key: entry of ``obsm`` with (cells, components) prior weights.
        min_counts: genes need at least this many counts over the picked cells.
        populations: labels to keep; None for all cells.
        subsample: number of cells drawn without replacement, in file order; None for all.
        backed: check the counts, but leave them in the file, which must hold them as CSR.
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
        with _open_h5(path, where) as file:
            try:
                adata = _lazy_anndata(file, where, layer=layer, prior_key=prior_key, backed=backed)
            except (InputError, MemoryError):
                raise
            except Exception as error:  # h5py and anndata raise all kinds on damaged files
                raise _unreadable(where, error) from error
            rows = picked_rows(
                adata,
                where=where,
                label_key=label_key,
                populations=populations,
                subsample=subsample,
                seed=seed,
            )
            counts = open_backed(file, "X" if layer is None else f"layers/{layer}", where) if backed else None
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
                min_counts=min_counts,
                backed=counts,
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


def _open_h5(path: str | os.PathLike[str], where: str) -> h5py.File:
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{where}: is a folder; give the .h5ad file in it")
        path.open("rb").close()
    except FileNotFoundError:
        raise InputError(f"{where}: no such file; check the path (relative to {Path.cwd()})") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be opened ({error.strerror}); check its permissions") from None
    if not h5py.is_hdf5(path):
        raise InputError(f"{where}: is not an HDF5 file; give an .h5ad file as AnnData.write_h5ad writes it")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(f"{where}: cannot be read ({reason}); the file is damaged or cut short, get it again")


def _lazy_anndata(
    file: h5py.File, where: str, *, layer: str | None, prior_key: str | None, backed: bool
) -> ad.AnnData:
    """What the model may need: other layers stay in the file unless they are asked for."""
    if "obs" not in file or "var" not in file:
        raise InputError(
            f"{where}: is HDF5 but no AnnData (no obs and var); write it with AnnData.write_h5ad"
        )
    if isinstance(file["obs"], h5py.Dataset):
        raise InputError(
            f"{where}: dates from before anndata 0.7; rewrite it: read_h5ad(old).write_h5ad(new)"
        )
    layers, obsm = file.get("layers", {}), file.get("obsm", {})
    return ad.AnnData(
        X=read_elem(file["X"]) if layer is None and "X" in file and not backed else None,
        obs=read_elem(file["obs"]),
        var=read_elem(file["var"]),
        layers={
            name: (read_elem if name == layer and not backed else _lazy)(layers[name]) for name in layers
        },
        obsm={name: (read_elem if name == prior_key else _lazy)(obsm[name]) for name in obsm},
    )


def _lazy(element: h5py.Group | h5py.Dataset) -> Any:
    if isinstance(element, h5py.Dataset):
        return element
    if element.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix"):
        return sparse_dataset(element)
    return read_elem(element)

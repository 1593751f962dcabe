"""New cells, brought to the groups of a fit that is there already."""

from __future__ import annotations

import os
from copy import copy as shallow_copy
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
from anndata.io import read_elem

from nbmix.core.joins import group_probabilities
from nbmix.data.arguments import settings_as_arguments
from nbmix.data.kept_fit import KEPT
from nbmix.data.origins import has_columns
from nbmix.data.read import RAW
from nbmix.errors import InputError, refuse_unknown
from nbmix.estimator import NBMixture
from nbmix.output.annotate import forget
from nbmix.output.grouping import writable, write_probabilities
from nbmix.output.groups import Partition, partitions_in

LAST, RESULT = "checkpoints/last.ckpt", "result.h5ad"  # in the folder of a run

READ_BY = ("layer", "size_factor_key", "prior_key", "batch_key")  # arguments of NBMixture


def predict(
    new: ad.AnnData,
    fit: ad.AnnData | NBMixture | str | os.PathLike[str],
    *,
    key: str = "nbmix",
    key_added: str | None = None,
    copy: bool = False,
    **read_by: Any,
) -> ad.AnnData | None:
    """Assign new cells to the groups of a fit.

    Genes are matched by name; those that the new cells lack are left out, with a warning. Cells of a batch
    that the fit knows get its offsets, see ``NBMixture.fit``. There are no groups for kinds that the fit has
    not seen: their cells go to the nearest group, and "fits_no_group" is true for many of them. These are
    written into ``new``; where ``key_added`` is another word, it stands in the place of "nbmix":

        obs["nbmix"]                   group of the largest responsibility, as it is called in the fit
        obs["nbmix_probability"]       that responsibility
        obs["nbmix_second"]            group of the second largest; and margin, ambiguous, misfit and
                                       fits_no_group, see ``NBMixture.doubt``
        obs["nbmix_log_likelihood"]    ln p(x_i) in nats
        obsm["X_nbmix"]                (cells, K) responsibilities, in the order of the categories
        uns["nbmix"]                   the components of each group in groups, as in 0+3

    If ``nbmix.regroup`` has made other groups of the fit, these are predicted as well, with the names that
    ``nbmix.regroup`` gives.

    Args:
        new: (cells, genes) with raw counts.
        fit: the AnnData of ``nbmix.cluster`` or of ``train.py`` (result.h5ad), or some of its cells; the
            folder of a run; a checkpoint; or an ``NBMixture``.
        key: what the names of the fit in an AnnData begin with.
        key_added: what the names of the results begin with; default ``key``.
        copy: whether to write into a copy, and return it.
        read_by: layer, size_factor_key, prior_key and batch_key: where ``new`` holds these, if elsewhere than
            the cells of the fit.

    Returns:
        None, or with ``copy`` the changed copy.

    Raises:
        InputError: there is no fit, no gene is shared, or the counts are not raw counts.

    >>> import anndata, nbmix
    >>> cells = anndata.AnnData(nbmix.simulate(n=300, p=80, k=2, seed=1).counts)
    >>> adata, new = cells[:200].copy(), cells[200:].copy()
    >>> nbmix.cluster(adata, n_components=2, start="kmeans", max_umap_cells=0)
    >>> nbmix.predict(new, adata)
    >>> new.obs["nbmix"].cat.categories.tolist(), new.obsm["X_nbmix"].shape
    (['0', '1'], (100, 2))
    """
    if not isinstance(new, ad.AnnData):
        raise InputError(
            f"new is a {type(new).__name__}; give an AnnData, or use nbmix.NBMixture.load(...).predict"
        )
    refuse_unknown("predict", read_by, [*READ_BY, "key", "key_added", "copy"])
    added = key if key_added is None else key_added
    if new is fit and added == key:
        raise InputError(
            f"new: is the AnnData of the fit, which key_added={added!r} would replace; set another"
        )
    batch_key = read_by.get("batch_key")
    if batch_key is not None and not has_columns(new.obs, batch_key):
        raise InputError(f"batch_key={batch_key!r}: obs of the new cells has no such column")
    new = writable(new, copy)
    mixture = shallow_copy(_mixture(fit, key)).set_params(**read_by)
    partitions = partitions_in(fit, key) if isinstance(fit, ad.AnnData) else [_own(mixture, key)]
    with settings_as_arguments():
        cells = _of_raw(new, mixture)
        said, doubt = mixture.predict_with_doubt(cells)
    q = said.responsibilities.numpy()
    forget(new, added)
    for partition in partitions:
        name = partition.name
        name = added + name.removeprefix(key) if name.startswith(key) else name
        _write(new, name, q, partition)
    new.obs[f"{added}_log_likelihood"] = said.log_likelihood.numpy()
    for name, values in (("misfit", doubt["misfit"]), ("fits_no_group", doubt["fits_no_group"])):
        new.obs[f"{added}_{name}"] = values.to_numpy()
    own = partitions[0]
    new.uns[added] = {"model": mixture.model, "labels": np.array(own.labels), "groups": own.named}
    return new if copy else None


def _of_raw(new: ad.AnnData, mixture: NBMixture) -> ad.AnnData:
    """The cells with what is in raw in place of X, where the counts of the fit were there."""
    if mixture.layer != RAW or RAW in new.layers:
        return new
    if new.raw is None:
        raise InputError(
            "layer='raw.X': the counts of the fit were in raw, which the new cells do not have; say where "
            "their counts are: layer=None for X"
        )
    mixture.set_params(layer=None)
    return new.raw.to_adata()


def _mixture(fit: Any, key: str) -> NBMixture:
    if isinstance(fit, NBMixture):
        return fit
    if isinstance(fit, ad.AnnData):
        return NBMixture.load(fit, key)
    if not isinstance(fit, str | os.PathLike):
        raise InputError(
            f"fit is a {type(fit).__name__}; give an AnnData, a run folder, a checkpoint or an NBMixture"
        )
    path = Path(fit)
    if path.suffix == ".h5ad":
        raise InputError(f"fit={path}: give what anndata.read_h5ad reads of it")
    return _of_run(path) if path.is_dir() else NBMixture.load(path)


def _of_run(folder: Path) -> NBMixture:
    """By result.h5ad, which knows where the counts were; else by the checkpoint."""
    if not (folder / LAST).is_file():
        raise InputError(f"fit={folder}: has no {LAST}; give the folder of a run that fitted")
    result = folder / RESULT
    if result.is_file() and h5py.is_hdf5(result):
        with h5py.File(result) as file:
            if f"uns/nbmix/{KEPT}" in file:
                return NBMixture.load(ad.AnnData(uns={"nbmix": read_elem(file["uns/nbmix"])}))
    return NBMixture.load(folder / LAST)


def _own(mixture: NBMixture, key: str) -> Partition:
    numbers = range(mixture.n_components_)
    groups = tuple(tuple(np.flatnonzero(mixture.component_groups_ == k).tolist()) for k in numbers)
    return Partition(key, [str(k) for k in numbers], groups)


def _write(new: ad.AnnData, name: str, q: np.ndarray, partition: Partition) -> None:
    write_probabilities(new, name, group_probabilities(q, partition.groups), partition.labels)
    new.uns[name] = partition.named

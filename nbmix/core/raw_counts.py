"""Raw counts in canonical form, or one line that says what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from nbmix.errors import InputError

MAX_COUNT = 2**24  # every integer up to here has an exact float32


def check_counts(
    x: Any,
    where: str,
    *,
    cells: Sequence[Any] | None = None,
    genes: Sequence[Any] | None = None,
    alternatives: Mapping[str, Callable[[], Any]] | None = None,
) -> sp.csr_matrix:
    """Raw counts in canonical form: sorted, duplicates summed, no explicit zeros.

    Args:
        x: (cells, genes) sparse matrix or array of any format, or dense array, of any integer
            or floating type. It is never modified; arrays already in canonical form are shared.
        where: what ``x`` is, as the user knows it, e.g. ``"data.path=pbmc.h5ad: X"``.
        cells: (cells,) names for messages, positions by default.
        genes: (genes,) names for messages, positions by default.
        alternatives: setting -> loader of another matrix; those that do hold integer counts
            are proposed when ``x`` holds fractional values.

    Returns:
        (cells, genes) CSR, float32, int32 indices where the number of entries allows it.

    Raises:
        InputError: anything but finite non-negative integers up to 2**24, or an empty matrix.
    """
    csr = _canonical_csr(x, where)
    failed: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "NaN": np.isnan,
        "infinite values": np.isinf,
        "negative values": lambda v: v < 0,
        "fractional values": lambda v: v != np.rint(v),
        "values above 2**24, which float32 cannot hold exactly": lambda v: v > MAX_COUNT,
    }
    for what, test in failed.items():
        bad = test(csr.data)
        if not bad.any():
            continue
        first = int(np.argmax(bad))
        row = int(np.searchsorted(csr.indptr, first, side="right")) - 1
        column = int(csr.indices[first])
        cell = row if cells is None else repr(str(cells[row]))
        gene = column if genes is None else repr(str(genes[column]))
        advice = "nbmix needs raw counts"
        if what in ("negative values", "fractional values") and (
            settings := _integer_alternatives(alternatives or {})
        ):
            advice += f": set {' or '.join(settings)}"
        value = float(csr.data[first])
        raise InputError(f"{where} holds {what} (first: {value} at cell {cell}, gene {gene}); {advice}")
    index = np.int32 if csr.nnz < 2**31 else np.int64
    arrays = (
        csr.data.astype(np.float32, copy=False),
        csr.indices.astype(index, copy=False),
        csr.indptr.astype(index, copy=False),
    )
    return sp.csr_matrix(arrays, shape=csr.shape)


def _canonical_csr(x: Any, where: str) -> sp.csr_matrix:
    if not (sp.issparse(x) or isinstance(x, np.ndarray)):
        raise InputError(f"{where} is a {type(x).__name__}; nbmix needs a sparse matrix or a dense array")
    if np.ma.is_masked(x):
        raise InputError(f"{where} has masked values; nbmix needs raw counts: fill them, as by x.filled(0)")
    if x.ndim != 2:
        raise InputError(f"{where} has shape {x.shape}; nbmix needs two dimensions, (cells, genes)")
    for size, what in zip(x.shape, ("cells", "genes"), strict=True):
        if size == 0:
            raise InputError(f"{where} has no {what}; nbmix needs at least one")
    if x.dtype.kind not in "iuf":
        raise InputError(f"{where} holds values of type {x.dtype}; nbmix needs raw counts, as numbers")
    if isinstance(x, np.ndarray):
        if x.dtype == np.float16 or not x.dtype.isnative:  # no sparse matrix takes these
            x = x.astype(np.float64)
    elif x.format == "coo":  # tocsr sums duplicates in the given type, which may overflow
        x = x.astype(np.float64)
    csr = sp.csr_matrix(x)
    if not csr.has_canonical_format or not csr.data.all():
        csr = csr.astype(np.float64, copy=True)  # in place below, and x belongs to the caller
        csr.sum_duplicates()
        csr.eliminate_zeros()
    return csr


def _integer_alternatives(alternatives: Mapping[str, Callable[[], Any]]) -> list[str]:
    found = []
    for setting, load in alternatives.items():
        try:
            check_counts(load(), setting)
        except (InputError, OSError):  # a layer that cannot even be read is no way out
            continue
        found.append(setting)
    return found

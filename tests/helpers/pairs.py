"""Counts as pairs of gene and count."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp


def csr(rows) -> sp.csr_matrix:
    return sp.csr_matrix(np.asarray(rows, dtype=np.float32))


def coded(levels, counts, rows=None):
    """(rows, pairs) dense one-hot of what ``levels.code`` finds."""
    rows = np.arange(counts.shape[0]) if rows is None else np.asarray(rows)
    codes, _ = levels.code(counts, rows)
    lengths = np.diff(counts.indptr)[rows]
    marks = np.zeros((rows.size, levels.n_pairs))
    np.add.at(marks, (np.repeat(np.arange(rows.size), lengths), codes), 1)
    return marks

"""Counts of cells from several batches, with the offsets that they were drawn by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
import torch

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.folds import fold_blocks
from nbmix.core.mixture import Mixture
from nbmix.core.settings import MixtureSettings
from nbmix.data.from_arrays import make_array_data

NAMES = ("first", "second", "third")  # of up to three origins, sorted


class BatchedCells:
    """Cells of K kinds and G batches.

    Attributes:
        counts: (cells, genes) CSR.
        kinds, origins: (cells,).
        offsets: (origins, genes), the mean over cells taken off.
    """

    def __init__(self, n=300, p=60, k=2, g=2, *, spread=0.6, seed=0, missing=None):
        rng = np.random.default_rng(seed)
        self.kinds, self.origins = rng.integers(k, size=n), rng.integers(g, size=n)
        if missing is not None:  # a kind that is not in a batch
            kind, origin = missing
            gone = (self.kinds == kind) & (self.origins == origin)
            self.origins[gone] = (origin + 1) % g
        self.n_origins, self.n_components = g, k
        log_mean = rng.normal(-3, 0.7, p) + rng.normal(0, 0.8, (k, p))
        offsets = rng.normal(0, spread, (g, p))
        self.n_cells = np.bincount(self.origins, minlength=g)
        self.offsets = offsets - self.n_cells @ offsets / n
        self.s = rng.lognormal(4, 0.4, n)
        mean = self.s[:, None] * np.exp(log_mean[self.kinds] + offsets[self.origins])
        drawn = rng.poisson(rng.gamma(3.0, mean / 3.0))
        self.counts = sp.csr_matrix(drawn.astype(np.float32))
        self.basis = Basis.of(self.counts, self.s)

    @property
    def data(self):
        """As a reader leaves them, the kinds as labels."""
        data = make_array_data(self.counts, size_factors=self.s, batch=np.array(NAMES)[self.origins])
        return replace(data, labels=self.kinds.astype(str))

    def batches(self, folds=5, *, by_origin=True, seed=0):
        origins = self.origins if by_origin else None
        blocks = fold_blocks(self.s, folds, 100, np.random.default_rng(seed), origins=origins)
        return [self.batch(rows, fold, known=by_origin) for fold, rows in blocks]

    def batch(self, rows, fold=-1, *, known=True):
        origins = self.origins[rows] if known else None
        return CellBatch.build(self.counts, self.s, self.basis, pick=rows, fold=fold, origins=origins)

    def mixture(self, folds=5, **settings):
        settings = MixtureSettings(self.n_components, folds=folds, dtype="float64", **settings)
        mixture = Mixture(self.counts.shape[1], settings, self.n_origins)
        return mixture.attach(self.basis, float(self.s.sum()), torch.from_numpy(self.n_cells))

    @property
    def q(self):
        """(cells, K) the kinds."""
        return torch.eye(self.n_components, dtype=torch.float64)[torch.from_numpy(self.kinds)]

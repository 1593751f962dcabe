"""Counts cut into batches by fold, as mixtures meet them, with every awkward shape in them."""

from __future__ import annotations

import numpy as np
import torch

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.folds import fold_blocks
from nbmix.core.mixture import Mixture
from nbmix.core.settings import MixtureSettings
from nbmix.data.simulate import simulate
from tests.helpers.problems import make_problem


class Data:
    """Counts with their basis, cut into batches by fold."""

    def __init__(self, counts, size_factors, folds=1, *, block_size=50, prior=None, labels=None, seed=0):
        self.counts, self.s = counts, np.asarray(size_factors, dtype=np.float64)
        self.n_cells, self.n_genes = counts.shape
        self.prior = prior
        self.total = float(self.s.sum())
        self.basis = Basis.of(counts, self.s)
        self.blocks = fold_blocks(self.s, folds, block_size, np.random.default_rng(seed))
        self.batches = [
            CellBatch.build(
                counts,
                self.s,
                self.basis,
                pick=rows,
                fold=fold,
                prior=None if prior is None else prior[rows],
                labels=None if labels is None else labels[rows],
            )
            for fold, rows in self.blocks
        ]

    def mixture(self, n_components, **settings):
        settings = MixtureSettings(n_components, **settings)
        return Mixture(self.n_genes, settings).attach(self.basis, self.total)

    @property
    def whole(self):
        return CellBatch.build(self.counts, self.s, self.basis)


def random_q(n_cells, n_components, seed=0, sharpness=1.0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n_cells, n_components, dtype=torch.float64, generator=generator)
    return torch.softmax(sharpness * scores, 1)


def awkward_data(folds=1, n_components=3, **keywords):
    """Unequal depths, an empty cell, a silent gene, counts above 20."""
    problem = make_problem(n_cells=90, n_genes=40, seed=1)
    prior = np.random.default_rng(0).dirichlet(np.ones(n_components), 90)
    return Data(problem.counts, problem.size_factors, folds, prior=prior, **keywords)


def simulated(folds=1, n=300, p=200, k=3, seed=0):
    simulation = simulate(n=n, p=p, k=k, seed=seed)
    return Data(simulation.counts, np.full(n, simulation.size_factor), folds), simulation

"""Statistics, components and priors for the M step, with every awkward shape in them."""

from __future__ import annotations

import numpy as np
import torch

from nbmix.core.kernels.blocks import GENES_AT_ONCE
from nbmix.core.parameters import Components, GenePrior
from nbmix.core.statistics import SufficientStatistics
from tests.helpers.problems import make_problem


def statistics_of(problem, n_components, sharpness=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n_cells = problem.counts.shape[0]
    scores = torch.randn(n_cells, n_components, dtype=torch.float64, generator=generator)
    q = torch.softmax(sharpness * scores, 1)
    return SufficientStatistics.collect(problem.batch, problem.basis, q, torch.float64)


def random_components(n_components, n_genes, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n_components, n_genes)
    return Components(
        torch.from_numpy(rng.uniform(-16, -3, shape)), torch.from_numpy(rng.uniform(-8, 12, shape))
    )


PRIOR_ENDS = ((-12, -6), (0.01, 2), (-1, 2))


def a_prior(n_genes, seed=0):
    rng = np.random.default_rng(seed)
    centre, variance, disp = (torch.from_numpy(rng.uniform(*ends, n_genes)) for ends in PRIOR_ENDS)
    return GenePrior(centre, variance, disp, torch.tensor(2.0, dtype=torch.float64), torch.zeros(3))


class Case:
    """Statistics with one awkward shape in them."""

    def __init__(self, name):
        n_genes, n_components, keywords = 25, 3, {}
        if name == "one component":
            n_components = 1
        elif name == "many genes":  # more than one range of rows
            n_genes = 2 * GENES_AT_ONCE + 7
        elif name == "high counts":
            keywords = {"size_factors": (1e5, 1e7)}
        elif name == "one node":
            keywords = {"size_factors": (1e4, 1e4)}
        self.n_genes, self.n_components = n_genes, n_components
        self.problem = make_problem(40, n_genes, n_components, 3, **keywords)
        self.basis = self.problem.basis
        self.total = float(self.problem.size_factors.sum())
        sharpness = 30.0 if name == "hardly any cells" else 2.0
        self.statistics = statistics_of(self.problem, n_components, sharpness)
        if name == "no cells":
            self.statistics = SufficientStatistics.zeros(self.basis, n_components, "cpu")


CASES = (
    "plain",
    "one component",
    "many genes",
    "high counts",
    "one node",
    "hardly any cells",
    "no cells",
)

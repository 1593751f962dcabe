"""Deep models so small that brute force can follow them."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import nbinom

from tests.helpers.problems import Problem, make_problem


def toy(kind, **settings) -> tuple[torch.nn.Module, Problem]:
    """A float64 model of 3 components with weights that do something, and 6 cells of 7 genes for it."""
    problem = make_problem(n_cells=6, n_genes=7, size_factors=(1e2, 1e3), deepest=30)
    torch.manual_seed(0)
    genes = np.array([f"g{j}" for j in range(7)])
    model = kind(genes, **({"n_components": 3, "n_hidden": 8} | settings)).double()
    model.mixture.attach(problem.basis, 1.0)
    with torch.no_grad():
        model.decoder.out.weight.normal_(std=0.5)
        model.decoder.log_inv_disp.normal_()
        model.decoder.log_unit.fill_(-3.0)
        model.mixture.log_weights.normal_()
        for name, parameter in model.named_parameters():
            if name.endswith("prior_log_sd"):
                parameter.normal_(std=0.3)
    return model, problem


def log_likelihoods(model, problem: Problem, z: torch.Tensor, size_factors=None) -> torch.Tensor:
    """(cells,) ln p(x_i | z_i) by SciPy."""
    sizes = problem.size_factors if size_factors is None else size_factors
    inv_disp = model.log_inv_disp.detach().exp().numpy()
    mean = np.reshape(sizes, (-1, 1)) * model.decoder.log_mean(z).exp().numpy()
    pmf = nbinom.logpmf(problem.counts.toarray(), inv_disp, 1 / (1 + mean / inv_disp))
    return torch.from_numpy(pmf.sum(1))


def mean_and_error(draws: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over draws and its standard error, (cells,) each."""
    stacked = torch.stack(draws)
    return stacked.mean(0), stacked.std(0) / len(draws) ** 0.5

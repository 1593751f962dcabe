"""How far the groups of single cells can be doubted: by a second group, and by no group fitting at all.

*Between groups.* Let q_1 >= q_2 be a cell's two largest probabilities. The margin is ln q_1 - ln q_2 in nats,
and a cell is ambiguous where it is below ln 9: of two groups the better one has less than 0.9.

*No group.* What groups say of a cell is compared with what two others would that are made of the same genes,
at the cell's own size factor. One is the average cell: with w_c = pi_c / sum pi the Gamma with mean and
variance of all expression,

    mu_0 = sum_c w_c mu_c,    mu_0^2 / r_0 = sum_c w_c mu_c^2 (1 + 1 / r_c) - mu_0^2

the other is one half of the cell's component and one half of the average cell, as a doublet has it:

    mu_0c = (mu_c + mu_0) / 2,    mu_0c^2 / r_0c = (mu_c^2 / r_c + mu_0^2 / r_0) / 4

    misfit_i = ln [ p(x_i | 0) / 2 + sum_c pi_ic p(x_i | 0c) / 2 ] - ln sum_c pi_ic p(x_i | c)

A kind of cell that the fit has not met has the genes of each group at a wrong level, but within what they
vary by between groups. Depth is in all three likelihoods alike.

*Its threshold.* What stands in the first logarithm is a probability of counts, so that the ratio has a mean
of 1 over cells x of the mixture, whatever their depth, and by Markov's inequality

    P(misfit >= ln 1000) <= 1 / 1000    for a cell that is of the mixture.

Genes that vary together within a kind, and errors of the components, can make it more: see
benchmarks/RESULTS.md. A cell's own likelihood, compared with those of its group, would see far less: its
noise is that of thousands of genes that are alike in all kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nbmix.core.batch import CellBatch
from nbmix.core.joins import group_components
from nbmix.core.mixture import Mixture
from nbmix.core.parameters import Components

AMBIGUOUS_BELOW = math.log(9)  # odds of 9 to 1: a probability of 0.9 among two groups

MISFIT_FROM = math.log(1000)  # a cell in 1,000 of the mixture at most

LEAST_PROBABILITY = np.finfo(np.float64).tiny  # margins end at 708 nats


class Doubt(NamedTuple):
    """Of cells, (cells,) each.

    Attributes:
        second: the group with the second largest probability; -1 where there is one group.
        margin: ln q_1 - ln q_2 in nats, 0 to 708; infinite where there is one group.
        misfit: see above, nats; NaN where a model has no likelihoods of components.
    """

    second: NDArray[np.int64]
    margin: NDArray[np.float64]
    misfit: NDArray[np.float64]

    @property
    def is_ambiguous(self) -> NDArray[np.bool_]:
        return self.margin < AMBIGUOUS_BELOW

    @property
    def fits_no_group(self) -> NDArray[np.bool_]:
        return self.misfit >= MISFIT_FROM


def second_best(probabilities: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """``Doubt.second`` and ``Doubt.margin`` of probabilities (cells, K).

    >>> second_best(np.array([[0.9, 0.1], [0.2, 0.8]]))[0]
    array([1, 0])
    """
    q = np.asarray(probabilities, dtype=np.float64)
    n_cells, n_groups = q.shape
    if n_groups == 1:
        return np.full(n_cells, -1), np.full(n_cells, np.inf)
    cells, first = np.arange(n_cells), q.argmax(1)  # the first of equals, as assignments are
    others = q.copy()
    others[cells, first] = -1
    second = others.argmax(1)
    logs = (np.log(np.maximum(q[cells, k], LEAST_PROBABILITY)) for k in (first, second))
    return second, np.subtract(*logs)


def other_components(components: Components, log_weights: Tensor) -> Components:
    """(1 + C, genes) the average cell, and one half of each component with one half of it; see above."""
    log_mean, log_inv_disp = (t.detach().cpu().double() for t in components)
    pooled = group_components(
        log_mean.numpy(), log_inv_disp.numpy(), log_weights.cpu().numpy(), [tuple(range(len(log_mean)))]
    )
    average, inv_disp = (torch.from_numpy(values) for values in pooled)
    half = torch.logaddexp(log_mean, average) - math.log(2)
    log_variance = torch.logaddexp(2 * log_mean - log_inv_disp, 2 * average - inv_disp) - math.log(4)
    return Components(torch.cat([average, half]), torch.cat([inv_disp, 2 * half - log_variance]))


@torch.no_grad()
def misfits(
    mixture: Mixture, batches: Iterable[CellBatch], log_likelihood: Tensor, unseen_log_likelihood: Tensor
) -> NDArray[np.float64]:
    """``Doubt.misfit`` (cells,), by the copy of the components that has not seen a cell, where there is one.

    One pass over the counts, which costs what an E step with one component more does.

    Args:
        mixture: with the basis of the batches attached.
        batches: of all cells, each once.
        log_likelihood: (cells,) ln p(x_i) under the components of all cells, nats.
        unseen_log_likelihood: (cells,) under the copy that has not seen the cell; NaN where there is none.
    """
    found = np.full(len(log_likelihood), np.nan)
    device = mixture.log_mean.device
    known: tuple[tuple[int, bool], Callable[[CellBatch], Tensor]] | None = None
    for each in batches:
        if not each.n_cells:
            continue
        batch, copy = each.to(device), mixture.copy_for(each.fold)
        by_origin = each.origins is not None
        if known is None or known[0] != (copy, by_origin):
            # an offset that all components share is one of what they are averaged to
            others = other_components(mixture.components(copy), mixture.log_weights[copy])
            others = Components(*(t.to(device) for t in others))
            known = (copy, by_origin), mixture.likelihood_of(others, copy, by_origin=by_origin)
        of_others = known[1](batch)  # (cells, 1 + C)
        halves = torch.logsumexp(of_others[:, 1:] + mixture.log_prior(batch, copy), 1)
        either = torch.logaddexp(of_others[:, 0], halves).cpu() - math.log(2)
        rows = each.rows.cpu()
        own = log_likelihood[rows]
        if each.fold >= 0:
            own = torch.where(unseen_log_likelihood[rows].isnan(), own, unseen_log_likelihood[rows])
        found[rows.numpy()] = (either - own).numpy()
    return found

"""The M step: p x K independent problems in two numbers each, log mean and log inverse dispersion.

Each raises its Q of ``nbmix.core.expected_log_likelihood`` from where the component stands. ``NewtonMStep``
maximises all of them at once; ``GradientMStep`` climbs for a number of epochs, as the method's first
implementation did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nbmix.core.batch import Basis, nodes_of_genes
from nbmix.core.declared import Setting, checked
from nbmix.core.expected_log_likelihood import Curvature, ExpectedLogLikelihood, curvature, expected_sums
from nbmix.core.kernels.blocks import GENES_AT_ONCE
from nbmix.core.kernels.expected import N_CURVES
from nbmix.core.kernels.newton import NewtonLimits, newton_rows
from nbmix.core.kernels.threads import over_rows
from nbmix.core.levels import CountLevels
from nbmix.core.newton import LONGEST_STEP, NewtonRule, climb
from nbmix.core.parameters import (
    LOG_INV_DISP_RANGE,
    START_LOG_INV_DISP,
    Components,
    GenePrior,
    lowest_log_mean,
)
from nbmix.core.statistics import SufficientStatistics


def moment_components(statistics: SufficientStatistics, basis: Basis, total_size: float) -> Components:
    """Weighted mean rate per gene, ln(sum q x / sum q s), with a common dispersion: where Newton begins."""
    counts = statistics.rate.sum(2).T.clamp(min=0)  # (K, genes)
    log_mean = torch.log(counts / sizes_of_components(statistics, basis)).clamp(
        min=lowest_log_mean(total_size)
    )
    return Components(log_mean, torch.full_like(log_mean, START_LOG_INV_DISP))


def sizes_of_components(statistics: SufficientStatistics, basis: Basis) -> Tensor:
    """(K, 1) sum of size factors; (K, genes) where genes have nodes of their own, offsets included."""
    node, sizes = statistics.node, torch.exp(basis.nodes.log_nodes)
    found = torch.einsum("jkm,jm->kj", node, sizes) if sizes.dim() == 2 else (node @ sizes)[:, None]
    return found.clamp(min=torch.finfo(torch.float64).tiny)


class FittedComponents(NamedTuple):
    """Components (K, genes), and the curvature of Q, with the prior if there is one, where they stand.

    After Newton its derivatives may be those before a last step, which is short.
    """

    components: Components
    curvature: Curvature


class MStepProblem(NamedTuple):
    """What an M step is to raise Q of, where it begins (K, genes), and the prior if there is one."""

    statistics: SufficientStatistics
    components: Components
    prior: GenePrior | None = None


class MStep(Protocol):
    """Raises Q, with the log density of a prior if there is one, from where the components stand."""

    def __call__(
        self,
        statistics: SufficientStatistics,
        basis: Basis,
        components: Components,
        total_size: float,
        prior: GenePrior | None = None,
    ) -> FittedComponents:
        """New components (K, genes); ``total_size`` is the sum of the data's size factors."""
        ...


@checked("model.m_step")
@dataclass(frozen=True)
class NewtonMStep:
    """Damped Newton, see ``nbmix.core.newton``, over all genes and components; none is ever made worse."""

    tolerance: Annotated[
        float, Setting("A gene is done when its next step promises less than this, in nats.", above=0)
    ] = 1e-5
    max_steps: Annotated[int, Setting("The largest number of Newton steps in each M step.", least=1)] = 50

    def __call__(
        self,
        statistics: SufficientStatistics,
        basis: Basis,
        components: Components,
        total_size: float,
        prior: GenePrior | None = None,
    ) -> FittedComponents:
        if components.log_mean.device.type == "cpu":
            return self.solve(statistics, basis.levels, nodes_of_genes(basis), components, total_size, prior)
        return self.together([MStepProblem(statistics, components, prior)], basis, total_size)[0]

    def solve(
        self,
        statistics: SufficientStatistics,
        levels: CountLevels,
        nodes: np.ndarray,
        components: Components,
        total_size: float,
        prior: GenePrior | None,
    ) -> FittedComponents:
        """As a call, on the CPU, with nodes S_m of every gene's own: (genes, padded), 0 where padded."""
        a, b = (t.double().contiguous().clone() for t in components)
        limits = NewtonLimits(
            self.tolerance, self.max_steps, LONGEST_STEP, lowest_log_mean(total_size), *LOG_INV_DISP_RANGE
        )
        sums = expected_sums(statistics, levels, nodes, prior)
        rows = max(16, 4 * GENES_AT_ONCE // a.shape[0])
        out = torch.empty(N_CURVES, *a.shape, dtype=torch.float64)
        over_rows(newton_rows, a.shape[1], rows, a.numpy(), b.numpy(), sums, limits, out.numpy())
        return FittedComponents(Components(a, b), Curvature(*out))

    def together(
        self, tasks: Sequence[MStepProblem], basis: Basis, total_size: float
    ) -> list[FittedComponents]:
        """Several M steps at once, all their problems in the same torch operations, as a GPU wants them."""
        shapes = [task.components.log_mean.shape for task in tasks]
        sizes = [shape.numel() for shape in shapes]
        problem = ExpectedLogLikelihood.joined(
            [ExpectedLogLikelihood.of(task.statistics, basis, task.prior) for task in tasks]
        )
        log_mean, log_inv_disp = (
            torch.cat([t.double().flatten() for t in of_tasks])
            for of_tasks in zip(*(task.components for task in tasks), strict=True)
        )
        bounds = ((lowest_log_mean(total_size), math.inf), LOG_INV_DISP_RANGE)
        start = torch.stack([log_mean, log_inv_disp], 1)
        low, high = start.new_tensor(bounds).T
        rule = NewtonRule(self.tolerance, self.max_steps)
        fitted = climb(problem, start, low, high, rule).T
        of_tasks = zip(*(t.split(sizes) for t in (*fitted, *problem.curvature(*fitted))), strict=True)
        viewed = ([t.view(shape) for t in flat] for flat, shape in zip(of_tasks, shapes, strict=True))
        return [FittedComponents(Components(a, b), Curvature(*curve)) for a, b, *curve in viewed]


@checked("model.m_step")
@dataclass(frozen=True)
class GradientMStep:
    """Adam on Q for ``num_epochs`` epochs at rate ``lr``, with the analytic gradient; not monotone.

    An epoch costs the same for any number of cells, since the statistics hold all that is needed.
    """

    lr: Annotated[float, Setting("The learning rate of Adam.", above=0)] = 1e-2
    num_epochs: Annotated[int, Setting("The number of steps of Adam in each M step.", least=1)] = 50

    def __call__(
        self,
        statistics: SufficientStatistics,
        basis: Basis,
        components: Components,
        total_size: float,
        prior: GenePrior | None = None,
    ) -> FittedComponents:
        log_mean, log_inv_disp = (t.double().clone().requires_grad_() for t in components)
        optimizer = torch.optim.Adam([log_mean, log_inv_disp], lr=self.lr)
        for _ in range(self.num_epochs):
            now = curvature(statistics, basis, Components(log_mean.detach(), log_inv_disp.detach()), prior)
            log_mean.grad, log_inv_disp.grad = -now.grad_a, -now.grad_b
            optimizer.step()
            with torch.no_grad():
                log_mean.clamp_(min=lowest_log_mean(total_size))
                log_inv_disp.clamp_(*LOG_INV_DISP_RANGE)
        fitted = Components(log_mean.detach(), log_inv_disp.detach())
        return FittedComponents(fitted, curvature(statistics, basis, fitted, prior))

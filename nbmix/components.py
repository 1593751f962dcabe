"""The M step: p x K independent problems in two numbers each, log mean and log inverse dispersion.

For one gene of one component, with a = ln mu, b = ln r and the statistics A_m, B_c, R_m,

    Q(a, b) = a sum_m A_m + sum_c B_c D(c, r) - sum_m (A_m + r R_m) ln(1 + S_m e^{a - b}),

whose gradient and 2 x 2 Hessian are sums of the same size. ``NewtonMStep`` maximises all of them at once;
``GradientMStep`` climbs for a number of epochs, as the method's first implementation did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from nbmix.errors import InputError
from nbmix.kernels import N_CURVES, curvature_rows, newton_rows, over_rows, slope_rows
from nbmix.products import (
    GENES_AT_ONCE,
    WIDEST_SOFTPLUS,
    Basis,
    CountLevels,
    LikelihoodTables,
    nodes_of_genes,
)
from nbmix.special import level_curve, tail_curve
from nbmix.statistics import SufficientStatistics

LOG_INV_DISP_RANGE = (-8.0, 12.0)  # from all-or-nothing to Poisson; beyond them the likelihood is flat
FEWEST_COUNTS = 1e-3  # a mean explains at least this many counts in the whole data, so that it stays finite
START_LOG_INV_DISP = 1.0
PLATEAU_STEP = 3.0  # in ln r


class Components(NamedTuple):
    """K components: (K, genes) float64 ln mu, per unit of size factor, and ln of the inverse dispersion."""

    log_mean: Tensor
    log_inv_disp: Tensor


class Curvature(NamedTuple):
    """Value, gradient and Hessian of Q at (a, b), elementwise, in nats."""

    value: Tensor
    grad_a: Tensor
    grad_b: Tensor
    hess_aa: Tensor
    hess_ab: Tensor
    hess_bb: Tensor


class GenePrior(NamedTuple):
    """What components are expected to be: ln mu_kj ~ N(m_j, tau_j^2), ln r_kj ~ N(b_j, sigma^2).

    Attributes:
        log_mean: (genes,) m, the pooled gene's.
        log_mean_variance: (genes,) tau^2.
        log_inv_disp: (genes,) b, what a gene's components have in common.
        log_inv_disp_variance: () sigma^2.
        trend: (3,) t_0, t_1 and omega^2 of b_j ~ N(t_0 + t_1 m_j, omega^2).
    """

    log_mean: Tensor
    log_mean_variance: Tensor
    log_inv_disp: Tensor
    log_inv_disp_variance: Tensor
    trend: Tensor

    def log_density(self, components: Components) -> Tensor:
        """(K, genes) nats, without the normalising constant."""
        from_mean = (components.log_mean - self.log_mean) ** 2 / self.log_mean_variance
        from_disp = (components.log_inv_disp - self.log_inv_disp) ** 2 / self.log_inv_disp_variance
        return -(from_mean + from_disp) / 2


@dataclass
class ExpectedLogLikelihood:
    """Q of many (gene, component) problems laid out flat, so that converged ones can be dropped.

    Attributes:
        log_nodes: (nodes,).
        rate, node: (nodes, problems) A_m and R_m.
        low_at, low_level, low_weight: the levels t with a weight: their problem, t, and total weight of
            counts above t.
        high_at, high_count, high_weight: likewise for the larger counts, each with its own weight.
        prior: (4, problems) centre and precision of a, then of b, whose log density is added; or None.
    """

    log_nodes: Tensor
    rate: Tensor
    node: Tensor
    low_at: Tensor
    low_level: Tensor
    low_weight: Tensor
    high_at: Tensor
    high_count: Tensor
    high_weight: Tensor
    prior: Tensor | None = None

    @classmethod
    def of(
        cls, statistics: SufficientStatistics, basis: Basis, prior: GenePrior | None = None
    ) -> ExpectedLogLikelihood:
        """The problems of all components and genes, component by component."""
        n_genes, n_components, n_nodes = statistics.rate.shape
        levels = basis.levels
        offset = torch.arange(n_components, device=levels.gene.device) * n_genes
        weight = levels.reaching(statistics.pair) * (levels.level > 0)[:, None]  # (low pairs, K)
        low, low_k = torch.nonzero(weight, as_tuple=True)
        high_weight = statistics.pair[levels.n_low :]
        high, high_k = torch.nonzero(high_weight, as_tuple=True)
        return cls(
            basis.nodes.log_nodes,
            statistics.rate.permute(2, 1, 0).reshape(n_nodes, -1),
            statistics.node.T[:, :, None].expand(-1, -1, n_genes).reshape(n_nodes, -1),
            levels.gene[low] + offset[low_k],
            levels.level[low],
            weight[low, low_k],
            levels.high_gene[high] + offset[high_k],
            levels.high_count[high],
            high_weight[high, high_k],
            None if prior is None else _flat_prior(prior, n_components),
        )

    @classmethod
    def joined(cls, parts: Sequence[ExpectedLogLikelihood]) -> ExpectedLogLikelihood:
        """The problems of all ``parts``, which have the same nodes, one part after another."""
        first, sizes = parts[0], [part.rate.shape[1] for part in parts]
        begins = [sum(sizes[:number]) for number in range(len(parts))]

        def along(name: str, dim: int = 0, *, shifted: bool = False) -> Tensor:
            of_parts = [getattr(part, name) for part in parts]
            if shifted:
                of_parts = [at + begin for at, begin in zip(of_parts, begins, strict=True)]
            return torch.cat(of_parts, dim)

        return cls(
            first.log_nodes,
            along("rate", 1),
            along("node", 1),
            along("low_at", shifted=True),
            along("low_level"),
            along("low_weight"),
            along("high_at", shifted=True),
            along("high_count"),
            along("high_weight"),
            None if first.prior is None else along("prior", 1),
        )

    def subset(self, keep: Tensor) -> ExpectedLogLikelihood:
        """The problems where the mask ``keep`` holds, in their order."""
        place = torch.cumsum(keep, 0) - 1
        low, high = keep[self.low_at], keep[self.high_at]
        return ExpectedLogLikelihood(
            self.log_nodes,
            self.rate[:, keep],
            self.node[:, keep],
            place[self.low_at[low]],
            self.low_level[low],
            self.low_weight[low],
            place[self.high_at[high]],
            self.high_count[high],
            self.high_weight[high],
            None if self.prior is None else self.prior[:, keep],
        )

    def value(self, log_mean: Tensor, log_inv_disp: Tensor) -> Tensor:
        """Q per problem, nats."""
        return self.curvature(log_mean, log_inv_disp).value

    def curvature(self, log_mean: Tensor, log_inv_disp: Tensor) -> Curvature:
        """Q with its gradient and Hessian in (a, b) at flat ``log_mean``, ``log_inv_disp`` (problems,)."""
        a, b = log_mean, log_inv_disp
        r = torch.exp(b)
        z = self.log_nodes[:, None] + (a - b)  # (nodes, problems)
        grown, share = softplus(z, threshold=WIDEST_SOFTPLUS), torch.sigmoid(z)
        zeros = r * self.node
        both = self.rate + zeros
        total = self.rate.sum(0)
        bent = (both * share * (1 - share)).sum(0)
        zero_share = (zeros * share).sum(0)
        value = a * total - (both * grown).sum(0)
        grad_a = total - (both * share).sum(0)
        grad_b = (both * share).sum(0) - (zeros * grown).sum(0)
        hess_bb = 2 * zero_share - (zeros * grown).sum(0) - bent
        for at, weight, curve in (
            (self.low_at, self.low_weight, level_curve(self.low_level, b[self.low_at])),
            (self.high_at, self.high_weight, tail_curve(self.high_count, b[self.high_at])),
        ):
            value = value.index_add(0, at, weight * curve.value)
            grad_b = grad_b.index_add(0, at, weight * curve.first)
            hess_bb = hess_bb.index_add(0, at, weight * curve.second)
        hess_aa = -bent
        if self.prior is not None:
            centre_a, precision_a, centre_b, precision_b = self.prior
            off_a, off_b = a - centre_a, b - centre_b
            value = value - (precision_a * off_a**2 + precision_b * off_b**2) / 2
            grad_a, grad_b = grad_a - precision_a * off_a, grad_b - precision_b * off_b
            hess_aa, hess_bb = hess_aa - precision_a, hess_bb - precision_b
        return Curvature(value, grad_a, grad_b, hess_aa, bent - zero_share, hess_bb)


def curvature(
    statistics: SufficientStatistics, basis: Basis, components: Components, prior: GenePrior | None = None
) -> Curvature:
    """Q, and the log density of a prior, with gradient and Hessian at ``components``: (K, genes) each."""
    shape = components.log_mean.shape
    if components.log_mean.device.type != "cpu":
        problem = ExpectedLogLikelihood.of(statistics, basis, prior)
        flat = problem.curvature(*(t.double().flatten() for t in components))
        return Curvature(*(t.view(shape) for t in flat))
    out = torch.empty(N_CURVES, *shape, dtype=torch.float64)
    a, b = (t.detach().double().contiguous().numpy() for t in components)
    arguments = _kernel_arguments(statistics, basis.levels, nodes_of_genes(basis), prior)
    over_rows(curvature_rows, shape[1], GENES_AT_ONCE, a, b, *arguments, out.numpy())
    return Curvature(*out)


def slope(
    statistics: SufficientStatistics, basis: Basis, components: Components, tables: LikelihoodTables
) -> tuple[Tensor, Tensor]:
    """Gradient of Q in ln mu and ln r, (K, genes) each, at the components that ``tables`` were made of."""
    if components.log_mean.device.type != "cpu":
        found = curvature(statistics, basis, components)
        return found.grad_a, found.grad_b
    out = torch.empty(2, *components.log_mean.shape, dtype=torch.float64)
    a, b = (t.detach().double().contiguous().numpy() for t in components)
    *arguments, _ = _kernel_arguments(statistics, basis.levels, nodes_of_genes(basis), None)
    over_rows(slope_rows, a.shape[1], GENES_AT_ONCE, a, b, *arguments, tables.grown.numpy(), out.numpy())
    return out[0], out[1]


def _kernel_arguments(
    statistics: SufficientStatistics,
    levels: CountLevels,
    nodes: np.ndarray,
    prior: GenePrior | None,
) -> tuple[np.ndarray, ...]:
    """What the compiled loops of ``nbmix.kernels`` take after the components; nodes: (genes, padded) S_m."""
    node = np.zeros((statistics.node.shape[0], nodes.shape[1]))
    node[:, : statistics.node.shape[1]] = statistics.node.numpy()
    beliefs = np.zeros((4, levels.n_genes)) if prior is None else _flat_prior(prior, 1).contiguous().numpy()
    return (
        nodes,
        statistics.rate.contiguous().numpy(),
        node,
        statistics.pair.contiguous().numpy(),
        levels.first.numpy(),
        levels.high_first.numpy(),
        levels.high_count.numpy(),
        beliefs,
    )


def _flat_prior(prior: GenePrior, n_components: int) -> Tensor:
    rows = (
        prior.log_mean,
        1 / prior.log_mean_variance,
        prior.log_inv_disp,
        (1 / prior.log_inv_disp_variance).expand_as(prior.log_mean),
    )
    return torch.stack(rows).repeat(1, n_components)


def expected_log_likelihood(statistics: SufficientStatistics, basis: Basis, components: Components) -> Tensor:
    """(K,) nats: sum_ij q_ik ln NB(x_ij), less what no component depends on (the batches' ``constant``)."""
    return curvature(statistics, basis, components).value.sum(1)


def lowest_log_mean(total_size: float) -> float:
    """Floor of ln mu where a gene is silent in a component: FEWEST_COUNTS over the summed size factors."""
    return math.log(FEWEST_COUNTS / total_size)


def moment_components(statistics: SufficientStatistics, basis: Basis, total_size: float) -> Components:
    """Weighted mean rate per gene, ln(sum q x / sum q s), with a common dispersion: where Newton begins."""
    counts = statistics.rate.sum(2).T.clamp(min=0)  # (K, genes)
    size = (statistics.node @ torch.exp(basis.nodes.log_nodes)).clamp(min=torch.finfo(torch.float64).tiny)
    log_mean = torch.log(counts / size[:, None]).clamp(min=lowest_log_mean(total_size))
    return Components(log_mean, torch.full_like(log_mean, START_LOG_INV_DISP))


class Fit(NamedTuple):
    """Components (K, genes), and the curvature of Q, with the prior if there is one, where they stand."""

    components: Components
    curvature: Curvature


class Task(NamedTuple):
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
    ) -> Fit:
        """New components (K, genes); ``total_size`` is the sum of the data's size factors."""
        ...


@dataclass(frozen=True)
class NewtonMStep:
    """Damped Newton over all genes and components at once; no element is ever made worse.

    Where the Hessian is not negative definite its eigenvalues are shifted below zero
    (Nocedal & Wright 2006, section 3.4); a step that lowers Q is taken back and damped more.

    Attributes:
        tolerance: an element is done when its next step promises less than this, in nats.
        max_steps: Newton steps at most.
        longest: bound on one step in ln mu and ln r.
    """

    tolerance: float = 1e-5
    max_steps: int = 50
    longest: float = 3.0

    def __post_init__(self) -> None:
        if not self.tolerance > 0 or self.max_steps < 1 or not self.longest > 0:
            raise InputError("model.m_step: tolerance, max_steps and longest must be above 0")

    def __call__(
        self,
        statistics: SufficientStatistics,
        basis: Basis,
        components: Components,
        total_size: float,
        prior: GenePrior | None = None,
    ) -> Fit:
        if components.log_mean.device.type == "cpu":
            return self.solve(statistics, basis.levels, nodes_of_genes(basis), components, total_size, prior)
        return self.together([Task(statistics, components, prior)], basis, total_size)[0]

    def solve(
        self,
        statistics: SufficientStatistics,
        levels: CountLevels,
        nodes: np.ndarray,
        components: Components,
        total_size: float,
        prior: GenePrior | None,
    ) -> Fit:
        """As a call, on the CPU, with nodes S_m of every gene's own: (genes, padded), 0 where padded."""
        a, b = (t.double().contiguous().clone() for t in components)
        limits = (
            self.tolerance,
            self.longest,
            PLATEAU_STEP,
            lowest_log_mean(total_size),
            *LOG_INV_DISP_RANGE,
        )
        arguments = _kernel_arguments(statistics, levels, nodes, prior)
        rows = max(16, 4 * GENES_AT_ONCE // a.shape[0])
        out = torch.empty(N_CURVES, *a.shape, dtype=torch.float64)
        arrays = (a.numpy(), b.numpy(), *arguments)
        over_rows(newton_rows, a.shape[1], rows, *arrays, limits, self.max_steps, out.numpy())
        return Fit(Components(a, b), Curvature(*out))

    def together(self, tasks: Sequence[Task], basis: Basis, total_size: float) -> list[Fit]:
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
        fitted = self._climb(problem, log_mean, log_inv_disp, lowest_log_mean(total_size))
        of_tasks = zip(*(t.split(sizes) for t in (*fitted, *problem.curvature(*fitted))), strict=True)
        viewed = ([t.view(shape) for t in flat] for flat, shape in zip(of_tasks, shapes, strict=True))
        return [Fit(Components(a, b), Curvature(*curve)) for a, b, *curve in viewed]

    def _climb(
        self, problem: ExpectedLogLikelihood, a: Tensor, b: Tensor, floor: float
    ) -> tuple[Tensor, Tensor]:
        """(problems,) ln mu and ln r, from where they are given."""
        low_b, high_b = LOG_INV_DISP_RANGE
        best_a, best_b = a.clamp(min=floor), b.clamp(low_b, high_b)
        left = torch.arange(best_a.numel(), device=best_a.device)
        a, b = best_a.clone(), best_b.clone()
        now = problem.curvature(a, b)
        damping, going = torch.zeros_like(a), torch.ones_like(a, dtype=torch.bool)
        for _ in range(self.max_steps):
            pinned_a = (a <= floor) & (now.grad_a <= 0)
            pinned_b = ((b <= low_b) & (now.grad_b <= 0)) | ((b >= high_b) & (now.grad_b >= 0))
            step_a, step_b, gain = _newton_step(now, pinned_a, pinned_b, damping)
            going = going & (gain > self.tolerance)
            n_going = int(going.sum())
            if n_going == 0:
                break
            if 2 * n_going <= going.numel():  # picking them out is worth it
                best_a[left], best_b[left] = a, b
                left, a, b, damping = left[going], a[going], b[going], damping[going]
                step_a, step_b = step_a[going], step_b[going]
                problem = problem.subset(going)
                now, going = Curvature(*(t[going] for t in now)), going[going]
            else:
                step_a, step_b = torch.where(going, step_a, 0.0), torch.where(going, step_b, 0.0)
            next_a = (a + step_a.clamp(-self.longest, self.longest)).clamp(min=floor)
            next_b = (b + step_b.clamp(-self.longest, self.longest)).clamp(low_b, high_b)
            then = problem.curvature(next_a, next_b)
            better = then.value >= now.value
            a, b = torch.where(better, next_a, a), torch.where(better, next_b, b)
            scale = torch.maximum(now.hess_aa.abs(), now.hess_bb.abs())
            damping = torch.where(better, damping / 8, torch.maximum(damping * 8, scale * 0.1))
            now = Curvature(*(torch.where(better, new, old) for new, old in zip(then, now, strict=True)))
        best_a[left], best_b[left] = a, b
        return best_a, best_b


def _newton_step(
    now: Curvature, pinned_a: Tensor, pinned_b: Tensor, damping: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Uphill steps in a and b, and the rise that the quadratic promises."""
    grad_a = torch.where(pinned_a, 0.0, now.grad_a)
    grad_b = torch.where(pinned_b, 0.0, now.grad_b)
    off = torch.where(pinned_a | pinned_b, 0.0, -now.hess_ab)
    aa = torch.where(pinned_a, 1.0, -now.hess_aa)
    bb = torch.where(pinned_b, 1.0, -now.hess_bb)
    middle, radius = (aa + bb) / 2, torch.hypot((aa - bb) / 2, off)
    least = 1e-6 * (middle.abs() + radius) + 1e-12
    shift = (least - (middle - radius)).clamp(min=0) * 2 + damping
    aa, bb = aa + shift, bb + shift
    determinant = aa * bb - off * off
    step_a = (bb * grad_a - off * grad_b) / determinant
    step_b = (aa * grad_b - off * grad_a) / determinant
    gain = (grad_a * step_a + grad_b * step_b) / 2
    # on the plateau towards Poisson Q is about Q_0 + C e^-b, convex: gradient and curvature vanish far from
    # the optimum, so step down by all that is allowed, for what the exponential promises further down
    plateau = ~pinned_b & (now.hess_bb > 0) & (grad_b < 0) & (damping == 0)
    step_b = torch.where(plateau, -PLATEAU_STEP, step_b)
    gain = torch.where(plateau, torch.maximum(gain, -grad_b * math.expm1(2 * PLATEAU_STEP)), gain)
    return step_a, step_b, gain


@dataclass(frozen=True)
class GradientMStep:
    """Adam on Q for ``num_epochs`` epochs at rate ``lr``, with the analytic gradient; not monotone.

    An epoch costs the same for any number of cells, since the statistics hold all that is needed.
    """

    lr: float = 1e-2
    num_epochs: int = 50

    def __post_init__(self) -> None:
        if not self.lr > 0 or self.num_epochs < 1:
            raise InputError("model.m_step: lr must be above 0 and num_epochs 1 or more")

    def __call__(
        self,
        statistics: SufficientStatistics,
        basis: Basis,
        components: Components,
        total_size: float,
        prior: GenePrior | None = None,
    ) -> Fit:
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
        return Fit(fitted, curvature(statistics, basis, fitted, prior))

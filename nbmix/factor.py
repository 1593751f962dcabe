"""A mixture whose cells also vary in ways that all components share.

Genes of one programme (cytotoxic granules, interferon, the cell cycle) rise and fall together among cells of
one kind. To a mixture whose genes are independent given the component, each of these genes is evidence of its
own, so that splitting a kind along the programme pays more than telling two kinds apart. Likewise where
expression is not proportional to the size factor. Here a cell has scores z_i on a few axes with loadings v_j,
and a gene its own power of the size factor, 1 + g_j, around their geometric mean s_0:

    ln E[x_ij | k, z] = ln s_i + g_j ln(s_i / s_0) + ln mu_kj + v_j z_i,    z_i ~ N(0, 1) on each axis
    ln p(x_i) = ln sum_k sum_l pi_k h_l NB(x_i | k, z_l),    z_l, h_l Gauss-Hermite nodes and weights

a mixture of factor analysers with common loadings (Baek, McLachlan & Flack 2010) for counts, exact by
enumeration of the levels z_l; Hafemeister & Satija (2019) fit such powers gene by gene. The E step is that of
K L components. In the M step levels act on a gene like nodes of the size factor: at each node and level

    ln S_jml = ln S_m + g_j ln(S_m / s_0) + v_j z_l

stands for ln S_m; ln mu and ln r are then fitted as in ``nbmix.components``, and (g_j, v_j), in which the
expected log likelihood is concave, by Newton. All of them are drawn around 0 with variances that are learned.

Starts search with it; what they find is fitted by ``nbmix.mixture``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from nbmix.components import Components, GenePrior, NewtonMStep
from nbmix.errors import InputError
from nbmix.kernels import loading_rows, over_rows
from nbmix.mixture import WEIGHT_PSEUDO_CELLS, StoppingRule
from nbmix.prior import first_prior, update_prior
from nbmix.products import (
    GENES_AT_ONCE,
    Basis,
    CellBatch,
    LikelihoodTables,
    batch_log_likelihood,
    largest_value,
    padded_nodes,
    pair_table,
    tabulate_nodes,
)
from nbmix.statistics import SufficientStatistics

FIRST_LOADING_VARIANCE = 0.05  # as of ln mu between components
LEAST_LOADING_VARIANCE = 1e-6
LOADING_STEPS = 2  # of Newton for every M step
FIRST_ROUNDS = 3  # of loadings and components in the first M step, which begins at no loading


@dataclass(frozen=True)
class FactorCopy:
    """Parameters that were fitted without one fold.

    Attributes:
        components: (K, genes) ln mu at z = 0 and s = s_0, and ln r.
        loadings: (genes, 1 + axes) g, then v.
        loading_variance: (1 + axes,) of the loadings around 0.
        log_weights: (K,) ln pi.
        prior: of the components.
    """

    components: Components
    loadings: Tensor
    loading_variance: Tensor
    log_weights: Tensor
    prior: GenePrior


class FactorMixture:
    """K components and shared axes, cross-fitted: a cell's posterior is from the copy without its fold.

    Args:
        basis: of the cells that are fitted.
        n_components: K.
        size_factors: (cells,) of these cells.
        folds: 2 or more; the batches' folds.
        n_axes: of variation that components share; with 0 there are powers of the size factor alone.
        n_levels: of each axis.
        given_weights: the batches' ``log_prior`` stands for ln pi.
        m_step: of the components.
    """

    def __init__(
        self,
        basis: Basis,
        n_components: int,
        size_factors: np.ndarray,
        *,
        folds: int = 5,
        n_axes: int = 1,
        n_levels: int = 3,
        given_weights: bool = False,
        m_step: NewtonMStep | None = None,
    ) -> None:
        self.basis, self.n_components, self.folds = basis, n_components, folds
        self.given_weights = given_weights
        self.m_step = m_step or NewtonMStep()
        self.total_size = float(size_factors.sum())
        on_axis, weights = hermegauss(n_levels)
        grid = list(itertools.product(range(n_levels), repeat=n_axes))
        self.levels = torch.from_numpy(on_axis)[torch.tensor(grid, dtype=torch.long)]  # (L, axes)
        share = np.log(weights / weights.sum())
        self.log_level_weights = torch.tensor([share[list(point)].sum() for point in grid])  # (L,)
        positive = size_factors[size_factors > 0]
        centre = float(np.log(positive).mean()) if positive.size else 0.0
        self.depth = basis.nodes.log_nodes - centre  # (nodes,) ln(S_m / s_0)
        self.copies: list[FactorCopy | None] = [None] * folds
        self._statistics = self._empty()

    @property
    def n_levels(self) -> int:
        return len(self.levels)

    def joint(self, batch: CellBatch) -> Tensor:
        """(cells, K, L) ln pi_k + ln h_l + ln p(x_i | k, z_l), by the copy that has not seen the cells."""
        copy = self._copy(batch.fold)
        found = batch_log_likelihood(batch, self.basis, self._tables(copy))
        found = found.view(batch.n_cells, self.n_components, self.n_levels)
        log_prior = batch.log_prior if self.given_weights else copy.log_weights
        if log_prior is None or log_prior.shape[-1] != self.n_components:
            raise InputError(
                "model.weights=given: the data holds no prior of "
                f"{self.n_components} columns; set data.prior_key to such a field of obsm"
            )
        return found + log_prior[..., None] + self.log_level_weights

    def _tables(self, copy: FactorCopy) -> LikelihoodTables:
        """Of K L components."""
        basis, (a, b) = self.basis, copy.components
        powers = copy.loadings[:, :1] * self.depth  # (genes, nodes) g ln(S_m / s_0)
        a = (a[:, None] + self.levels @ copy.loadings[:, 1:].T).flatten(0, 1)  # (K L, genes)
        levels_b = b.repeat_interleave(self.n_levels, 0)
        log_nodes = basis.nodes.log_nodes
        grown, zero = tabulate_nodes(padded_nodes(log_nodes + powers), len(log_nodes), a, levels_b)
        # a count adds ln S + g ln(S / s_0) + ln mu - ln(1 + S rho); the products know of no power
        grown -= powers[:, None]
        pair = pair_table(basis.levels, b).repeat_interleave(self.n_levels, 1)
        largest = largest_value(basis, a, levels_b) + 3 * float(powers.abs().max())
        return LikelihoodTables(a.T.contiguous(), grown, pair, zero, largest, torch.float32)

    def component_joint(self, batches: Sequence[CellBatch], n_cells: int) -> Tensor:
        """(n_cells, K) ln pi_k + ln p(x_i | k), axes summed out; rows as the batches number them."""
        found = torch.empty(n_cells, self.n_components, dtype=torch.float64)
        for batch in batches:
            found[batch.rows] = torch.logsumexp(self.joint(batch), 2)
        return found

    def begin(self) -> None:
        """Forget the statistics of the last iteration."""
        self._statistics = self._empty()

    def collect(self, batch: CellBatch, q: Tensor) -> None:
        """Add cells with responsibilities (cells, K, L) for components and levels."""
        self._statistics[batch.fold].add_batch_(batch, self.basis, q.flatten(1))

    def fit(self) -> None:
        """M step of every copy on the statistics of all other folds."""
        total = self._statistics[0]
        for statistics in self._statistics[1:]:
            total = total + statistics
        for fold in range(self.folds):
            self.copies[fold] = self._fit(total - self._statistics[fold], self.copies[fold])

    def run(
        self,
        batches: Sequence[CellBatch],
        *,
        responsibilities: Tensor | None = None,
        scores: Tensor | None = None,
        max_iterations: int = 20,
        stopping: StoppingRule | None = None,
    ) -> list[float]:
        """EM.

        Args:
            batches: each within one fold.
            responsibilities: (cells, K) that stand in for the first E step; else EM goes on.
            scores: (cells, axes) of mean 0 and variance 1, that stand in with them.
            max_iterations: M steps at most.
            stopping: when to stop early.

        Returns:
            Cross-fitted log likelihood, nats per cell, of each E step.
        """
        trace: list[float] = []
        first = responsibilities
        for _ in range(max_iterations):
            self.begin()
            total, n_cells = 0.0, 0
            for batch in batches:
                if first is not None:
                    assert scores is not None
                    near = self._near(scores[batch.rows])
                    q = first[batch.rows][:, :, None] * near[:, None]
                else:
                    joint = self.joint(batch)
                    own = torch.logsumexp(joint, (1, 2))
                    total += float(own.sum())
                    q = torch.exp(joint - own[:, None, None])
                n_cells += batch.n_cells
                self.collect(batch, q)
            if first is None:
                trace.append(total / n_cells)
                if stopping is not None and stopping.update(trace[-1]):
                    break
            first = None
            self.fit()
        return trace

    def _near(self, scores: Tensor) -> Tensor:
        """(cells, L) posterior of the levels, where scores are seen with a standard deviation of a half."""
        distance = ((scores.double()[:, None] - self.levels) ** 2).sum(2)
        return torch.softmax(self.log_level_weights - 2 * distance, 1)

    def _fit(self, seen: SufficientStatistics, copy: FactorCopy | None) -> FactorCopy:
        shape = (self.n_components, self.n_levels)
        sizes = seen.weight.view(shape).sum(1) + WEIGHT_PSEUDO_CELLS
        log_weights = torch.log(sizes / sizes.sum())
        rounds = 1
        if copy is None:
            rounds = FIRST_ROUNDS
            prior = first_prior(seen, self.basis, self.total_size)
            a = prior.log_mean.expand(self.n_components, -1).contiguous()
            begin = Components(a, prior.log_inv_disp.expand_as(a).contiguous())
            loadings = a.new_zeros(a.shape[1], 1 + self.levels.shape[1])
            variance = torch.full_like(loadings[0], FIRST_LOADING_VARIANCE)
            copy = FactorCopy(begin, loadings, variance, log_weights, prior)
        over_levels = self._over_levels(seen)
        for _ in range(rounds):
            copy = self._fit_components(over_levels, self._fit_loadings(over_levels, copy))
        return replace(copy, log_weights=log_weights)

    def _over_levels(self, seen: SufficientStatistics) -> SufficientStatistics:
        """Statistics of K L components, seen as those of K at L M nodes (level by level)."""
        n_genes, _, n_nodes = seen.rate.shape
        n_components, n_levels = self.n_components, self.n_levels
        return SufficientStatistics(
            seen.rate.view(n_genes, n_components, n_levels * n_nodes),
            seen.pair.view(-1, n_components, n_levels).sum(2),
            seen.node.view(n_components, n_levels * n_nodes),
            seen.weight.view(n_components, n_levels).sum(1),
        )

    def _grid(self) -> tuple[Tensor, Tensor]:
        """At each of the L M nodes: ln S_m, and (1 + axes, ...) what the loadings multiply."""
        log_nodes = self.basis.nodes.log_nodes
        axes = self.levels.T.repeat_interleave(len(log_nodes), 1)
        return log_nodes.repeat(self.n_levels), torch.cat([self.depth.repeat(self.n_levels)[None], axes])

    def _fit_loadings(self, seen: SufficientStatistics, copy: FactorCopy) -> FactorCopy:
        v, bend = copy.loadings.clone(), torch.empty_like(copy.loadings)
        log_nodes, effects = self._grid()
        over_rows(
            loading_rows,
            len(v),
            GENES_AT_ONCE,
            *(t.contiguous().numpy() for t in copy.components),
            v.numpy(),
            *(t.contiguous().numpy() for t in (log_nodes, effects, seen.rate, seen.node)),
            (1 / copy.loading_variance).numpy(),
            LOADING_STEPS,
            bend.numpy(),
        )
        # EM step of the variances (Laplace): E[v^2] = mode^2 + 1 / curvature
        variance = (v**2 + 1 / bend).mean(0).clamp(min=LEAST_LOADING_VARIANCE)
        return replace(copy, loadings=v, loading_variance=variance)

    def _fit_components(self, seen: SufficientStatistics, copy: FactorCopy) -> FactorCopy:
        log_nodes, effects = self._grid()
        nodes = padded_nodes(log_nodes + copy.loadings @ effects)
        levels, total_size = self.basis.levels, self.total_size
        fitted = self.m_step.solve(seen, levels, nodes, copy.components, total_size, copy.prior)
        return replace(copy, components=fitted.components, prior=update_prior(fitted, copy.prior))

    def _copy(self, fold: int) -> FactorCopy:
        copy = self.copies[fold]
        if copy is None:
            raise RuntimeError("a factor mixture begins at responsibilities")
        return copy

    def _empty(self) -> list[SufficientStatistics]:
        n_all = self.n_components * self.n_levels
        return [SufficientStatistics.zeros(self.basis, n_all, "cpu") for _ in range(self.folds)]

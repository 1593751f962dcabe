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

stands for ln S_m; ln mu and ln r are then fitted as in ``nbmix.core.m_step``, and (g_j, v_j), in which the
expected log likelihood is concave, by Newton. All of them are drawn around 0 with variances that are learned.

Where cells come from several batches a gene's size factor has an offset in each, ln s_i + d_gj in place of
ln s_i, see ``nbmix.core.offsets``.

Starts search with it; what they find is fitted by ``nbmix.core.mixture``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.cellwise import CellTables, SharedAxes, cell_log_likelihood, cell_tables
from nbmix.core.em_loop import iterate
from nbmix.core.factor_statistics import FactorStatistics
from nbmix.core.kernels.blocks import GENES_AT_ONCE
from nbmix.core.kernels.factor import LoadingProblem, loading_rows
from nbmix.core.kernels.threads import over_rows
from nbmix.core.m_step import NewtonMStep
from nbmix.core.mixture import Posterior, log_weights_of
from nbmix.core.nodes import padded_nodes
from nbmix.core.offsets import Loadings, OriginMargins
from nbmix.core.origins import CopyParameters, OriginOffsets
from nbmix.core.parameters import Components, GenePrior
from nbmix.core.prior import first_prior, update_prior
from nbmix.core.statistics import SufficientStatistics

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

    An ``EMModel`` whose responsibilities are (cells, K, L), of components and levels.

    Args:
        basis: of the cells that are fitted.
        n_components: K.
        size_factors: (cells,) of these cells.
        folds: 2 or more; the batches' folds.
        n_axes: of variation that components share; with 0 there are powers of the size factor alone.
        n_levels: of each axis.
        given_weights: the batches' ``log_prior`` stands for ln pi.
        origin_cells: (origins,) cells of each batch that they come from, or None.
        m_step: of the components.

    Attributes:
        copies: parameters fitted without each fold; None until an M step.
        statistics: of the cells of each fold.
        origins: their offsets, or None.
    """

    scores_are_comparable = True

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
        origin_cells: np.ndarray | None = None,
        m_step: NewtonMStep | None = None,
    ) -> None:
        self.basis, self.n_components, self.folds = basis, n_components, folds
        self.given_weights = given_weights
        self.components_m_step = m_step or NewtonMStep()
        self.total_size = float(size_factors.sum())
        on_axis, weights = hermegauss(n_levels)
        grid = list(itertools.product(range(n_levels), repeat=n_axes))
        self.levels = torch.from_numpy(on_axis)[torch.tensor(grid, dtype=torch.long)]  # (L, axes)
        share = np.log(weights / weights.sum())
        self.log_level_weights = torch.tensor([share[list(point)].sum() for point in grid])  # (L,)
        positive = size_factors[size_factors > 0]
        self.log_centre = float(np.log(positive).mean()) if positive.size else 0.0  # ln s_0
        self.copies: list[FactorCopy | None] = [None] * folds
        self._tables: dict[int, CellTables] = {}  # by fold, until parameters change
        self.origins: OriginOffsets | None = None
        if origin_cells is not None:
            shape = (folds, len(origin_cells), basis.levels.n_genes)
            self.origins = OriginOffsets(*shape, has_whole=False, n_levels=self.n_levels)
            self.origins.n_cells = torch.from_numpy(origin_cells)
        self.statistics = FactorStatistics(basis, n_components, folds, self.n_levels)

    @property
    def prior(self) -> GenePrior:
        """Of the components, as the copy without the first fold has it."""
        return self._copy(0).prior

    def take_over(self, other: FactorMixture, kept: np.ndarray) -> None:
        """Begin at some of another mixture's components, and its powers of depth, but at none of its axes."""
        self._tables.clear()
        for fold in range(self.folds):
            copy = other._copy(fold)
            loadings, variance = copy.loadings.clone(), copy.loading_variance.clone()
            loadings[:, 1:], variance[1:] = 0.0, FIRST_LOADING_VARIANCE
            components = Components(*(t[kept].contiguous() for t in copy.components))
            self.copies[fold] = FactorCopy(components, loadings, variance, copy.log_weights[kept], copy.prior)
        if self.origins is not None and other.origins is not None:
            self.origins.take_over(other.origins)

    @property
    def n_levels(self) -> int:
        return len(self.levels)

    def joint(self, batch: CellBatch) -> Tensor:
        """(cells, K, L) ln pi_k + ln h_l + ln p(x_i | k, z_l), by the copy that has not seen the cells."""
        copy = self._copy(batch.fold)
        if batch.fold not in self._tables:
            self._tables[batch.fold] = self._tables_of(copy, batch.fold)
        found = cell_log_likelihood(batch, self.basis, self._tables[batch.fold])
        found = found.view(batch.n_cells, self.n_components, self.n_levels)
        log_prior = batch.given_log_prior(self.n_components) if self.given_weights else copy.log_weights
        return found + log_prior[..., None] + self.log_level_weights

    def _tables_of(self, copy: FactorCopy, fold: int) -> CellTables:
        axes, origins = SharedAxes(copy.loadings, self.levels, self.log_centre), self.origins
        if origins is None:
            return cell_tables(self.basis, copy.components, axes)
        return cell_tables(self.basis, copy.components, axes, origins.offsets[fold], origins.base[fold])

    def all_joint(self, batches: Sequence[CellBatch]) -> Tensor:
        """``joint`` of the cells of all batches; rows as the batches number them."""
        n_cells = sum(batch.n_cells for batch in batches)
        found = torch.empty(n_cells, self.n_components, self.n_levels, dtype=torch.float64)
        for batch in batches:
            found[batch.rows] = self.joint(batch)
        return found

    def reset_statistics(self) -> None:
        """Forget the statistics of the last iteration."""
        self.statistics.zero_()
        if self.origins is not None:
            self.origins.reset(self.basis, self.n_components, self.statistics)

    def meet(self, batches: Iterable[CellBatch], responsibilities: Tensor) -> None:
        """Learn first offsets from responsibilities (all rows, K, L), where there is nothing else yet."""
        if self.origins is not None and self.copies[0] is None:
            q, n_origins = responsibilities.sum(2), self.origins.n_origins
            self.origins.begin(OriginMargins.of(batches, self.basis, q, self.folds, n_origins))

    def posterior(self, batch: CellBatch) -> Posterior:
        """E step: responsibilities (cells, K, L), and ln p(x_i)."""
        joint = self.joint(batch)
        log_likelihood = torch.logsumexp(joint, (1, 2))
        return Posterior(torch.exp(joint - log_likelihood[:, None, None]), log_likelihood)

    def collect(self, batch: CellBatch, responsibilities: Tensor) -> None:
        """Add cells with responsibilities (cells, K, L) for components and levels."""
        if self.origins is not None:
            self.origins.add(batch, responsibilities, self._of_copy)
        else:
            self.statistics.add(batch, responsibilities)

    def _of_copy(self, fold: int) -> CopyParameters:
        copy, (_, effects) = self._copy(fold), self._grid(self.basis)
        return CopyParameters(copy.components, Loadings(copy.loadings, effects, self.n_levels))

    def m_step(self, *, warm: bool = True) -> float:
        """Fit every copy to the statistics of all other folds, from where it stands, ``warm`` or not.

        Returns:
            0: the objective is the log likelihood of cells that a copy has not seen.
        """
        self._tables.clear()
        if self.origins is not None:
            self.origins.finish(self._of_copy, range(self.folds))
            for fold in range(self.folds):
                copy = self._fit(self.origins.seen(fold), self.copies[fold])
                self.copies[fold] = _moved(copy, self.origins.centre(fold))
            return 0.0
        total = self.statistics.total()
        for fold in range(self.folds):
            self.copies[fold] = self._fit(self.statistics.without(fold, total), self.copies[fold])
        return 0.0

    def run(self, batches: Sequence[CellBatch], q: Tensor, *, max_iterations: int = 20) -> Tensor:
        """EM that begins at responsibilities and ends at an E step.

        Args:
            batches: each within one fold.
            q: (cells, K, L) responsibilities.
            max_iterations: M steps at most.

        Returns:
            ``all_joint`` of the batches.
        """
        iterate(self, batches, responsibilities=q, max_iterations=max_iterations, last_m_step=False)
        return self.all_joint(batches)

    def spread(self, responsibilities: Tensor, scores: Tensor) -> Tensor:
        """(cells, K, L) of responsibilities (cells, K) and scores (cells, axes) of mean 0 and variance 1.

        Scores are taken as seen with a standard deviation of a half.
        """
        distance = ((scores.double()[:, None] - self.levels) ** 2).sum(2)
        near = torch.softmax(self.log_level_weights - 2 * distance, 1)
        return responsibilities[:, :, None] * near[:, None]

    def _fit(self, seen: SufficientStatistics, copy: FactorCopy | None) -> FactorCopy:
        rounds, log_weights = 1, log_weights_of(seen)
        if copy is None:
            rounds = FIRST_ROUNDS
            prior = first_prior(self._without_levels(seen), self._fit_basis, self.total_size)
            a = prior.log_mean.expand(self.n_components, -1).contiguous()
            begin = Components(a, prior.log_inv_disp.expand_as(a).contiguous())
            loadings = a.new_zeros(a.shape[1], 1 + self.levels.shape[1])
            variance = torch.full_like(loadings[0], FIRST_LOADING_VARIANCE)
            copy = FactorCopy(begin, loadings, variance, log_weights, prior)
        for _ in range(rounds):
            copy = self._fit_components(seen, self.fit_loadings(seen, copy))
        return replace(copy, log_weights=log_weights)

    def _without_levels(self, seen: SufficientStatistics) -> SufficientStatistics:
        """The same cells at the M nodes of the size factor alone."""
        shape = (self.n_levels, -1)
        rate, node = (t.unflatten(-1, shape).sum(-2) for t in (seen.rate, seen.node))
        return SufficientStatistics(rate, seen.pair, node, seen.weight)

    def grid(self) -> tuple[Tensor, Tensor]:
        """At each of the L M nodes: ln S_m, and (1 + axes, ...) what loadings multiply; or of each gene."""
        return self._grid(self._fit_basis)

    @property
    def _fit_basis(self) -> Basis:
        """Of the statistics that parameters are fitted to."""
        return self.basis if self.origins is None else self.origins.fit_basis

    def _grid(self, basis: Basis) -> tuple[Tensor, Tensor]:
        log_nodes = basis.nodes.log_nodes  # (nodes,), or (genes, nodes)
        axes = self.levels.T.repeat_interleave(log_nodes.shape[-1], 1)
        log_nodes = torch.cat([log_nodes] * self.n_levels, -1)
        depth = (log_nodes - self.log_centre)[..., None, :]  # ln(S_m / s_0)
        effects = torch.cat([depth, axes.expand(*log_nodes.shape[:-1], -1, -1)], -2)
        return log_nodes, effects

    def fit_loadings(self, seen: SufficientStatistics, copy: FactorCopy) -> FactorCopy:
        """``LOADING_STEPS`` of Newton on the loadings given the components; then the loadings' variances."""
        v, bend = copy.loadings.clone(), torch.empty_like(copy.loadings)
        log_nodes, effects = self.grid()
        of_genes = (log_nodes, effects, seen.rate, seen.node)
        if log_nodes.dim() == 1:
            of_genes = (log_nodes[None], effects[None], seen.rate, seen.node[None])
        parts = (*of_genes, 1 / copy.loading_variance)
        problem = LoadingProblem(*(t.contiguous().numpy() for t in parts))
        a, b = (t.contiguous().numpy() for t in copy.components)
        arguments = (a, b, problem, LOADING_STEPS, v.numpy(), bend.numpy())
        over_rows(loading_rows, len(v), GENES_AT_ONCE, *arguments)
        # EM step of the variances (Laplace): E[v^2] = mode^2 + 1 / curvature
        bend = torch.maximum(bend, 1 / copy.loading_variance)  # as interpolated counts may fail to be
        variance = (v**2 + 1 / bend).mean(0).clamp(min=LEAST_LOADING_VARIANCE)
        return replace(copy, loadings=v, loading_variance=variance)

    def _fit_components(self, seen: SufficientStatistics, copy: FactorCopy) -> FactorCopy:
        log_nodes, effects = self.grid()
        moved = (copy.loadings[:, None] @ effects)[:, 0] if effects.dim() == 3 else copy.loadings @ effects
        nodes = padded_nodes(log_nodes + moved)
        levels, total_size = self.basis.levels, self.total_size
        fitted = self.components_m_step.solve(seen, levels, nodes, copy.components, total_size, copy.prior)
        return replace(copy, components=fitted.components, prior=update_prior(fitted, copy.prior))

    def _copy(self, fold: int) -> FactorCopy:
        copy = self.copies[fold]
        if copy is None:
            raise RuntimeError("a factor mixture begins at responsibilities")
        return copy


def _moved_by(copy: FactorCopy, offset: Tensor | None) -> FactorCopy:
    """The same with components as cells with an offset (genes,) see them."""
    if offset is None:
        return copy
    a, b = copy.components
    return replace(copy, components=Components(a + (1 + copy.loadings[:, 0]) * offset, b))


def _moved(copy: FactorCopy, mean: Tensor) -> FactorCopy:
    """The same with mean offsets (genes,) in the components."""
    prior = copy.prior._replace(log_mean=copy.prior.log_mean + (1 + copy.loadings[:, 0]) * mean)
    return replace(_moved_by(copy, mean), prior=prior)

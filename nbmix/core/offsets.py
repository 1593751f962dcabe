"""Offsets of genes by origin: the batch, donor or protocol that a cell comes from.

A gene is caught with another efficiency in another batch, and expressed at another level in another donor.
To a mixture without a word for that, each such gene is evidence for a kind of its own. Here

    ln E[x_ij | k, origin g] = ln s_i + ln mu_kj + d_gj,    d_gj ~ N(0, tau_j^2),    sum_g n_g d_gj = 0

with n_g cells of origin g, so that mu_kj is that of the average cell. All components share the offsets; for
what is particular to one kind in one origin is what components are for. They share ln r_kj with all origins,
too: to catch a share of the molecules scales a Gamma and leaves its shape as it is (McCarthy, Chen & Smyth
2012 have one dispersion a gene in all libraries). tau_j^2 is a gene's own, learned from its offsets as that
of ln mu between components is (``nbmix.core.prior``): most genes differ little between donors, and the few
that do, such as those of sex chromosomes, do so by any factor.

To the likelihood of one gene an offset is nothing but another size factor, ln s_i + d_gj. So the statistics
of the cells of an origin are those at nodes ln S_m + d_gj, and interpolation brings them to nodes that all
origins share: the M step does not know of origins, and its cost does not grow with them. Given the
components Q is concave in each offset, which takes a step of Newton on the statistics of its origin alone.

An offset by which the cells of an origin gain next to nothing is left out: a small origin has few. Which may
be worth one is told by sums over cells alone (``screened``), and statistics of an origin are of these genes.
All cells are in the statistics of genes without offsets, from where those of an origin are moved.

Every cross-fitting copy has offsets of its own, fitted without its fold, so that no cell judges itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.kernels.blocks import GENES_AT_ONCE, LANES
from nbmix.core.kernels.offsets import JudgedBy, SeenCells, SharedNodes, offset_rows
from nbmix.core.kernels.threads import over_rows
from nbmix.core.levels import CountLevels
from nbmix.core.nodes import SizeFactorNodes, fewest_nodes
from nbmix.core.origin_genes import OriginGenes
from nbmix.core.parameters import START_LOG_INV_DISP, Components
from nbmix.core.prior import mean_variance
from nbmix.core.statistics import SufficientStatistics

FIRST_OFFSET_VARIANCE = 0.1  # of ln expression between origins

LARGEST_OFFSET = 3.0  # twenty-fold; nodes have to reach as far

LONGEST_OFFSET_STEP = 0.3  # of Newton, at once

LONGEST_FIRST_STEP = 0.5

LEAST_OFFSET_VARIANCE = 1e-6

LEAST_GAIN = 0.005  # nats, of all cells of an origin in one gene, by an offset

NODE_TOLERANCE_OF_OFFSETS = 1e-3  # relative, for M steps alone

SCREENED_GAIN = 0.2 * LEAST_GAIN  # by ``screened``: from here on a gene is looked at more closely

ROUNDS_OF_FIRST = 10  # between means and offsets, which cost nothing beside a pass over the cells


def spanning_offsets(nodes: SizeFactorNodes, offsets: Tensor) -> SizeFactorNodes:
    """Every gene's nodes, as far as offsets (..., genes) and a step from there move those of the size factor.

    There are as many as the typical gene needs, and as vector registers take at once; a gene that differs by
    large factors has them farther apart.
    """
    of_gene = offsets.flatten(0, -2)
    low = nodes.log_nodes.min() + of_gene.min(0).values - LONGEST_OFFSET_STEP
    high = nodes.log_nodes.max() + of_gene.max(0).values + LONGEST_OFFSET_STEP
    half = float((high - low).median()) / 2
    n_nodes = fewest_nodes(math.ceil(half * 32) / 32, NODE_TOLERANCE_OF_OFFSETS)
    return SizeFactorNodes.of_genes(low.cpu(), high.cpu(), -(-n_nodes // LANES) * LANES)


class Loadings(NamedTuple):
    """What genes make of the size factor and of axes that components share, see ``nbmix.core.factor``.

    Attributes:
        of_genes: (genes, E), the first is the power g of the size factor.
        effects: (E, L M) what they multiply at each level and node.
        n_levels: L.
    """

    of_genes: Tensor
    effects: Tensor
    n_levels: int

    @classmethod
    def none(cls, n_genes: int, n_nodes: int) -> Loadings:
        empty = torch.zeros(n_genes, 0, dtype=torch.float64)
        return cls(empty, torch.zeros(0, n_nodes, dtype=torch.float64), 1)


class GammaRates(NamedTuple):
    """(genes, K) rho = mu / r, and r, on the CPU: exponentials that all origins share."""

    rho: Tensor
    inv_disp: Tensor

    @classmethod
    def of(cls, components: Components) -> GammaRates:
        a, b = (t.double().cpu().T.contiguous() for t in components)
        return cls(torch.exp(a - b), torch.exp(b))


class FittedOffset(NamedTuple):
    """(genes,) offsets of an origin, and minus the second derivative of Q there."""

    offset: Tensor
    information: Tensor


class OriginCells(NamedTuple):
    """Statistics of genes of origins, on the CPU.

    Attributes:
        genes: which, a row each.
        nodes: that the statistics are at.
        rate: (folds, rows, K, L M) A, level by level where there are L levels.
        node: (copies, origins, K, L M) R, of the cells that each copy sees.
        without: (copies,) int64, the fold that each copy does not see; -1: none.
    """

    genes: OriginGenes
    nodes: SizeFactorNodes
    rate: Tensor
    node: Tensor
    without: Tensor

    @classmethod
    def of_one(cls, seen: SufficientStatistics, nodes: SizeFactorNodes) -> OriginCells:
        """All genes of one origin, which one copy sees."""
        genes = OriginGenes.where(torch.ones(1, len(seen.rate), dtype=torch.bool))
        return cls(genes, nodes, seen.rate[None], seen.node[None, None], torch.tensor([-1]))

    def as_arrays(self) -> SeenCells:
        sums = (self.rate.flatten(2), self.node.flatten(2))
        parts = (self.genes.first, self.genes.origin, *sums, self.without, self.nodes.log_nodes)
        return SeenCells(*(t.contiguous().numpy() for t in parts))


class Judge(NamedTuple):
    """What offsets of copies are judged by.

    Attributes:
        gammas, loadings: of the components of each copy.
        variance, base: (copies, genes) tau^2, and the offset of a gene where it has none of its own.
        may_step: (copies, rows) bool, which may be worth a step.
        least_gain: nats, by which all cells of an origin have to gain by another offset than ``base``.
        longest: bound of a step.
    """

    gammas: Sequence[GammaRates]
    loadings: Sequence[Loadings]
    variance: Tensor
    base: Tensor
    may_step: Tensor
    least_gain: float = -1.0
    longest: float = LONGEST_OFFSET_STEP

    @classmethod
    def none(cls, base: Tensor) -> Judge:
        """Takes no step; ``base`` (copies, genes)."""
        n_copies, nothing = len(base), GammaRates(*torch.ones(2, 0, 0, dtype=torch.float64))
        loadings = Loadings.none(0, 0)
        one, never = torch.ones_like(base), torch.zeros(n_copies, 0, dtype=torch.bool)
        return cls([nothing] * n_copies, [loadings] * n_copies, one, base, never, longest=0.0)

    def as_arrays(self) -> JudgedBy:
        stacked = (torch.stack(parts) for parts in zip(*self.gammas, strict=True))
        loadings = torch.stack([of_copy.of_genes for of_copy in self.loadings])
        parts = (*stacked, loadings, self.loadings[0].effects, 1 / self.variance, self.base)
        arrays = (t.double().contiguous().numpy() for t in parts)
        bounds = (self.longest, LARGEST_OFFSET, self.least_gain)
        return JudgedBy._make([*arrays, self.may_step.contiguous().numpy(), *bounds])


class SharedStatistics(NamedTuple):
    """What copies see of all origins, every gene at nodes of its own; on the CPU.

    Attributes:
        nodes: of every gene.
        rate, node: (copies, genes, K, L N); of no copy where cells are to go nowhere.
        have_cells: they have all cells, at the offsets ``Judge.base``.
    """

    nodes: SizeFactorNodes
    rate: Tensor
    node: Tensor
    have_cells: bool = True

    @classmethod
    def none(cls) -> SharedStatistics:
        nodes, sums = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, 0, 0, 0, dtype=torch.float64)
        return cls(SizeFactorNodes(nodes, nodes.flatten()), sums, sums)

    def as_arrays(self) -> SharedNodes:
        sums = (t.view(*t.shape[:2], t.shape[2] * t.shape[3]) for t in (self.rate, self.node))
        nodes = (t.contiguous() for t in self.nodes)
        return SharedNodes._make([*(t.numpy() for t in (*nodes, *sums)), self.have_cells])


def step_and_move(cells: OriginCells, judge: Judge, offset: Tensor, shared: SharedStatistics) -> Tensor:
    """A step of Newton on the offsets of some genes of some origins, whose cells then move by them.

    Args:
        cells: that copies see.
        judge: by which a step is taken.
        offset: (copies, rows) float64, changed in place.
        shared: where cells are moved, in place.

    Returns:
        (copies, rows) information on the offsets, minus the second derivative of Q; 0 where none stepped.
    """
    information = torch.zeros_like(offset)
    arrays = (cells.as_arrays(), judge.as_arrays(), offset.numpy(), information.numpy(), shared.as_arrays())
    over_rows(offset_rows, len(cells.genes.first) - 1, GENES_AT_ONCE, *arrays)
    return information


def offset_step(
    seen: SufficientStatistics,
    nodes: SizeFactorNodes,
    gammas: GammaRates,
    offset: Tensor,
    variance: Tensor,
    loadings: Loadings,
) -> FittedOffset:
    """A step of Newton on the offsets of one origin, on the CPU.

    Args:
        seen: of the cells of the origin alone, at ``nodes``, level by level where there are levels.
        gammas: of the components.
        offset, variance: (genes,) d, and tau^2.
    """
    found = offset.double().clone()[None]
    may_step = torch.ones_like(found, dtype=torch.bool)
    judge = Judge([gammas], [loadings], variance[None], torch.zeros_like(found), may_step)
    information = step_and_move(OriginCells.of_one(seen, nodes), judge, found, SharedStatistics.none())
    return FittedOffset(found[0], information[0])


def zeros_of_genes(levels: CountLevels, n_components: int, n_nodes: int) -> SufficientStatistics:
    """Zeros with ``n_nodes`` nodes of every gene's own; on the CPU."""
    make = partial(torch.zeros, dtype=torch.float64)
    shape, pairs = (levels.n_genes, n_components, n_nodes), (levels.n_pairs, n_components)
    return SufficientStatistics(make(shape), make(pairs), make(shape), make(n_components))


def add_shifted_(
    total: SufficientStatistics,
    seen: SufficientStatistics,
    offset: Tensor,
    nodes: SizeFactorNodes,
    to_nodes: SizeFactorNodes,
) -> None:
    """Add the statistics of cells with these offsets (genes,) to those of all origins, on the CPU.

    Args:
        total: at ``to_nodes``, every gene's own (``zeros_of_genes``).
        seen: at ``nodes``.
    """
    d = offset.double()[None].contiguous()
    shared = SharedStatistics(to_nodes, total.rate[None], total.node[None], have_cells=False)
    step_and_move(OriginCells.of_one(seen, nodes), Judge.none(d), d, shared)
    total.pair += seen.pair
    total.weight += seen.weight


def quieted(offset: Tensor, base: Tensor, information: Tensor) -> Tensor:
    """Offsets (genes,), but ``base`` where the likelihood of all cells of the origin gains nothing by them.

    In a small origin that is so for most genes, which then cost nothing.
    """
    return torch.where(information * (offset - base) ** 2 / 2 <= LEAST_GAIN, base, offset)


class Screened(NamedTuple):
    """(origins, genes) what likelihood may gain by an offset, nats, and the information on it; estimates."""

    gain: Tensor
    information: Tensor


def screened(
    counts: Tensor, size: Tensor, mean_size: float, gammas: GammaRates, offsets: Tensor, variance: Tensor
) -> Screened:
    """What the step of Newton from present offsets would gain, as if all cells had the mean size factor s.

        E_gj = sum_k size_gk mu_kj exp(d_gj) c_j,    H_gj = the same sum with 1 / (1 + s mu_kj / r_kj) in it,
        gain = H (slope / (H + 1 / tau^2))^2 / 2,    slope = (x_gj - E_gj) H_gj / E_gj - d_gj / tau^2

    where c_j makes E_j sum to what was counted: axes that components share have a part in that.

    Args:
        counts: (origins, genes) x_gj, sums over cells.
        size: (origins, K) sums of q_ik s_i.
        mean_size: s.
        gammas: of the components.
        offsets, variance: (origins, genes), (genes,).
    """
    tiny = torch.finfo(torch.float64).tiny
    rho, r = gammas
    mean = (rho * r).T  # (K, genes)
    factor = torch.exp(offsets)
    expected = (size @ mean) * factor
    scale = counts.sum(0) / expected.sum(0).clamp(min=tiny)
    information = (size @ (mean / (1 + mean_size * rho.T))) * factor * scale
    expected = (expected * scale).clamp(min=tiny)
    slope = (counts - expected) * (information / expected) - offsets / variance
    gain = information * (slope / (information + 1 / variance)) ** 2 / 2
    return Screened(gain, information)


def mean_offset(offsets: Tensor, n_cells: Tensor) -> Tensor:
    """(genes,) of offsets (origins, genes), weighted by the cells (origins,)."""
    return (n_cells.double() @ offsets) / n_cells.sum()


def gene_totals(batch: CellBatch, basis: Basis, cells: Tensor) -> Tensor:
    """(genes, columns) sums of counts, weighted by ``cells`` (cells, columns) float64; on the CPU."""
    here, levels = batch.to("cpu"), basis.levels.to("cpu")
    summed = here.turned().matmul(cells) * levels.count[here.used][:, None]  # (used, columns)
    return summed.new_zeros(levels.n_genes, cells.shape[1]).index_add_(0, levels.gene[here.used], summed)


class Members(NamedTuple):
    """The origins (some,) that cells come from, and (cells, some) float64 1 where a cell does; on the CPU."""

    origins: Tensor
    share: Tensor

    @classmethod
    def of(cls, batch: CellBatch, n_origins: int) -> Members:
        """Of the cells of a batch.

        Raises:
            ValueError: one comes from none of so many origins.
        """
        if batch.origins is None or not 0 <= int(batch.origins.min()) <= int(batch.origins.max()) < n_origins:
            raise ValueError(f"a batch of an unknown origin in a fit of {n_origins} origins")
        origins, place = batch.origins.cpu().unique(return_inverse=True)
        return cls(origins, torch.eye(len(origins), dtype=torch.float64)[place])


def summed_over_ranks(tensor: Tensor, device: torch.device) -> Tensor:
    """The sum over the ranks of the default process group, on the CPU; NCCL has no other than on GPUs."""
    there = tensor.to(device)
    torch.distributed.all_reduce(there)
    return there.cpu()


class FirstOffsets(NamedTuple):
    """(origins, genes) offsets, (genes,) their variance, and (origins, genes) which may be worth one."""

    offsets: Tensor
    variance: Tensor
    may_matter: Tensor


@dataclass
class OriginMargins:
    """What of responsibilities and counts the first offsets are found by; sums over cells, which add.

    To Poisson counts, x_ij ~ Poisson(s_i mu_kj exp(d_gj)), these are the sufficient statistics.

    Attributes:
        of_origin: (folds, origins, genes) sum of x_ij.
        of_component: (folds, K, genes) sum of q_ik x_ij.
        size: (folds, origins, K) sum of q_ik s_i.
        n_cells: (folds, origins).
    """

    of_origin: Tensor
    of_component: Tensor
    size: Tensor
    n_cells: Tensor

    @classmethod
    def zeros(cls, folds: int, n_origins: int, n_components: int, n_genes: int) -> OriginMargins:
        make = partial(torch.zeros, dtype=torch.float64)
        return cls(
            make(folds, n_origins, n_genes),
            make(folds, n_components, n_genes),
            make(folds, n_origins, n_components),
            make(folds, n_origins),
        )

    @classmethod
    def of(
        cls, batches: Iterable[CellBatch], basis: Basis, responsibilities: Tensor, folds: int, n_origins: int
    ) -> OriginMargins:
        """Of cells in batches, with the responsibilities (all rows, K)."""
        n_components, levels = responsibilities.shape[1], basis.levels.to("cpu")
        margins = cls.zeros(folds, n_origins, n_components, levels.n_genes)
        for batch in batches:
            if not batch.n_cells:
                continue
            here = batch.to("cpu")
            fold, q = max(here.fold, 0), responsibilities[here.rows].double().cpu()
            origins, share = Members.of(here, n_origins)
            by_gene = gene_totals(here, basis, torch.cat([q, share], 1))  # (genes, K + some)
            margins.of_component[fold] += by_gene[:, :n_components].T
            margins.of_origin[fold, origins] += by_gene[:, n_components:].T
            margins.size[fold, origins] += (share * here.size_factors[:, None]).T @ q
            margins.n_cells[fold, origins] += share.sum(0)
        return margins

    def summed_over_ranks(self, device: torch.device) -> OriginMargins:
        """The sum over all ranks, which exchange tensors on this device."""
        parts = (self.of_origin, self.of_component, self.size, self.n_cells)
        return OriginMargins(*(summed_over_ranks(part, device) for part in parts))

    def first_offsets(self, without: int | None) -> FirstOffsets:
        """Offsets of all cells or of those without a fold.

        Means and offsets take turns, which climbs the likelihood of Poisson counts; their precision is that
        of negative binomials of a common dispersion.
        """
        sums = (self.of_origin, self.of_component, self.size, self.n_cells)
        counts, of_component, size, n_cells = (
            t.sum(0) if without is None else t.sum(0) - t[without] for t in sums
        )
        tiny = torch.finfo(torch.float64).tiny
        one_cell = size.sum() / n_cells.sum().clamp(min=1)
        pooled = counts.sum(0) / size.sum().clamp(min=tiny)
        offsets, variance = torch.zeros_like(counts), torch.full_like(pooled, FIRST_OFFSET_VARIANCE)
        r = float(np.exp(START_LOG_INV_DISP))
        for _ in range(ROUNDS_OF_FIRST):
            # every component sees the average cell once
            expected = torch.einsum("gk,gj->kj", size, torch.exp(offsets)) + one_cell
            mean = (of_component + one_cell * pooled) / expected  # (K, genes)
            expected = size @ mean * torch.exp(offsets)  # (origins, genes)
            # what a count tells is less by 1 + m / r
            share = 1 / (1 + expected / (n_cells[:, None].clamp(min=1) * r))
            information = expected * share
            slope = (counts - expected) * share - offsets / variance
            step = slope / (information + 1 / variance)
            offsets = offsets + step.clamp(-LONGEST_FIRST_STEP, LONGEST_FIRST_STEP)
            offsets = offsets.clamp(-LARGEST_OFFSET, LARGEST_OFFSET)
            variance = offset_variance(offsets, information, variance)
            offsets = offsets - mean_offset(offsets, n_cells)
        none = torch.zeros_like(offsets)
        may_matter = information * offsets**2 / 2 > SCREENED_GAIN
        return FirstOffsets(quieted(offsets, none, information), variance, may_matter)


def offset_variance(offsets: Tensor, information: Tensor, variance: Tensor) -> Tensor:
    """(genes,) tau^2 from offsets and the information on them, (origins, genes) each."""
    information = information.clamp(min=torch.finfo(torch.float64).eps)
    return mean_variance(offsets, information, variance).clamp(min=LEAST_OFFSET_VARIANCE)

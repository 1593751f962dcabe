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

Every cross-fitting copy has offsets of its own, fitted without its fold, so that no cell judges itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.kernels.blocks import GENES_AT_ONCE, LANES
from nbmix.core.kernels.offsets import OffsetProblem, offset_rows, shifted_rows
from nbmix.core.kernels.threads import over_rows
from nbmix.core.levels import CountLevels
from nbmix.core.nodes import SizeFactorNodes, fewest_nodes
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
    found, information = offset.double().clone().contiguous(), torch.empty_like(offset, dtype=torch.float64)
    log_nodes = nodes.log_nodes.repeat(loadings.n_levels)
    parts = (log_nodes, loadings.effects, loadings.of_genes, seen.rate, seen.node, 1 / variance)
    arrays = [t.double().contiguous().numpy() for t in parts]
    problem = OffsetProblem._make([*arrays, LONGEST_OFFSET_STEP, LARGEST_OFFSET])
    rates = (t.numpy() for t in gammas)
    over_rows(offset_rows, found.numel(), GENES_AT_ONCE, *rates, problem, found.numpy(), information.numpy())
    return FittedOffset(found, information)


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
    *,
    base: Tensor | None = None,
    genes: Tensor | None = None,
    n_levels: int = 1,
) -> None:
    """Add the statistics of cells with these offsets (rows,) to those of all origins, on the CPU.

    Args:
        total: at ``to_nodes``, every gene's own (``zeros_of_genes``).
        seen: at ``nodes``, a row for every gene that is added.
        base: (rows,) offsets with which ``total`` has these cells, or is to have them: they are moved from
            there, and pairs and weights stay as they are.
        genes: (rows,) which genes these are; None: all.
    """
    genes = torch.arange(len(offset)) if genes is None else genes
    none = torch.empty(0, dtype=torch.float64)
    of_nodes, of_seen, of_total = (
        tuple(t.contiguous().numpy() for t in tensors)
        for tensors in ((nodes.log_nodes, *to_nodes), (seen.rate, seen.node[None]), (total.rate, total.node))
    )
    moved, begin = (t.double().contiguous().numpy() for t in (offset, none if base is None else base))
    arguments = (genes.numpy(), moved, begin, of_nodes, n_levels, of_seen, of_total)
    over_rows(shifted_rows, moved.size, GENES_AT_ONCE, *arguments)
    if base is None:
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
    counts: Tensor, size: Tensor, n_cells: Tensor, gammas: GammaRates, offsets: Tensor, variance: Tensor
) -> Screened:
    """What the step of Newton from present offsets would gain, as if all cells had the mean size factor.

        E_gj = sum_k size_gk mu_kj exp(d_gj) c_j,    H_gj = the same sum with 1 / (1 + s mu_kj / r_kj) in it,
        gain = H (slope / (H + 1 / tau^2))^2 / 2,    slope = (x_gj - E_gj) H_gj / E_gj - d_gj / tau^2

    with s the mean size factor. c_j makes E_j sum to what was counted: axes that components share have a
    part in that.

    Args:
        counts: (origins, genes) x_gj, sums over cells.
        size: (origins, K) sums of q_ik s_i.
        n_cells: (origins,).
        gammas: of the components.
        offsets, variance: (origins, genes), (genes,).
    """
    tiny = torch.finfo(torch.float64).tiny
    mean_size = float(size.sum() / n_cells.sum().clamp(min=1))
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


def gene_totals(batch: CellBatch, basis: Basis, cells: Tensor | None = None) -> Tensor:
    """(genes,) sums of counts, on the CPU; (genes, columns) where ``cells`` has columns of weights."""
    here, levels = batch.to("cpu"), basis.levels.to("cpu")
    weights = torch.ones(here.n_cells, 1, dtype=torch.float64) if cells is None else cells
    summed = here.turned().matmul(weights) * levels.count[here.used][:, None]  # (used, columns)
    by_gene = summed.new_zeros(levels.n_genes, weights.shape[1]).index_add_(0, levels.gene[here.used], summed)
    return by_gene[:, 0] if cells is None else by_gene


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
            cells = torch.cat([q, torch.ones(len(q), 1, dtype=torch.float64)], 1)
            by_gene = gene_totals(here, basis, cells)  # (genes, K + 1)
            margins.of_component[fold] += by_gene[:, :n_components].T
            margins.of_origin[fold, here.origin] += by_gene[:, n_components]
            margins.size[fold, here.origin] += here.size_factors @ q
            margins.n_cells[fold, here.origin] += here.n_cells
        return margins

    def all_reduce_(self) -> OriginMargins:
        """Sum over the ranks of the default process group, in place."""
        for tensor in (self.of_origin, self.of_component, self.size, self.n_cells):
            torch.distributed.all_reduce(tensor)
        return self

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

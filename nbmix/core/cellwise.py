"""E step and statistics cell by cell, for cells whose genes are moved in ways of their own.

The tables of ``nbmix.core.tables`` hold what a count adds to every cell. Here a gene's size factor is

    ln s_i + u_ij,    u_ij = g_j ln(s_i / s_0) + (1 + g_j) d_oj

with g_j the gene's power of the size factor (``nbmix.core.factor``) and d_oj its offset in the origin o of
the cell (``nbmix.core.offsets``). What a cell's counts add is found from products of 1 + s_i e^(u_ij) rho_kj,
whose logarithms are sums. Zeros are tabulated at the nodes of the size factor for each origin: those of one
without offsets, and what the genes change that have an offset there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.kernels.blocks import CELLS_AT_ONCE, GENES_AT_ONCE, UNROLLED
from nbmix.core.kernels.cells import CellPairs, Memberships, UsedPairs, joint_rows, statistics_rows
from nbmix.core.kernels.tables import zero_change_rows
from nbmix.core.kernels.threads import over_rows
from nbmix.core.nodes import WIDEST_SOFTPLUS, padded_nodes
from nbmix.core.origin_genes import OriginGenes
from nbmix.core.parameters import Components
from nbmix.core.tables import pair_table, tabulate_nodes

LEAST_SHARE = 1e-8  # of a cell: what statistics take of smaller responsibilities is beyond float32

TERMS_AT_ONCE = 2**24  # nonzeros x K on a GPU


class SharedAxes(NamedTuple):
    """What genes make of the size factor and of axes that components share, see ``nbmix.core.factor``.

    Attributes:
        loadings: (genes, 1 + axes), the first of which is the power g of the size factor.
        levels: (L, axes) scores z_l.
        log_centre: ln s_0.
    """

    loadings: Tensor
    levels: Tensor
    log_centre: float

    @classmethod
    def none(cls, like: Components) -> SharedAxes:
        """No axes, and one level, for components (K, genes)."""
        loadings = torch.zeros_like(like.log_mean[:1].T)
        return cls(loadings, loadings.new_zeros(1, 0), 0.0)

    def at_levels(self, components: Components) -> Components:
        """(K L, genes) ln mu + v z_l, and ln r."""
        a, b = components
        a = (a[:, None] + self.levels @ self.loadings[:, 1:].T).flatten(0, 1)
        return Components(a, b.repeat_interleave(len(self.levels), 0))


class CellTables(NamedTuple):
    """What the log likelihood of cells is found from.

    Attributes:
        log_mean: (genes, K) ln mu.
        pair: (pairs, K) D(c, r).
        rho: (genes, K L or more, for speed) mu / r at each level.
        zero: (K L, nodes) sum_j r ln(1 + S rho), or (origins, K L, nodes).
        moved: (origins, genes) what genes are moved by, (1 + g) d; (0, genes) where there are no origins.
        axes: of all components.
    """

    log_mean: Tensor
    pair: Tensor
    rho: Tensor
    zero: Tensor
    moved: Tensor
    axes: SharedAxes


def cell_tables(
    basis: Basis,
    components: Components,
    axes: SharedAxes | None = None,
    offsets: Tensor | None = None,
    base: Tensor | None = None,
) -> CellTables:
    """Of components (K, genes).

    Args:
        basis: of the cells.
        axes: that components share; None: none.
        offsets: (origins, genes) d; None: there are no origins.
        base: (genes,) what most offsets of a gene are; 0 by default.
    """
    a, b = components = Components(*(t.double() for t in components))
    axes = axes or SharedAxes.none(components)
    power = axes.loadings[:, 0]
    a_levels, b_levels = axes.at_levels(components)
    width = (-len(a_levels) % UNROLLED) if a.device.type == "cpu" else 0
    rho = pad(torch.exp(a_levels - b_levels).T, (0, width)).contiguous()
    moved = a.new_zeros(0, a.shape[1]) if offsets is None else (1 + power) * offsets
    zeros = _Zeros(basis, axes, a_levels, b_levels)
    if offsets is None:
        zero = zeros.sums()
    else:
        begin = torch.zeros_like(power) if base is None else (1 + power) * base
        zero = zeros.sums(begin) + zeros.changes(moved, begin)
    return CellTables(a.T.contiguous(), pair_table(basis.levels, b), rho, zero, moved.contiguous(), axes)


class _Zeros:
    """Sums of what zeros cost, of components (K L, genes) at the nodes of a basis."""

    def __init__(self, basis: Basis, axes: SharedAxes, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        log_nodes = basis.nodes.log_nodes
        self.n_nodes, self.on_cpu = log_nodes.numel(), a.device.type == "cpu"
        self.log_nodes = log_nodes + axes.loadings[:, :1] * (log_nodes - axes.log_centre)  # (genes, nodes)
        self.nodes = padded_nodes(self.log_nodes) if self.on_cpu else np.empty(0)

    def sums(self, moved: Tensor | None = None) -> Tensor:
        """(K L, nodes) sum_j r ln(1 + S rho), of genes that are ``moved`` (genes,)."""
        a, b = self.a if moved is None else self.a + moved, self.b
        if self.on_cpu:
            return tabulate_nodes(self.nodes, self.n_nodes, a, b)[1]
        z = self.log_nodes.T[:, None] + (a - b)  # (nodes, K L, genes)
        return (torch.exp(b) * softplus(z, threshold=WIDEST_SOFTPLUS)).sum(2).T

    def changes(self, moved: Tensor, begin: Tensor) -> Tensor:
        """(origins, K L, nodes) what ``sums`` gain where genes are ``moved`` by other than ``begin``."""
        if not self.on_cpu:
            before = self.sums(begin)
            return torch.stack([self.sums(of_origin) - before for of_origin in moved])
        genes = OriginGenes.where(moved != begin)
        n_genes = len(begin)
        n_chunks = max(1, -(-n_genes // GENES_AT_ONCE))
        change = np.zeros((n_chunks, len(moved), len(self.a), self.n_nodes))
        parts = (torch.exp(self.a - self.b).T, torch.exp(self.b).T, moved, begin)
        of_genes = (t.contiguous().numpy() for t in parts)
        at = (genes.first.numpy(), genes.origin.numpy(), self.nodes)
        over_rows(zero_change_rows, n_genes, GENES_AT_ONCE, *at, *of_genes, change)
        return torch.from_numpy(change.sum(0))


def cell_log_likelihood(batch: CellBatch, basis: Basis, tables: CellTables) -> Tensor:
    """(cells, K L) float64, ln p(x_i | component k, level l) in nats."""
    device = tables.rho.device.type
    found = _of_counts(batch, basis, tables) if device == "cpu" else _of_counts_in_torch(batch, basis, tables)
    weights = node_weights(batch)
    if batch.origins is None or not len(tables.moved):
        return found - weights @ tables.zero.T + batch.constant[:, None]
    for origin in batch.origins.unique().tolist():
        here = batch.origins == origin
        found[here] -= weights[here] @ tables.zero[origin].T
    return found + batch.constant[:, None]


def _of_counts(batch: CellBatch, basis: Basis, tables: CellTables) -> Tensor:
    """What the counts of cells add."""
    levels, axes = basis.levels, tables.axes
    gene, count = levels.gene[batch.used], levels.count[batch.used]
    pair = tables.pair[batch.used] + count[:, None] * tables.log_mean[gene]
    linear = torch.cat([pair, count[:, None] * axes.loadings[gene]], 1)  # (used, K + 1 + axes)
    found = torch.empty(batch.n_cells, pair.shape[1] * len(axes.levels), dtype=torch.float64)
    size, origins = batch.size_factors, _origins_of(batch, len(tables.moved) > 0)
    # an empty cell has nothing to multiply its depth with
    depth = torch.where(size > 0, torch.log(size) - axes.log_centre, 0.0)
    parts = (batch.pairs.indptr, batch.pairs.indices, gene, count, linear, size, depth, origins)
    cells = CellPairs(*(t.numpy() for t in parts))
    power, levels_of = axes.loadings[:, 0].contiguous().numpy(), axes.levels.numpy()
    arguments = (cells, power, tables.rho.numpy(), levels_of, tables.moved.numpy(), found.numpy())
    over_rows(joint_rows, batch.n_cells, CELLS_AT_ONCE, *arguments)
    return found


def _of_counts_in_torch(batch: CellBatch, basis: Basis, tables: CellTables) -> Tensor:
    """As ``_of_counts`` without axes, some cells after others, as a GPU wants it."""
    levels, (indptr, indices) = basis.levels, (batch.pairs.indptr.long(), batch.pairs.indices)
    n_components = tables.log_mean.shape[1]
    found = tables.pair.new_zeros(batch.n_cells, n_components)
    cell = torch.repeat_interleave(indptr.diff(), output_size=indices.numel())
    at_once = max(1, TERMS_AT_ONCE // n_components)
    for first in range(0, indices.numel(), at_once):
        place = slice(first, first + at_once)
        pair, here = batch.used[indices[place]], cell[place]
        gene, count = levels.gene[pair], levels.count[pair]
        shift = torch.zeros_like(count)
        if batch.origins is not None and len(tables.moved):
            shift = tables.moved[batch.origins[here], gene]
        reach = batch.size_factors[here] * torch.exp(shift)
        of_count = tables.log_mean[gene] + shift[:, None] - torch.log1p(reach[:, None] * tables.rho[gene])
        found.index_add_(0, here, count[:, None] * of_count + tables.pair[pair])
    return found


def node_weights(batch: CellBatch) -> Tensor:
    """(cells, nodes) interpolation from the nodes of the whole data."""
    return batch.weights @ batch.to_own


def add_cells_(
    rate: Tensor,
    batch: CellBatch,
    basis: Basis,
    q: Tensor,
    *,
    pair: Tensor | None = None,
    genes: OriginGenes | None = None,
) -> None:
    """Add what cells have counted to A = sum_i w_im q_ikl x_ij, on the CPU.

    Args:
        rate: (genes, K, L nodes), or with ``genes`` a row for each of these.
        q: (cells, K, L) float64.
        pair: (pairs, K) to which sum_i q_ik [x_ij = c] is added.
        genes: of some origins.
    """
    levels, weights = basis.levels, node_weights(batch)
    rows, component = torch.nonzero(q.flatten(1) > LEAST_SHARE, as_tuple=True)
    n_low = int(torch.searchsorted(batch.used, levels.n_low))
    turned = batch.turned()
    of_pairs = (
        torch.searchsorted(batch.used[:n_low], levels.first),
        n_low + torch.searchsorted(batch.used[n_low:], levels.n_low + levels.high_first),
        batch.used,
        levels.count[batch.used],
        turned.indptr,
        turned.indices,
    )
    first = torch.searchsorted(rows, torch.arange(batch.n_cells + 1))
    share, origins = q.flatten(1)[rows, component], _origins_of(batch, genes is not None)
    of_cells = (first, component, share, weights, origins)
    pairs = UsedPairs(*(t.contiguous().numpy() for t in of_pairs))
    members = Memberships(*(t.contiguous().numpy() for t in of_cells))
    at = rate.view(len(rate), q[0].numel(), weights.shape[1])  # (rows, K L, nodes)
    row = np.empty((0, 0), np.int32) if genes is None else genes.row.numpy()
    into = (at.numpy(), np.empty((0, 0)) if pair is None else pair.numpy())
    over_rows(statistics_rows, levels.n_genes, GENES_AT_ONCE, pairs, row, members, q.shape[2], *into)


def _origins_of(batch: CellBatch, matter: bool) -> Tensor:
    """(cells,), or (0,) where they are of no account."""
    none = torch.empty(0, dtype=torch.int64)
    return batch.origins if matter and batch.origins is not None else none

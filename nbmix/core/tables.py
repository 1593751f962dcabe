"""The E step's log likelihood as a few sparse x dense products.

Zeros are a function of the size factor alone, tabulated at nodes S_m (``nbmix.core.nodes``) between which
cells are interpolated with weights w_im. Counts are small integers, so that what a count c of gene j adds is
a table over the distinct pairs (j, c) (``nbmix.core.levels``). Written with D(c, r) of
``nbmix.core.special``,

    l_ik = sum_{pairs of i} sum_m w_im { c [ln mu_kj - ln(1 + S_m rho_kj)] + D(c, r_kj) }
         - sum_m w_im sum_j r_kj ln(1 + S_m rho_kj)                    a table of M x K numbers
         + x_i+ ln s_i - sum_j ln G(x_ij + 1)                          known beforehand

What is tabulated at the nodes of the whole data is interpolated to those of each batch
(``nbmix.core.batch``).
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from nbmix.core.batch import Basis, CellBatch, nodes_of_genes
from nbmix.core.kernels.blocks import GENES_AT_ONCE, LINE, PAIRS_AT_ONCE
from nbmix.core.kernels.tables import PairTerms, grown_rows, pair_rows, split_table_rows, step_table_rows
from nbmix.core.kernels.threads import over_rows
from nbmix.core.levels import CountLevels
from nbmix.core.nodes import node_softplus
from nbmix.core.special import level_terms, tail_terms

FLOAT32_NATS = 8e-5  # half a float32 ulp of the summed steps; the error seen is up to ten times that

FEWEST_CELLS_FOR_STEPS = 1000  # in smaller batches size factors are seldom alike

# torch says once a process that CSR tensors are in beta; the products here are tested against SciPy
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")  # torch 2.11


class LikelihoodTables(NamedTuple):
    """The component log likelihood tabulated at the nodes and pairs of a ``Basis``, in nats.

    Attributes:
        log_mean: (genes, K) float64, ln mu.
        grown: (genes, K, nodes) float64, ln(1 + S_m rho).
        pair: (pairs, K) float64, D(c, r).
        zero: (K, nodes) float64, sum_j r ln(1 + S_m rho).
        largest: bound on what one count of any gene adds, in either direction.
        dtype: that products run in.
    """

    log_mean: Tensor
    grown: Tensor
    pair: Tensor
    zero: Tensor
    largest: float
    dtype: torch.dtype


def likelihood_tables(
    basis: Basis,
    log_mean: Tensor,
    log_inv_disp: Tensor,
    dtype: torch.dtype = torch.float32,
) -> LikelihoodTables:
    """Tabulate components (K, genes), for products that run in ``dtype``."""
    a, b = log_mean.detach().double(), log_inv_disp.detach().double()
    if a.device.type == "cpu":
        grown, zero = tabulate_nodes(nodes_of_genes(basis), basis.nodes.log_nodes.numel(), a, b)
    else:
        grown = node_softplus(basis.nodes, a.T, b.T)
        zero = torch.einsum("jkm,kj->km", grown, torch.exp(b))
    pair = pair_table(basis.levels, b)
    return LikelihoodTables(a.T.contiguous(), grown, pair, zero, largest_value(basis, a, b), dtype)


def largest_value(basis: Basis, a: Tensor, b: Tensor) -> float:
    """Bound on what one count adds: |ln mu| + ln(1 + S rho) + D(c, r) / c, the last below ln(1 + c / r)."""
    most = basis.levels.count.max() if basis.levels.n_pairs else torch.ones_like(b).max()
    grown, of_pair = basis.nodes.log_nodes.max() + (a - b).max(), most.log() - b.min()
    return 1.01 * float(a.abs().max() + softplus(grown) + softplus(of_pair))


def tabulate_nodes(nodes: np.ndarray, n_nodes: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(genes, K, nodes) ln(1 + S_m rho) and (K, nodes) sum_j r ln(1 + S_m rho), with every gene's own nodes.

    Args:
        nodes: (genes, padded) S_m, of which the first ``n_nodes`` are wanted.
        a, b: (K, genes) ln mu and ln r on the CPU.
    """
    n_components, n_genes = a.shape
    # torch aligns memory, on which the last bits of products depend; numpy does not
    grown = torch.empty(n_genes, n_components, n_nodes, dtype=torch.float64)
    zero = np.zeros((max(1, -(-n_genes // GENES_AT_ONCE)), n_components, n_nodes))
    columns = (a.contiguous().numpy(), b.contiguous().numpy())
    over_rows(grown_rows, n_genes, GENES_AT_ONCE, *columns, nodes, grown.numpy(), zero)
    return grown, torch.from_numpy(zero.sum(0))


def pair_table(levels: CountLevels, log_inv_disp: Tensor) -> Tensor:
    """(pairs, K) float64 D(c, r_kj) in nats for every pair of gene and count."""
    if log_inv_disp.device.type == "cpu":
        pair = torch.empty(levels.n_pairs, log_inv_disp.shape[0], dtype=torch.float64)
        columns = log_inv_disp.detach().contiguous().numpy()
        over_rows(pair_rows, levels.n_genes, GENES_AT_ONCE, columns, levels.places(), pair.numpy())
        return pair
    b = log_inv_disp.T.contiguous()  # (genes, K)
    low = levels.running_sum(level_terms(levels.level[:, None], b[levels.gene[: levels.n_low]]))
    if not levels.n_high:
        return low
    exact = low[levels.first[levels.high_gene + 1] - 1]
    return torch.cat([low, exact + tail_terms(levels.high_count[:, None], b[levels.high_gene])])


def batch_log_likelihood(
    batch: CellBatch, basis: Basis, tables: LikelihoodTables, *, step_nats: float = FLOAT32_NATS
) -> Tensor:
    """(cells, K) float64, ln p(x_i | component k) in nats, by the sums at the head of this file.

    ``step_nats`` bounds the rounding of float32 sums of steps between nodes: see ``_pair_sums_in_float32``.
    """
    rate = tables.log_mean[:, :, None] - tables.grown @ batch.to_own.T  # (genes, K, own nodes)
    if tables.dtype == torch.float32:
        summed = _pair_sums_in_float32(batch, basis, rate, tables, step_nats)
    else:
        summed = _pair_sums(batch, basis, rate, tables.pair)
    summed = summed.view(batch.n_cells, *rate.shape[1:])
    zero = tables.zero @ batch.to_own.T  # (K, own nodes)
    return torch.einsum("ikm,im->ik", summed - zero, batch.weights) + batch.constant[:, None]


def _pair_sums(batch: CellBatch, basis: Basis, rate: Tensor, pair: Tensor) -> Tensor:
    """(cells, K own nodes) float64 sums over the cells' pairs of c [ln mu - ln(1 + S rho)] + D(c, r)."""
    return batch.pairs.matmul(_pair_values(batch, basis, rate, pair))


def _pair_values(batch: CellBatch, basis: Basis, rate: Tensor, pair: Tensor) -> Tensor:
    gene, count = basis.levels.gene[batch.used], basis.levels.count[batch.used]
    return (rate[gene] * count[:, None, None] + pair[batch.used, :, None]).flatten(1)


def _pair_sums_in_float32(
    batch: CellBatch, basis: Basis, rate: Tensor, tables: LikelihoodTables, step_nats: float
) -> Tensor:
    """``_pair_sums`` by float32 products, without their loss of digits.

    Sums near 1e4 nats nearly cancel between components. So values at the first node are cut into a multiple
    of a power of two, so coarse that float32 sums of them are exact, and a small rest. The other nodes add
    small steps to these. Where a bound on the rounding of the steps passes ``step_nats`` all values are cut.
    """
    _, n_components, n_own = rate.shape
    if batch.used.numel() == 0:
        return rate.new_zeros(batch.n_cells, n_components * n_own)
    # no sum exceeds the deepest cell's counts times the largest value of a count
    unit = 2.0 ** (math.ceil(math.log2(max(tables.largest * batch.deepest, 1e-30))) - 23)
    steps_will_do = batch.n_cells >= FEWEST_CELLS_FOR_STEPS
    n_steps = n_own - 1
    parts = (n_components, n_components, n_components * n_steps, n_steps, n_steps, 1)
    if steps_will_do:
        summed = batch.pairs.matmul(step_table(batch, basis, rate, tables.pair, unit))
        coarse_first, rest_first, steps, coarse, rest, bound = summed[:, : sum(parts)].split(parts, 1)
        steps_will_do = float(bound.amax()) * torch.finfo(torch.float32).eps / 2 <= step_nats
    if not steps_will_do:
        summed = batch.pairs.matmul(split_table(batch, basis, rate, tables.pair, unit))
        width = n_components * n_own
        return summed[:, :width].double() + summed[:, width : 2 * width]
    first = coarse_first.double() + rest_first
    others = steps.unflatten(1, (n_components, n_steps)) + (coarse.double() + rest)[:, None]
    return torch.cat([first[:, :, None], first[:, :, None] + others], 2).flatten(1)


def step_table(batch: CellBatch, basis: Basis, rate: Tensor, pair: Tensor, unit: float) -> Tensor:
    """(used, columns) float32 in whole lines, see ``nbmix.core.kernels.tables.step_table_rows``."""
    _, n_components, n_own = rate.shape
    table = rows_in_lines(rate, batch.used.numel(), 2 * n_components + (n_components + 2) * (n_own - 1) + 1)
    if rate.device.type == "cpu":
        _fill(step_table_rows, batch, basis, rate, pair, unit, table)
        return table
    values = _pair_values(batch, basis, rate, pair).view(-1, n_components, n_own)
    first = torch.round(values[:, :, 0] / unit) * unit
    steps = values[:, :, 1:] - values[:, :, :1]
    means = steps.mean(1)
    rests = (steps - means[:, None]).flatten(1)
    coarse = torch.round(means / unit) * unit
    bound = rests.abs().amax(1, keepdim=True) if n_own > 1 else rests.new_zeros(len(rests), 1)
    return _set_rows(table, first, values[:, :, 0] - first, rests, coarse, means - coarse, bound)


def split_table(batch: CellBatch, basis: Basis, rate: Tensor, pair: Tensor, unit: float) -> Tensor:
    """(used, 2 K nodes) float32 in whole lines: coarse parts, then rests."""
    table = rows_in_lines(rate, batch.used.numel(), 2 * rate.shape[1] * rate.shape[2])
    if rate.device.type == "cpu":
        _fill(split_table_rows, batch, basis, rate, pair, unit, table)
        return table
    values = _pair_values(batch, basis, rate, pair)
    coarse = torch.round(values / unit) * unit
    return _set_rows(table, coarse, values - coarse)


def rows_in_lines(like: Tensor, n_rows: int, width: int) -> Tensor:
    """(rows, width or more) float32 zeros on the device of ``like``, each row in cache lines of its own."""
    return like.new_zeros((n_rows, -(-width // LINE) * LINE), dtype=torch.float32)


def _set_rows(table: Tensor, *columns: Tensor) -> Tensor:
    joined = torch.cat(columns, 1)
    table[:, : joined.shape[1]] = joined
    return table


def _fill(
    kernel: Any, batch: CellBatch, basis: Basis, rate: Tensor, pair: Tensor, unit: float, table: Tensor
) -> None:
    parts = (batch.used, basis.levels.gene, basis.levels.count, rate.contiguous(), pair)
    terms = PairTerms(*(t.numpy() for t in parts))
    over_rows(kernel, len(table), PAIRS_AT_ONCE, terms, unit, table.numpy())

"""The log likelihood of a few cells with its gradient, and an encoder's first layer: one step of minibatches.

    l_ik = sum_{nonzeros of i} { c [ln mu_kj - ln(1 + s_i rho_kj)] + D(c, r_kj) }
         - sum_m w_im sum_j r_kj ln(1 + S_m rho_kj) + x_i+ ln s_i - sum_j ln G(x_ij + 1)

as at the head of ``nbmix.core.tables``, without its tables over pairs, which only many cells make up for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, softplus

from nbmix.core.batch import Basis, CellBatch, pair_product
from nbmix.core.kernels.blocks import MINIBATCH_GENES, MINIBATCH_TERMS
from nbmix.core.kernels.minibatch import (
    GeneParameters,
    MinibatchPairs,
    MinibatchSums,
    likelihood_rows,
    likelihood_slope_rows,
    weight_slope_rows,
)
from nbmix.core.kernels.threads import over_rows
from nbmix.core.levels import CountLevels
from nbmix.core.likelihood import differentiable_log_likelihood
from nbmix.core.nodes import WIDEST_SOFTPLUS

CHEAP = 16  # so many multiplications make up for a logarithm

TERMS_AT_ONCE = 2**25  # nonzeros x K on a GPU: 3 GB; more of them share pairs, and tables over these


def minibatch_log_likelihood(
    log_mean: Tensor,
    log_inv_disp: Tensor,
    batch: CellBatch,
    basis: Basis,
    dtype: torch.dtype = torch.float32,
    *,
    genes_at_once: int | None = None,
) -> Tensor:
    """(cells, K) float64 component log likelihood, differentiable in the (K, genes) components.

    In float64 whatever ``dtype``, but for large batches on a GPU: ``differentiable_log_likelihood``. On the
    CPU a thread takes ``genes_at_once`` genes; by default as many as it is worth waking for.
    """
    if log_mean.device.type == "cpu":
        return _MinibatchLogLikelihood.apply(log_mean, log_inv_disp, batch, basis.levels, genes_at_once)
    if batch.pairs.indices.numel() * log_mean.shape[0] <= TERMS_AT_ONCE:
        return nonzeros_log_likelihood(log_mean, log_inv_disp, batch, basis.levels)
    return differentiable_log_likelihood(log_mean, log_inv_disp, batch, basis, dtype)


def nonzeros_log_likelihood(
    log_mean: Tensor, log_inv_disp: Tensor, batch: CellBatch, levels: CountLevels
) -> Tensor:
    """The same in a few torch operations, each on all nonzeros x K at once, as a GPU wants them."""
    return _LikelihoodOfNonzeros.apply(log_mean, log_inv_disp, batch, levels)


class _MinibatchLogLikelihood(torch.autograd.Function):
    # torch declares both as (ctx, *args, **kwargs) and means them to be narrowed
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        log_mean: Tensor,
        log_inv_disp: Tensor,
        batch: CellBatch,
        levels: CountLevels,
        genes_at_once: int | None,
    ) -> Tensor:
        a, b = log_mean.double(), log_inv_disp.double()
        r, rho = torch.exp(b).contiguous(), torch.exp(a - b).contiguous()
        by_gene = torch.stack([a.T, r.T, rho.T])
        (n_components, n_genes), n_nodes = a.shape, batch.own_nodes.numel()
        n_terms = (batch.pairs.indices.numel() + n_genes * n_nodes) * n_components
        genes_at_once = genes_at_once or _genes_at_once(n_genes, n_terms)
        n_chunks = max(1, -(-n_genes // genes_at_once))
        grown = torch.empty(n_components, n_nodes, n_genes, dtype=torch.float64)
        zero = torch.zeros(n_chunks, n_components, n_nodes, dtype=torch.float64)
        total = torch.zeros(n_chunks, batch.n_cells, n_components, dtype=torch.float64)
        genes = GeneParameters(*(t.numpy() for t in (r, rho, by_gene)))
        cells = (batch.own_nodes.numpy(), batch.size_factors.numpy())
        given = (genes, *cells, _pairs(batch, levels, levels.count[batch.used]))
        sums = MinibatchSums(*(t.numpy() for t in (grown, zero, total)))
        over_rows(likelihood_rows, n_genes, genes_at_once, *given, genes_at_once, sums)
        ctx.genes_at_once, ctx.given, ctx.grown, ctx.weights = genes_at_once, given, grown, batch.weights
        ctx.dtypes = log_mean.dtype, log_inv_disp.dtype
        return total.sum(0) - batch.weights @ zero.sum(0).T + batch.constant[:, None]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        q = grad_outputs[0].contiguous()  # (cells, K)
        n_components, _, n_genes = ctx.grown.shape
        out = torch.empty(2, n_components, n_genes, dtype=torch.float64)
        back = tuple(t.numpy() for t in (ctx.grown, q.T @ ctx.weights, q))
        over_rows(likelihood_slope_rows, n_genes, ctx.genes_at_once, *ctx.given, back, out.numpy())
        grad_a, grad_b = (slope.to(dtype) for slope, dtype in zip(out, ctx.dtypes, strict=True))
        return grad_a, grad_b, None, None, None


class _LikelihoodOfNonzeros(torch.autograd.Function):
    # torch declares forward as (ctx, *args, **kwargs) and means it to be narrowed
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, log_mean: Tensor, log_inv_disp: Tensor, batch: CellBatch, levels: CountLevels
    ) -> Tensor:
        a, b = log_mean.double().T.contiguous(), log_inv_disp.double().T.contiguous()  # (genes, K)
        cell = _cell_of_nonzeros(batch)
        pair = torch.index_select(batch.used, 0, batch.pairs.indices)
        gene, count = levels.gene[pair], levels.count[pair][:, None]
        a_there, b_there = torch.index_select(a, 0, gene), torch.index_select(b, 0, gene)
        r, scaled = torch.exp(b_there), batch.size_factors[cell, None] * torch.exp(a_there - b_there)
        of_count = torch.lgamma(count + r) - torch.lgamma(r) - count * b_there
        terms = count * (a_there - torch.log1p(scaled)) + of_count
        total = batch.constant[:, None].repeat(1, a.shape[1]).index_add_(0, cell, terms)
        z = torch.log(batch.own_nodes)[:, None, None] + (a - b)  # (nodes, genes, K)
        zero = (torch.exp(b) * softplus(z, threshold=WIDEST_SOFTPLUS)).sum(1)
        ctx.save_for_backward(log_mean, log_inv_disp, cell, gene, count, r, scaled / (1 + scaled), z)
        ctx.weights = batch.weights
        return total - batch.weights @ zero

    # and backward as (ctx, *grad_outputs) -> Any
    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        log_mean, log_inv_disp, cell, gene, count, r, share, z = ctx.saved_tensors
        q = grad_outputs[0]  # (cells, K)
        there = torch.index_select(q, 0, cell)
        of_count = r * (torch.digamma(count + r) - torch.digamma(r)) - count
        through_b = torch.exp(log_inv_disp.double().T) * (ctx.weights.T @ q)[:, None]  # (nodes, genes, K)
        of_zero_a = through_b * torch.sigmoid(z)
        of_zero_b = through_b * softplus(z, threshold=WIDEST_SOFTPLUS) - of_zero_a
        grad_a = (-of_zero_a.sum(0)).index_add_(0, gene, there * count * (1 - share))
        grad_b = (-of_zero_b.sum(0)).index_add_(0, gene, there * (count * share + of_count))
        return grad_a.T.to(log_mean.dtype), grad_b.T.to(log_inv_disp.dtype), None, None


def log_count_product(batch: CellBatch, levels: CountLevels, weight: Tensor) -> Tensor:
    """(cells, units) log1p(x) times ``weight`` (genes, units), differentiable in it; never dense in genes."""
    if weight.device.type == "cpu" or batch.pairs.indices.numel() * weight.shape[1] <= 4 * TERMS_AT_ONCE:
        return _LogCountProduct.apply(weight, batch, levels)
    size = torch.log1p(levels.count[batch.used]).to(weight.dtype)
    # indexing would do, but its gradient sorts
    return pair_product(batch, torch.index_select(weight, 0, levels.gene[batch.used]) * size[:, None])


class _LogCountProduct(torch.autograd.Function):
    # narrowed as above
    @staticmethod
    def forward(ctx: Any, weight: Tensor, batch: CellBatch, levels: CountLevels) -> Tensor:  # type: ignore[override]
        value = torch.log1p(levels.count[batch.used]).to(weight.dtype)
        ctx.batch, ctx.levels, ctx.value, ctx.shape = batch, levels, value, weight.shape
        pairs = batch.pairs
        gene = levels.gene[batch.used].to(pairs.indices.dtype)
        index, factor = (torch.index_select(t, 0, pairs.indices) for t in (gene, value))
        ctx.save_for_backward(index, factor)
        if pairs.indices.numel() == 0:
            return weight.new_zeros(batch.n_cells, weight.shape[1])
        return embedding_bag(index, weight, pairs.indptr[:-1], mode="sum", per_sample_weights=factor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        slope = grad_outputs[0].contiguous()
        if slope.device.type != "cpu":
            index, factor = ctx.saved_tensors
            return nonzeros_weight_slope(ctx.batch, index, factor, slope, ctx.shape[0]), None, None
        out = slope.new_empty(ctx.shape)
        pairs = _pairs(ctx.batch, ctx.levels, ctx.value)
        n_terms = ctx.batch.pairs.indices.numel() * out.shape[1] // CHEAP
        genes_at_once = _genes_at_once(len(out), n_terms)
        over_rows(weight_slope_rows, len(out), genes_at_once, pairs, slope.numpy(), out.numpy())
        return out, None, None


def nonzeros_weight_slope(
    batch: CellBatch, gene: Tensor, factor: Tensor, slope: Tensor, n_genes: int
) -> Tensor:
    """(genes, units) gradient of ``log_count_product`` in its weight, nonzero by nonzero, as a GPU wants it.

    Args:
        batch: the cells.
        gene, factor: (nonzeros,) each one's gene and log1p(x).
        slope: (cells, units) gradient in the product.
        n_genes: rows of the weight.
    """
    of_cells = torch.index_select(slope, 0, _cell_of_nonzeros(batch)) * factor[:, None]
    return slope.new_zeros(n_genes, slope.shape[1]).index_add_(0, gene, of_cells)


def _cell_of_nonzeros(batch: CellBatch) -> Tensor:
    """(nonzeros,) int64; the size is said so that a GPU need not be asked."""
    indptr = batch.pairs.indptr
    return torch.repeat_interleave(indptr.diff(), output_size=batch.pairs.indices.numel()).long()


def _genes_at_once(n_genes: int, n_terms: int) -> int:
    """Genes in a compiled loop over work of ``n_terms`` logarithms."""
    return max(MINIBATCH_GENES, math.ceil(n_genes * MINIBATCH_TERMS / max(n_terms, 1)))


def _pairs(batch: CellBatch, levels: CountLevels, value: Tensor) -> MinibatchPairs:
    """The pairs of a batch as compiled loops take them; ``value`` (used,) is what each is worth."""
    turned = batch.turned()
    used, gene, worth = (t.numpy() for t in (batch.used, levels.gene[batch.used], value))
    return MinibatchPairs(used, gene, worth, levels.places(), turned.indptr.numpy(), turned.indices.numpy())

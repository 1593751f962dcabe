"""The component log likelihood of given counts and components, for any caller: checked, differentiable.

x_ij | component k ~ NB with mean s_i mu_kj and inverse dispersion r_kj, rho = mu / r
l_ik = sum_j [ ln G(x+r) - ln G(r) - ln G(x+1) + x ln(s rho) - (x + r) ln(1 + s rho) ]

EM itself uses the products of ``nbmix.core.tables``, which stand behind ``component_log_likelihood`` as well.
``dense_component_log_likelihood`` is the textbook form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from nbmix.core.batch import Basis, CellBatch
from nbmix.core.expected_log_likelihood import slope
from nbmix.core.parameters import Components
from nbmix.core.raw_counts import check_counts
from nbmix.core.statistics import SufficientStatistics
from nbmix.core.tables import batch_log_likelihood, likelihood_tables
from nbmix.errors import InputError


class _BatchLogLikelihood(torch.autograd.Function):
    """``batch_log_likelihood``, whose backward pass is the statistics product and the M step's gradient."""

    # torch declares both as (ctx, *args, **kwargs) and means them to be narrowed
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, log_mean: Tensor, log_inv_disp: Tensor, batch: CellBatch, basis: Basis, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(log_mean, log_inv_disp)
        ctx.batch, ctx.basis, ctx.dtype = batch, basis, dtype
        ctx.tables = likelihood_tables(basis, log_mean, log_inv_disp, dtype)
        return batch_log_likelihood(batch, basis, ctx.tables)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        log_mean, log_inv_disp = ctx.saved_tensors
        statistics = SufficientStatistics.collect(ctx.batch, ctx.basis, grad_outputs[0], ctx.dtype)
        grad_a, grad_b = slope(statistics, ctx.basis, Components(log_mean, log_inv_disp), ctx.tables)
        return (
            grad_a.to(log_mean.dtype),
            grad_b.to(log_inv_disp.dtype),
            None,
            None,
            None,
        )


def differentiable_log_likelihood(
    log_mean: Tensor, log_inv_disp: Tensor, batch: CellBatch, basis: Basis, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(cells, K) float64 component log likelihood, differentiable in the (K, genes) components."""
    return _BatchLogLikelihood.apply(log_mean, log_inv_disp, batch, basis, dtype)


def component_log_likelihood(
    counts: Any,
    size_factors: Any,
    log_mean: Any,
    log_inv_disp: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Log likelihood of every cell under every component, with the -ln G(x + 1) term.

    It equals ``scipy.stats.nbinom(n=r, p=1 / (1 + s mu / r)).logpmf(x)``, summed over genes.

    Args:
        counts: (cells, genes) raw counts: a SciPy sparse matrix or array, a torch CSR tensor, or dense.
        size_factors: (cells,), (cells, 1) or one number; 0 only for an empty cell.
        log_mean: (K, genes) ln mu, per unit of size factor.
        log_inv_disp: (K, genes) ln r.
        dtype: of the bulk products; default float64, or float32 if ``log_mean`` is float32. The shared
            part of the components is summed in float64 either way.
        device: where to compute; default the device of ``log_mean``, or the CPU.

    Returns:
        (cells, K) nats, always in float64: deep cells reach values of 1e8, where float32 cannot hold
        differences of a hundredth of a nat. It can be differentiated in ``log_mean`` and ``log_inv_disp``.

    Raises:
        InputError: counts that are negative, fractional, NaN or infinite; size factors that are negative,
            not finite, or zero for a cell with counts; shapes that do not fit.

    >>> import numpy as np
    >>> from nbmix import component_log_likelihood
    >>> counts = np.array([[0, 2], [1, 0]])
    >>> component_log_likelihood(counts, 10.0, [[-2.0, -2.0]], [[0.0, 0.0]]).round(decimals=4)
    tensor([[-2.8182],
            [-2.2649]], dtype=torch.float64)
    """
    matrix = _scipy_counts(counts)
    sizes = np.asarray(_to_numpy(size_factors), dtype=np.float64).ravel()
    if sizes.size == 1:
        sizes = np.repeat(sizes, matrix.shape[0])
    log_mean = torch.as_tensor(log_mean)
    log_inv_disp = torch.as_tensor(log_inv_disp)
    if log_mean.dim() != 2 or log_mean.shape != log_inv_disp.shape or log_mean.shape[1] != matrix.shape[1]:
        raise InputError(
            f"log_mean {tuple(log_mean.shape)} and log_inv_disp {tuple(log_inv_disp.shape)} must both be "
            f"(components, {matrix.shape[1]} genes)"
        )
    check_size_factors(sizes, matrix)
    dtype = dtype or (torch.float32 if log_mean.dtype == torch.float32 else torch.float64)
    device = log_mean.device if device is None else device
    basis = Basis.of(matrix, sizes)
    batch = CellBatch.build(matrix, sizes, basis).to(device)
    return differentiable_log_likelihood(
        log_mean.to(device), log_inv_disp.to(device), batch, basis.to(device), dtype
    )


def dense_component_log_likelihood(
    counts: Tensor, size_factors: Tensor, log_mean: Tensor, log_inv_disp: Tensor
) -> Tensor:
    """The textbook form on a dense (cells, genes) tensor: makes (cells, K, genes) and calls lgamma.

    Kept as the reference of tests and benchmarks. Shapes as in ``component_log_likelihood``; computes in
    the dtype of its arguments.
    """
    x = counts[:, None, :]  # (cells, 1, genes)
    s = size_factors.view(-1, 1, 1)
    r = torch.exp(log_inv_disp)
    scaled = s * torch.exp(log_mean - log_inv_disp)
    terms = (
        torch.lgamma(x + r)
        - torch.lgamma(r)
        - torch.lgamma(x + 1)
        + torch.xlogy(x, scaled)
        - (x + r) * torch.log1p(scaled)
    )
    return terms.sum(2)


def check_size_factors(size_factors: np.ndarray, counts: sp.csr_matrix) -> None:
    """Raise InputError unless every cell has a finite size factor, positive if the cell has counts."""
    if size_factors.shape != (counts.shape[0],):
        raise InputError(f"size_factors holds {size_factors.size} values for {counts.shape[0]} cells")
    if not np.isfinite(size_factors).all() or (size_factors < 0).any():
        raise InputError("size_factors must be finite and not negative")
    if ((size_factors == 0) & (np.diff(counts.indptr) > 0)).any():
        raise InputError("size_factors is 0 for a cell that has counts")


def _to_numpy(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _scipy_counts(counts: Any) -> sp.csr_matrix:
    """Counts of any accepted form as canonical float32 CSR, checked."""
    if isinstance(counts, Tensor) and counts.layout != torch.strided:
        counts = counts.detach().cpu().to_sparse_csr()
        parts = (counts.values(), counts.col_indices(), counts.crow_indices())
        counts = sp.csr_matrix(tuple(t.numpy() for t in parts), shape=tuple(counts.shape))
    return check_counts(_to_numpy(counts), "counts")

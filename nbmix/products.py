"""Sparse counts and the products on them that make up EM.

Two facts turn one exact EM iteration into a few CSR x dense products. Zeros are a function of one
scalar: sum_j r_kj ln(1 + s rho_kj) is smooth in ln s, so it is evaluated at a few Chebyshev nodes S_m
and interpolated with weights w_im. Counts are small integers: what a count c of gene j adds is a table
over the distinct pairs (j, c). Written with D(c, r) of ``nbmix.special``,

    l_ik = sum_j x_ij [ln mu_kj - sum_m w_im ln(1 + S_m rho_kj)]        one product of width M K
         + sum_{j: x_ij > 1} D(x_ij, r_kj)                             one product of width K
         - sum_m w_im sum_j r_kj ln(1 + S_m rho_kj)                    a table of M x K numbers
         + x_i+ ln s_i - sum_j ln G(x_ij + 1)                          known beforehand
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import scipy.special
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, softplus

from nbmix.special import EXACT_COUNT, level_terms, tail_terms

FLOAT32_NATS = 1e-3  # half a float32 ulp of the summed contrasts; the error seen is up to five times that
NODE_TOLERANCE = 1e-8  # relative error of the interpolation in ln s, for every single cell
# torch says once a process that CSR tensors are in beta; the products here are tested against SciPy
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

WIDEST_SOFTPLUS = 40.0  # above it softplus(z) = z to the last bit of a float64


@dataclass(frozen=True)
class CsrMatrix:
    """A CSR matrix on any torch device.

    Attributes:
        indptr: (rows + 1,) int32 or int64.
        indices: (nonzeros,) columns, of the same type.
        values: (nonzeros,) float32, or None where every entry is 1.
        n_columns: number of columns.
    """

    indptr: Tensor
    indices: Tensor
    values: Tensor | None
    n_columns: int

    @classmethod
    def from_scipy(cls, matrix: sp.csr_matrix, *, ones: bool = False) -> CsrMatrix:
        """Wrap a SciPy CSR matrix; ``ones`` drops the values, which must all be 1."""
        kind = np.int32 if matrix.nnz <= np.iinfo(np.int32).max else np.int64
        return cls(
            torch.from_numpy(matrix.indptr.astype(kind, copy=False)),
            torch.from_numpy(matrix.indices.astype(kind, copy=False)),
            None if ones else torch.from_numpy(np.asarray(matrix.data, dtype=np.float32)),
            matrix.shape[1],
        )

    @property
    def n_rows(self) -> int:
        return self.indptr.numel() - 1

    def to(self, device: torch.device | str) -> CsrMatrix:
        values = None if self.values is None else self.values.to(device)
        return replace(self, indptr=self.indptr.to(device), indices=self.indices.to(device), values=values)

    def matmul(self, dense: Tensor) -> Tensor:
        """This matrix times ``dense`` (columns, width), accumulated in the dtype of ``dense``."""
        if dense.shape[0] != self.n_columns:
            raise ValueError(f"cannot multiply: {self.n_columns} columns times {dense.shape[0]} rows")
        if self.indices.numel() == 0:
            return dense.new_zeros(self.n_rows, dense.shape[1])
        values = None if self.values is None else self.values.to(dense.dtype)
        # in float32 the bag's kernel takes half the time of a CSR product at these widths
        if dense.dtype == torch.float32:
            return embedding_bag(self.indices, dense, self.indptr[:-1], mode="sum", per_sample_weights=values)
        if values is None:
            values = torch.ones(self.indices.numel(), dtype=dense.dtype, device=dense.device)
        matrix = torch.sparse_csr_tensor(
            self.indptr, self.indices, values, size=(self.n_rows, self.n_columns), check_invariants=False
        )
        return matrix @ dense


class SizeFactorNodes(NamedTuple):
    """Chebyshev nodes in ln s and barycentric weights between them.

    Attributes:
        log_nodes: (nodes,) float64, ln S_m.
        barycentric: (nodes,) float64, the barycentric weights (Berrut & Trefethen 2004, eq. 5.4).
    """

    log_nodes: Tensor
    barycentric: Tensor

    @classmethod
    def spanning(cls, size_factors: np.ndarray, tolerance: float = NODE_TOLERANCE) -> SizeFactorNodes:
        """As many nodes as interpolate ln(1 + s rho), for any rho, between the smallest and largest s > 0.

        The function is analytic in the strip |Im ln s| < pi, so the error falls like
        (a + sqrt(1 + a^2))^-M with a = pi / half the range of ln s (Trefethen 2013, theorem 8.2). The
        function may grow like s: the tolerance is tightened by s_max / s_min to hold for the smallest s.
        """
        positive = size_factors[size_factors > 0]
        if positive.size == 0:
            return cls(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        low, high = float(np.log(positive.min())), float(np.log(positive.max()))
        half = (high - low) / 2
        if half < 1e-12:
            return cls(torch.tensor([low], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        rate = math.asinh(math.pi / half)
        n_nodes = max(3, math.ceil((2 * half - math.log(tolerance)) / rate) + 1)
        angle = (2 * torch.arange(n_nodes, dtype=torch.float64) + 1) * (math.pi / (2 * n_nodes))
        sign = 1.0 - 2.0 * (torch.arange(n_nodes, dtype=torch.float64) % 2)
        return cls((low + high) / 2 + half * torch.cos(angle), sign * torch.sin(angle))

    def to(self, device: torch.device | str) -> SizeFactorNodes:
        return SizeFactorNodes(self.log_nodes.to(device), self.barycentric.to(device))

    def weights(self, size_factors: Tensor) -> Tensor:
        """(cells, nodes) float64 interpolation weights; a row sums to 1, or is 0 where s = 0."""
        log_s = torch.log(size_factors.double())
        gap = log_s[:, None] - self.log_nodes  # (cells, nodes)
        hit = gap == 0
        raw = self.barycentric / torch.where(hit, 1.0, gap)
        raw = torch.where(hit.any(1, keepdim=True), hit.double(), raw)
        weights = raw / raw.sum(1, keepdim=True)
        return torch.where((size_factors > 0)[:, None], weights, 0.0)


@dataclass(frozen=True)
class CountLevels:
    """The distinct pairs (gene, count) with a count of 2 or more, bucketed by gene.

    Pairs with counts 2..T (T = EXACT_COUNT) have a place for every count up to the gene's largest: place
    ``first[j] + c - 2``, which belongs to level t = c - 1 of D's sum. Rarer, larger counts are listed.

    Attributes:
        first: (genes + 1,) int64, where the places of each gene begin.
        gene, level: (low pairs,) int64 and float64, what stands at each place.
        high_gene, high_count: (high pairs,) the distinct larger pairs, sorted by gene, then count.
    """

    first: Tensor
    gene: Tensor
    level: Tensor
    high_gene: Tensor
    high_count: Tensor

    @classmethod
    def of(cls, counts: sp.csr_matrix) -> CountLevels:
        """All levels that ``counts`` (cells, genes) needs."""
        n_genes = counts.shape[1]
        largest = np.zeros(n_genes, dtype=np.int64)
        np.maximum.at(largest, counts.indices, counts.data.astype(np.int64))
        places = np.clip(np.minimum(largest, EXACT_COUNT) - 1, 0, None)
        first = np.concatenate([[0], np.cumsum(places)])
        gene = np.repeat(np.arange(n_genes), places)
        high = counts.data > EXACT_COUNT
        pairs = np.unique(_pair_key(counts.indices[high], counts.data[high]))
        return cls(
            torch.from_numpy(first),
            torch.from_numpy(gene),
            torch.from_numpy((np.arange(first[-1]) - first[gene] + 1).astype(np.float64)),
            torch.from_numpy(pairs >> 32),
            torch.from_numpy((pairs & 0xFFFFFFFF).astype(np.float64)),
        )

    @property
    def n_genes(self) -> int:
        return self.first.numel() - 1

    @property
    def n_low(self) -> int:
        return self.gene.numel()

    @property
    def n_pairs(self) -> int:
        return self.n_low + self.high_gene.numel()

    def to(self, device: torch.device | str) -> CountLevels:
        return CountLevels(*(getattr(self, f.name).to(device) for f in fields(self)))

    def incidence(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        """(cells, pairs) one-hot CSR of the counts of 2 or more. Raises KeyError for a pair not listed."""
        many = counts.data > 1
        running = np.concatenate([[0], np.cumsum(many)])
        value = counts.data[many].astype(np.int64)
        gene = counts.indices[many].astype(np.int64)
        place = self.first.numpy()[gene] + np.minimum(value, EXACT_COUNT) - 2
        if (place >= self.first.numpy()[gene + 1]).any():
            raise KeyError("a count is larger than any count that these levels were made of")
        high = value > EXACT_COUNT
        keys = _pair_key(self.high_gene.numpy(), self.high_count.numpy())
        wanted = _pair_key(gene[high], value[high])
        rank = np.searchsorted(keys, wanted)
        if wanted.size and ((rank >= keys.size) | (keys[np.minimum(rank, keys.size - 1)] != wanted)).any():
            raise KeyError("a pair of gene and count is not among those these levels were made of")
        place[high] = self.n_low + rank
        kind = np.int32 if self.n_pairs <= np.iinfo(np.int32).max else np.int64
        shape = (counts.shape[0], self.n_pairs)
        ones = np.ones(place.size, dtype=np.int8)
        return sp.csr_matrix((ones, place.astype(kind), running[counts.indptr].astype(kind)), shape=shape)

    def running_sum(self, terms: Tensor) -> Tensor:
        """(low pairs, ...) -> sum over the levels of the same gene up to and with each one."""
        total = torch.cumsum(terms, 0)
        before = torch.cat([torch.zeros_like(total[:1]), total])[self.first[self.gene]]
        return total - before

    def reaching(self, pair_weights: Tensor) -> Tensor:
        """(pairs, ...) -> (low pairs, ...): total weight of the counts c > t of the gene, per level t."""
        low, high = pair_weights[: self.n_low], pair_weights[self.n_low :]
        of_high = torch.zeros(self.n_genes, *low.shape[1:], dtype=low.dtype, device=low.device)
        of_high.index_add_(0, self.high_gene, high)
        total = torch.cat([torch.zeros_like(low[:1]), torch.cumsum(low, 0)])
        return total[self.first[self.gene + 1]] - total[:-1] + of_high[self.gene]


def _pair_key(gene: np.ndarray, count: np.ndarray) -> np.ndarray:
    return (gene.astype(np.int64) << 32) | count.astype(np.int64)


@dataclass(frozen=True)
class CellBatch:
    """Some cells, ready for the products: both orientations of their counts and of their pairs.

    Attributes:
        rows: (cells,) int64, positions of the cells in the whole data.
        fold: the fold that all these cells belong to; -1 for none.
        counts, counts_t: (cells, genes) and its transpose.
        pairs, pairs_t: (cells, pairs) one-hot of ``CountLevels``, and its transpose.
        size_factors: (cells,) float64.
        constant: (cells,) float64, x_i+ ln s_i - sum_j ln G(x_ij + 1), nats.
        log_prior: (cells, components) float64 given ln pi_ik, or None.
        labels: (cells,) int64 codes of known labels (for logging alone), or None.
    """

    rows: Tensor
    fold: int
    counts: CsrMatrix
    counts_t: CsrMatrix
    pairs: CsrMatrix
    pairs_t: CsrMatrix
    size_factors: Tensor
    constant: Tensor
    log_prior: Tensor | None = None
    labels: Tensor | None = None

    @classmethod
    def build(
        cls,
        counts: sp.csr_matrix,
        size_factors: np.ndarray,
        levels: CountLevels,
        *,
        rows: np.ndarray | None = None,
        fold: int = -1,
        prior: np.ndarray | None = None,
        labels: np.ndarray | None = None,
    ) -> CellBatch:
        """Prepare checked counts (cells, genes); a cell with s = 0 must be empty."""
        pairs = levels.incidence(counts)
        total = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        log_s = np.log(np.where(total > 0, size_factors, 1.0))
        factorial = counts.copy()
        factorial.data = scipy.special.gammaln(counts.data.astype(np.float64) + 1)
        constant = total * log_s - np.asarray(factorial.sum(axis=1)).ravel()
        with np.errstate(divide="ignore"):
            log_prior = None if prior is None else torch.from_numpy(np.log(prior))
        return cls(
            torch.from_numpy(np.arange(counts.shape[0]) if rows is None else np.asarray(rows, np.int64)),
            fold,
            CsrMatrix.from_scipy(counts),
            CsrMatrix.from_scipy(counts.T.tocsr()),
            CsrMatrix.from_scipy(pairs, ones=True),
            CsrMatrix.from_scipy(pairs.T.tocsr(), ones=True),
            torch.from_numpy(np.ascontiguousarray(size_factors, dtype=np.float64)),
            torch.from_numpy(constant),
            log_prior,
            None if labels is None else torch.from_numpy(labels),
        )

    @property
    def n_cells(self) -> int:
        return self.counts.n_rows

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CellBatch:
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if hasattr(getattr(self, f.name), "to")
        }
        return replace(self, **moved)


class Basis(NamedTuple):
    """What is shared by all products on one data set: nodes for its size factors, levels of its counts."""

    nodes: SizeFactorNodes
    levels: CountLevels

    @classmethod
    def of(cls, counts: sp.csr_matrix, size_factors: np.ndarray) -> Basis:
        return cls(SizeFactorNodes.spanning(size_factors), CountLevels.of(counts))

    def to(self, device: torch.device | str) -> Basis:
        return Basis(self.nodes.to(device), self.levels.to(device))


class CentredTable:
    """Columns of a float64 table for a sparse product, split into what they share and their contrasts.

    A cell's log likelihood is a sum of terms near 1e4 that nearly cancel between components. The shared
    part, the mean over columns, is summed in float64; float32 then rounds contrasts alone, and only in
    batches where its rounding stays below FLOAT32_NATS.
    """

    def __init__(self, table: Tensor, dtype: torch.dtype) -> None:
        self.centre = table.mean(1, keepdim=True)
        self.contrast = table - self.centre
        self.narrow = self.contrast.float() if dtype == torch.float32 else None
        self.spread = None if self.narrow is None else self.narrow.abs().amax(1, keepdim=True)

    def product(self, matrix: CsrMatrix) -> Tensor:
        """(rows, columns) float64: ``matrix`` times the table."""
        shared = matrix.matmul(self.centre)
        if self.narrow is None or self.spread is None:
            return matrix.matmul(self.contrast) + shared
        largest = matrix.matmul(self.spread).amax() if matrix.n_rows else self.spread.new_zeros(())
        precise = largest * torch.finfo(torch.float32).eps / 2 > FLOAT32_NATS
        return matrix.matmul(self.contrast if precise else self.narrow).double() + shared


class LikelihoodTables(NamedTuple):
    """The component log likelihood tabulated at the nodes and pairs of a ``Basis``.

    Attributes:
        rate: (genes, M K) ln mu - ln(1 + S_m rho).
        pair: (pairs, K) D(c, r).
        zero: (nodes, K) float64, sum_j r ln(1 + S_m rho).
    """

    rate: CentredTable
    pair: CentredTable
    zero: Tensor


def node_softplus(nodes: SizeFactorNodes, log_mean: Tensor, log_inv_disp: Tensor) -> Tensor:
    """(nodes, *shape) ln(1 + S_m rho) in nats, rho = exp(log_mean - log_inv_disp)."""
    shape = (-1,) + (1,) * log_mean.dim()
    return softplus(nodes.log_nodes.view(shape) + (log_mean - log_inv_disp), threshold=WIDEST_SOFTPLUS)


def likelihood_tables(
    basis: Basis, log_mean: Tensor, log_inv_disp: Tensor, dtype: torch.dtype = torch.float32
) -> LikelihoodTables:
    """Tabulate components (K, genes) in float64, for products that run in ``dtype``."""
    log_mean, log_inv_disp = log_mean.double(), log_inv_disp.double()
    grown = node_softplus(basis.nodes, log_mean, log_inv_disp)  # (nodes, K, genes)
    zero = torch.einsum("mkj,kj->mk", grown, torch.exp(log_inv_disp))
    rate = (log_mean - grown).permute(2, 0, 1).reshape(log_mean.shape[1], -1)
    pair = pair_table(basis.levels, log_inv_disp)
    return LikelihoodTables(CentredTable(rate, dtype), CentredTable(pair, dtype), zero)


def pair_table(levels: CountLevels, log_inv_disp: Tensor) -> Tensor:
    """(pairs, K) float64 D(c, r_kj) in nats for every pair of gene and count."""
    b = log_inv_disp.T  # (genes, K)
    low = levels.running_sum(level_terms(levels.level[:, None], b[levels.gene]))
    if levels.n_pairs == levels.n_low:
        return low
    exact = low[levels.first[levels.high_gene + 1] - 1]
    return torch.cat([low, exact + tail_terms(levels.high_count[:, None], b[levels.high_gene])])


def batch_log_likelihood(batch: CellBatch, basis: Basis, tables: LikelihoodTables) -> Tensor:
    """(cells, K) float64, ln p(x_i | component k) in nats, by the products at the head of this file."""
    weights = basis.nodes.weights(batch.size_factors)  # (cells, nodes)
    n_nodes, n_components = tables.zero.shape
    rate = tables.rate.product(batch.counts).view(batch.n_cells, n_nodes, n_components)
    pair = tables.pair.product(batch.pairs)
    return (weights[:, :, None] * rate).sum(1) + pair - weights @ tables.zero + batch.constant[:, None]

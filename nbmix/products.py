"""Sparse counts and the products on them that make up EM.

Two facts turn one exact EM iteration into a few sparse x dense products. Zeros are a function of one
scalar: sum_j r_kj ln(1 + s rho_kj) is smooth in ln s, so it is evaluated at a few Chebyshev nodes S_m
and interpolated with weights w_im. Counts are small integers: what a count c of gene j adds is a table
over the distinct pairs (j, c). Written with D(c, r) of ``nbmix.special``,

    l_ik = sum_{pairs of i} sum_m w_im { c [ln mu_kj - ln(1 + S_m rho_kj)] + D(c, r_kj) }
         - sum_m w_im sum_j r_kj ln(1 + S_m rho_kj)                    a table of M x K numbers
         + x_i+ ln s_i - sum_j ln G(x_ij + 1)                          known beforehand

Cells of like size factors come in one batch, which needs few nodes of its own: what is tabulated at the nodes
of the whole data is interpolated to those, and statistics go back the same way.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import scipy.special
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, softplus

from nbmix.kernels import (
    LANES,
    code_rows,
    compact_columns,
    grown_rows,
    interpolation_weights,
    largest_and_high,
    over_rows,
    pair_rows,
    split_table_rows,
    step_table_rows,
    transpose_pattern,
)
from nbmix.special import EXACT_COUNT, level_terms, tail_terms

NODE_TOLERANCE = 1e-8  # relative error of the interpolation in ln s, for every single cell
# what its error in a cell may be where products are float32 and components expect the counts that cells
# have; between a thirtieth and a quarter of it is seen
FLOAT32_NODE_NATS = 0.01
LEAST_COUNTS = 100.0  # that such a bound counts with
FLOAT32_NATS = 8e-5  # half a float32 ulp of the summed steps; the error seen is up to ten times that
FEWEST_CELLS_FOR_STEPS = 1000  # in smaller batches size factors are seldom alike
LINE = 16  # float32 in a cache line: rows of tables that begin at one are read a fifth faster
GENES_AT_ONCE = 512  # in a compiled loop
PAIRS_AT_ONCE = 4096
# torch says once a process that CSR tensors are in beta; the products here are tested against SciPy
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")  # torch 2.11

WIDEST_SOFTPLUS = 40.0  # above it softplus(z) = z to the last bit of a float64
LOG_FACTORIAL = scipy.special.gammaln(np.arange(1024) + 1.0)


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

    def transposed(self) -> CsrMatrix:
        """The transpose of a matrix without values."""
        if self.values is not None:
            raise ValueError("only a matrix of ones can be transposed")
        if self.indices.device.type == "cpu":
            indptr, rows = transpose_pattern(self.indptr.numpy(), self.indices.numpy(), self.n_columns)
            return CsrMatrix(torch.from_numpy(indptr), torch.from_numpy(rows), None, self.n_rows)
        row = torch.repeat_interleave(self.indptr.diff().long())
        filled = torch.bincount(self.indices, minlength=self.n_columns)
        indptr = torch.cat([filled.new_zeros(1), torch.cumsum(filled, 0)])
        order = torch.argsort(self.indices, stable=True)
        kind = self.indptr.dtype
        return CsrMatrix(indptr.to(kind), row[order].to(kind), None, self.n_rows)

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
        """As few nodes as interpolate ln(1 + s rho), for any rho, between the smallest and largest s > 0."""
        positive = size_factors[size_factors > 0]
        if positive.size == 0:
            return cls(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        low, high = float(np.log(positive.min())), float(np.log(positive.max()))
        half = (high - low) / 2
        if half < 1e-12:
            return cls(torch.tensor([low], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        nodes, barycentric = _chebyshev(fewest_nodes(math.ceil(half * 32) / 32, tolerance))
        return cls(torch.from_numpy((low + high) / 2 + half * nodes), torch.from_numpy(barycentric))

    def to(self, device: torch.device | str) -> SizeFactorNodes:
        return SizeFactorNodes(self.log_nodes.to(device), self.barycentric.to(device))

    def weights(self, size_factors: Tensor) -> Tensor:
        """(cells, nodes) float64 interpolation weights; a row sums to 1, or is 0 where s = 0."""
        if size_factors.device.type == "cpu":
            weights = torch.empty(size_factors.numel(), self.log_nodes.numel(), dtype=torch.float64)
            nodes = (self.log_nodes.numpy(), self.barycentric.numpy())
            interpolation_weights(size_factors.double().numpy(), *nodes, weights.numpy())
            return weights
        log_s = torch.log(size_factors.double())
        gap = log_s[:, None] - self.log_nodes  # (cells, nodes)
        hit = gap == 0
        raw = self.barycentric / torch.where(hit, 1.0, gap)
        raw = torch.where(hit.any(1, keepdim=True), hit.double(), raw)
        weights = raw / raw.sum(1, keepdim=True)
        return torch.where((size_factors > 0)[:, None], weights, 0.0)


def _chebyshev(n_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Chebyshev nodes on [-1, 1] and their barycentric weights."""
    step = np.arange(n_nodes)
    angle = (2 * step + 1) * (math.pi / (2 * n_nodes))
    return np.cos(angle), (1.0 - 2.0 * (step % 2)) * np.sin(angle)


@lru_cache(maxsize=1024)
def fewest_nodes(half: float, tolerance: float) -> int:
    """Nodes that interpolate ln(1 + e^(t + u)) over |t| <= half to a relative ``tolerance``, for every u.

    The largest error is looked up on a grid of t and u; beyond |u| = 20 + half the function is e^(t + u), or
    a line. The error falls like (a + sqrt(1 + a^2))^-M with a = pi / half (Trefethen 2013, theorem 8.2),
    since the function is analytic in the strip |Im t| < pi.
    """
    shifts = np.linspace(-20 - half, 20 + half, 16 * math.ceil(5 + half) + 1)
    n_nodes = 2
    while True:
        nodes, barycentric = _chebyshev(n_nodes)
        points = (np.arange(4 * n_nodes) + 0.5) * (2 / (4 * n_nodes)) - 1
        raw = barycentric / (points[:, None] - nodes)
        weights = raw / raw.sum(1, keepdims=True)
        wanted = np.logaddexp(0, half * points[:, None] + shifts)
        got = weights @ np.logaddexp(0, half * nodes[:, None] + shifts)
        rounding = 16 * np.finfo(float).eps * wanted.max(0)  # no nodes can do better
        if (np.abs(got - wanted) <= tolerance / 2 * wanted + rounding).all():
            return n_nodes
        n_nodes += 1


@dataclass(frozen=True)
class CountLevels:
    """The distinct pairs (gene, count) of a data set, bucketed by gene.

    Low pairs, with counts 1..T (T = EXACT_COUNT), have a place for every count up to the gene's largest:
    place ``first[j] + c - 1``, which belongs to level t = c - 1 of D's sum. Rarer, larger counts are listed.

    Attributes:
        first: (genes + 1,) int64, where the low pairs of each gene begin.
        high_first: (genes + 1,) int64, likewise in the list of the high ones.
        gene: (pairs,) int64.
        count: (pairs,) float64; low pairs come first, then the high ones, both sorted by gene, then count.
    """

    first: Tensor
    high_first: Tensor
    gene: Tensor
    count: Tensor

    @classmethod
    def of(cls, counts: sp.csr_matrix) -> CountLevels:
        """All levels that ``counts`` (cells, genes) needs."""
        census = CountCensus(counts.shape[1])
        census.add(counts)
        return census.levels()

    @property
    def n_genes(self) -> int:
        return self.first.numel() - 1

    @property
    def n_low(self) -> int:
        return self.gene.numel() - self.n_high

    @property
    def n_high(self) -> int:
        return int(self.high_first[-1])

    @property
    def n_pairs(self) -> int:
        return self.gene.numel()

    @property
    def high_gene(self) -> Tensor:
        return self.gene[self.n_low :]

    @property
    def high_count(self) -> Tensor:
        return self.count[self.n_low :]

    @property
    def level(self) -> Tensor:
        """(low pairs,) float64, t = c - 1."""
        return self.count[: self.n_low] - 1

    def to(self, device: torch.device | str) -> CountLevels:
        return CountLevels(*(getattr(self, f.name).to(device) for f in fields(self)))

    def code(self, counts: sp.csr_matrix, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions among the pairs of the nonzeros of some rows, row by row, and -sum_j ln G(x_ij + 1).

        Raises:
            KeyError: a pair that is not listed.
        """
        size = int((counts.indptr[rows + 1] - counts.indptr[rows]).sum())
        codes, constant = np.empty(size, np.int32), np.empty(rows.size)
        stranger = code_rows(
            rows,
            counts.indptr,
            counts.indices,
            counts.data,
            self.first.numpy(),
            self.high_first.numpy(),
            self.high_count.numpy(),
            LOG_FACTORIAL,
            codes,
            constant,
        )
        if stranger >= 0:
            raise KeyError("a pair of gene and count is not among those these levels were made of")
        return codes, constant

    def running_sum(self, terms: Tensor) -> Tensor:
        """(low pairs, ...) -> sum over the levels of the same gene up to and with each one."""
        return torch.cumsum(self._by_gene(terms), 1).flatten(0, 1)[self._slot]

    def reaching(self, pair_weights: Tensor) -> Tensor:
        """(pairs, ...) -> (low pairs, ...): total weight of the counts c > t of the gene, per level t."""
        low, high = pair_weights[: self.n_low], pair_weights[self.n_low :]
        of_high = low.new_zeros(self.n_genes, *low.shape[1:]).index_add_(0, self.high_gene, high)
        from_last = torch.cumsum(self._by_gene(low).flip(1), 1).flip(1)
        return (from_last + of_high[:, None]).flatten(0, 1)[self._slot]

    @property
    def _slot(self) -> Tensor:
        """(low pairs,) int64 places in ``_by_gene``, which is flat in its first two dimensions."""
        return self.gene[: self.n_low] * EXACT_COUNT + self.count[: self.n_low].long() - 1

    def _by_gene(self, low: Tensor) -> Tensor:
        """(low pairs, ...) -> (genes, EXACT_COUNT, ...), 0 where a gene has no such level.

        One long sum over all pairs would be taken by a single thread of a GPU.
        """
        padded = low.new_zeros(self.n_genes * EXACT_COUNT, *low.shape[1:])
        padded[self._slot] = low
        return padded.unflatten(0, (self.n_genes, EXACT_COUNT))


class CountCensus:
    """Which pairs of gene and count occur, taken over parts of a data set."""

    def __init__(self, n_genes: int) -> None:
        self._largest = np.zeros(n_genes, np.int64)
        self._high = np.zeros(0, np.int64)  # gene << 32 | count
        self.deepest = self.total = 0.0  # most counts of a cell, and of all cells

    def add(self, counts: sp.csr_matrix) -> None:
        """Count in more cells (cells, genes)."""
        if counts.shape[0]:
            totals = counts.sum(axis=1, dtype=np.float64)
            self.deepest, self.total = (
                max(self.deepest, float(totals.max())),
                self.total + float(totals.sum()),
            )
        found = largest_and_high(0, counts.nnz, counts.indices, counts.data, self._largest)
        self._high = np.unique(np.concatenate([self._high, found]))

    def levels(self, genes: np.ndarray | None = None) -> CountLevels:
        """What was found, of some genes in the order given, or of all."""
        largest, high_gene, high_count = self._largest, self._high >> 32, self._high & 0xFFFFFFFF
        if genes is not None:
            position = np.full(largest.size, -1)
            position[genes] = np.arange(genes.size)
            largest, high_gene = largest[genes], position[high_gene]
            order = np.lexsort((high_count, high_gene))[np.count_nonzero(high_gene < 0) :]
            high_gene, high_count = high_gene[order], high_count[order]
        n_genes = largest.size
        places = np.minimum(largest, EXACT_COUNT)
        first = np.concatenate([[0], np.cumsum(places)])
        gene = np.repeat(np.arange(n_genes), places)
        count = np.concatenate([np.arange(first[-1]) - first[gene] + 1, high_count])
        return CountLevels(
            torch.from_numpy(first),
            torch.from_numpy(np.searchsorted(high_gene, np.arange(n_genes + 1))),
            torch.from_numpy(np.concatenate([gene, high_gene])),
            torch.from_numpy(count.astype(np.float64)),
        )


class _PairProduct(torch.autograd.Function):
    """The pairs of a batch times a table, differentiable in the table."""

    # torch declares both as (ctx, *args, **kwargs) and means them to be narrowed
    @staticmethod
    def forward(ctx: Any, table: Tensor, batch: CellBatch) -> Tensor:  # type: ignore[override]
        ctx.batch = batch
        return batch.pairs.matmul(table)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.batch.turned().matmul(grad_outputs[0].contiguous()), None


def pair_product(batch: CellBatch, table: Tensor) -> Tensor:
    """(cells, width) sums over each cell's pairs of the rows of ``table`` (used, width); differentiable."""
    return _PairProduct.apply(table, batch)


class Precision(NamedTuple):
    """How closely ln(1 + s rho) is interpolated: to a relative error, or where that is more, to some nats."""

    relative: float = NODE_TOLERANCE
    nats: float = 0.0

    @classmethod
    def of(cls, dtype: torch.dtype) -> Precision:
        """What is lost in products of this type anyway."""
        return cls(nats=FLOAT32_NODE_NATS) if dtype == torch.float32 else EXACT

    def tolerance(self, deepest: float) -> float:
        """The relative error that serves cells of up to ``deepest`` counts, seen or expected."""
        return max(self.relative, self.nats / max(deepest, LEAST_COUNTS))


EXACT = Precision()


class Basis(NamedTuple):
    """What is shared by all products on one data set: nodes for its size factors, levels of its counts.

    Attributes:
        nodes, levels: of all cells.
        precision: of the interpolation in ln s, for batches' own nodes too.
        rate: counts per unit of size factor, in all cells together.
    """

    nodes: SizeFactorNodes
    levels: CountLevels
    precision: Precision = EXACT
    rate: float = 0.0

    @classmethod
    def of(cls, counts: sp.csr_matrix, size_factors: np.ndarray, precision: Precision = EXACT) -> Basis:
        census = CountCensus(counts.shape[1])
        census.add(counts)
        return cls.from_census(census, census.levels(), size_factors, precision)

    @classmethod
    def from_census(
        cls,
        census: CountCensus,
        levels: CountLevels,
        size_factors: np.ndarray,
        precision: Precision = EXACT,
    ) -> Basis:
        """Of cells that a census has been taken of; ``levels`` are some of its."""
        rate = census.total / max(float(size_factors.sum()), np.finfo(float).tiny)
        deepest = max(census.deepest, rate * float(size_factors.max(initial=0.0)))
        nodes = SizeFactorNodes.spanning(size_factors, precision.tolerance(deepest))
        return cls(nodes, levels, precision, rate)

    def to(self, device: torch.device | str) -> Basis:
        return self._replace(nodes=self.nodes.to(device), levels=self.levels.to(device))


@dataclass(frozen=True)
class CellBatch:
    """Some cells, ready for the products.

    Attributes:
        rows: (cells,) int64, positions of the cells in the whole data.
        fold: the fold that all these cells belong to; -1 for none.
        pairs: (cells, used) one-hot of their pairs of gene and count.
        pairs_t: its transpose, or None: made when it is asked for.
        used: (used,) int64, which pairs of ``CountLevels`` occur in these cells.
        size_factors: (cells,) float64.
        weights: (cells, own nodes) float64, interpolation between the nodes of this batch; 0 where s = 0.
        to_own: (own nodes, nodes) float64, interpolation from the nodes of the whole data to those.
        own_nodes: (own nodes,) float64, their S_m.
        deepest: most counts that a cell has.
        constant: (cells,) float64, x_i+ ln s_i - sum_j ln G(x_ij + 1), nats.
        log_prior: (cells, components) float64 given ln pi_ik, or None.
        labels: (cells,) int64 codes of known labels (for logging alone), or None.
    """

    rows: Tensor
    fold: int
    pairs: CsrMatrix
    pairs_t: CsrMatrix | None
    used: Tensor
    size_factors: Tensor
    weights: Tensor
    to_own: Tensor
    own_nodes: Tensor
    deepest: float
    constant: Tensor
    log_prior: Tensor | None = None
    labels: Tensor | None = None

    @classmethod
    def build(
        cls,
        counts: sp.csr_matrix,
        size_factors: np.ndarray,
        basis: Basis,
        *,
        pick: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        fold: int = -1,
        prior: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        keep: bool = False,
    ) -> CellBatch:
        """Prepare cells of checked counts (cells, genes).

        Args:
            counts, size_factors: of these cells and maybe others; a cell with s = 0 must be empty.
            basis: of data that holds these cells, on the CPU.
            pick: positions of the cells in ``counts``; all of them by default.
            rows: their positions in the whole data; by default ``pick``.
            fold: that they belong to.
            prior, labels: (cells of the batch, ...) see the attributes.
            keep: the batch will be used again, so its transpose is made now.

        Raises:
            KeyError: a pair of gene and count that the basis does not list.
        """
        pick = np.arange(counts.shape[0]) if pick is None else np.asarray(pick, np.int64)
        codes, constant = basis.levels.code(counts, pick)
        lengths = counts.indptr[pick + 1] - counts.indptr[pick]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        used = compact_columns(codes, np.zeros(basis.levels.n_pairs, np.int32))
        kind = np.int32 if codes.size <= np.iinfo(np.int32).max else np.int64
        pairs = CsrMatrix(
            torch.from_numpy(indptr.astype(kind)),
            torch.from_numpy(codes.astype(kind, copy=False)),
            None,
            used.size,
        )
        sizes = np.ascontiguousarray(size_factors[pick], dtype=np.float64)
        used_t = torch.from_numpy(used)
        totals = pairs.matmul(basis.levels.count[used_t][:, None])[:, 0]
        deepest = float(totals.max()) if totals.numel() else 0.0
        # a cell may have fewer counts than its size factor lets expect
        expected = basis.rate * float(sizes.max(initial=0.0))
        own = SizeFactorNodes.spanning(sizes, basis.precision.tolerance(max(deepest, expected)))
        own_nodes = torch.exp(own.log_nodes)
        if own.log_nodes.numel() < basis.nodes.log_nodes.numel():
            to_own = basis.nodes.weights(own_nodes)
        else:
            own, to_own = basis.nodes, torch.eye(basis.nodes.log_nodes.numel(), dtype=torch.float64)
            own_nodes = torch.exp(own.log_nodes)
        picked = torch.from_numpy(sizes)
        log_s = torch.where(totals > 0, torch.log(picked), 0.0)
        with np.errstate(divide="ignore"):
            log_prior = None if prior is None else torch.from_numpy(np.log(prior))
        return cls(
            torch.from_numpy(pick if rows is None else np.asarray(rows, np.int64)),
            fold,
            pairs,
            pairs.transposed() if keep else None,
            used_t,
            picked,
            own.weights(picked),
            to_own,
            own_nodes,
            deepest,
            totals * log_s + torch.from_numpy(constant),
            log_prior,
            None if labels is None else torch.from_numpy(labels),
        )

    @property
    def n_cells(self) -> int:
        return self.pairs.n_rows

    def turned(self) -> CsrMatrix:
        """(used, cells) the pairs' transpose."""
        return self.pairs.transposed() if self.pairs_t is None else self.pairs_t

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CellBatch:
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if hasattr(getattr(self, f.name), "to")
        }
        return replace(self, **moved)


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


def node_softplus(nodes: SizeFactorNodes, log_mean: Tensor, log_inv_disp: Tensor) -> Tensor:
    """(*shape, nodes) ln(1 + S_m rho) in nats, rho = exp(log_mean - log_inv_disp)."""
    return softplus(nodes.log_nodes + (log_mean - log_inv_disp)[..., None], threshold=WIDEST_SOFTPLUS)


def padded_nodes(log_nodes: Tensor) -> np.ndarray:
    """(..., nodes) ln S_m on the CPU -> (..., padded) S_m, filled up with 0 to whole vector registers."""
    n_nodes = log_nodes.shape[-1]
    padded = np.zeros((*log_nodes.shape[:-1], -(-n_nodes // LANES) * LANES))
    padded[..., :n_nodes] = np.exp(log_nodes.numpy())
    return padded


def nodes_of_genes(basis: Basis) -> np.ndarray:
    """(genes, padded) S_m, the same for all genes, as compiled loops take them."""
    return np.tile(padded_nodes(basis.nodes.log_nodes), (basis.levels.n_genes, 1))


def likelihood_tables(
    basis: Basis, log_mean: Tensor, log_inv_disp: Tensor, dtype: torch.dtype = torch.float32
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
    columns = (a.contiguous().numpy(), b.contiguous().numpy(), nodes)
    over_rows(grown_rows, n_genes, GENES_AT_ONCE, *columns, n_nodes, GENES_AT_ONCE, grown.numpy(), zero)
    return grown, torch.from_numpy(zero.sum(0))


def pair_table(levels: CountLevels, log_inv_disp: Tensor) -> Tensor:
    """(pairs, K) float64 D(c, r_kj) in nats for every pair of gene and count."""
    if log_inv_disp.device.type == "cpu":
        pair = torch.empty(levels.n_pairs, log_inv_disp.shape[0], dtype=torch.float64)
        places = (levels.first.numpy(), levels.high_first.numpy(), levels.high_count.numpy())
        b = log_inv_disp.detach().contiguous().numpy()
        over_rows(pair_rows, levels.n_genes, GENES_AT_ONCE, b, *places, pair.numpy())
        return pair
    return _pair_table_in_torch(levels, log_inv_disp)


def _pair_table_in_torch(levels: CountLevels, log_inv_disp: Tensor) -> Tensor:
    b = log_inv_disp.T.contiguous()  # (genes, K)
    low = levels.running_sum(level_terms(levels.level[:, None], b[levels.gene[: levels.n_low]]))
    if not levels.n_high:
        return low
    exact = low[levels.first[levels.high_gene + 1] - 1]
    return torch.cat([low, exact + tail_terms(levels.high_count[:, None], b[levels.high_gene])])


def batch_log_likelihood(batch: CellBatch, basis: Basis, tables: LikelihoodTables) -> Tensor:
    """(cells, K) float64, ln p(x_i | component k) in nats, by the sums at the head of this file."""
    rate = tables.log_mean[:, :, None] - tables.grown @ batch.to_own.T  # (genes, K, own nodes)
    if tables.dtype == torch.float32:
        summed = _pair_sums_in_float32(batch, basis, rate, tables.pair, tables.largest)
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
    batch: CellBatch, basis: Basis, rate: Tensor, pair: Tensor, largest: float
) -> Tensor:
    """``_pair_sums`` by float32 products, without their loss of digits.

    Sums near 1e4 nats nearly cancel between components. So values at the first node are cut into a multiple
    of a power of two, so coarse that float32 sums of them are exact, and a small rest. The other nodes add
    small steps to these. Where a bound on the rounding of the steps passes FLOAT32_NATS all values are cut.
    """
    _, n_components, n_own = rate.shape
    if batch.used.numel() == 0:
        return rate.new_zeros(batch.n_cells, n_components * n_own)
    # no sum exceeds the deepest cell's counts times the largest value of a count
    unit = 2.0 ** (math.ceil(math.log2(max(largest * batch.deepest, 1e-30))) - 23)
    steps_will_do = batch.n_cells >= FEWEST_CELLS_FOR_STEPS
    n_steps = n_own - 1
    parts = (n_components, n_components, n_components * n_steps, n_steps, n_steps, 1)
    if steps_will_do:
        summed = batch.pairs.matmul(_step_table(batch, basis, rate, pair, unit))
        coarse_first, rest_first, steps, coarse, rest, bound = summed[:, : sum(parts)].split(parts, 1)
        steps_will_do = float(bound.amax()) * torch.finfo(torch.float32).eps / 2 <= FLOAT32_NATS
    if not steps_will_do:
        summed = batch.pairs.matmul(_split_table(batch, basis, rate, pair, unit))
        width = n_components * n_own
        return summed[:, :width].double() + summed[:, width : 2 * width]
    first = coarse_first.double() + rest_first
    others = steps.unflatten(1, (n_components, n_steps)) + (coarse.double() + rest)[:, None]
    return torch.cat([first[:, :, None], first[:, :, None] + others], 2).flatten(1)


def _step_table(batch: CellBatch, basis: Basis, rate: Tensor, pair: Tensor, unit: float) -> Tensor:
    """(used, columns) float32 in whole lines, see ``nbmix.kernels.step_table_rows``."""
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


def _split_table(batch: CellBatch, basis: Basis, rate: Tensor, pair: Tensor, unit: float) -> Tensor:
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
    over_rows(kernel, len(table), PAIRS_AT_ONCE, *(t.numpy() for t in parts), unit, table.numpy())

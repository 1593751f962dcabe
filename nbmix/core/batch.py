"""Cells prepared for the products, and what all batches of one data set share.

Cells of like size factors come in one batch, which needs few nodes of its own: what is tabulated at the
nodes of the whole data, the ``Basis``, is interpolated to those (``to_own``), and statistics go back the
same way. How many nodes there are follows from the ``Precision``: an interpolation to a relative error e of
ln(1 + s rho) costs a cell of c counts, seen or expected, about e c nats.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from nbmix.core.csr import CsrMatrix
from nbmix.core.kernels.sparse import compact_columns
from nbmix.core.levels import CountCensus, CountLevels
from nbmix.core.nodes import NODE_TOLERANCE, SizeFactorNodes, padded_nodes
from nbmix.errors import InputError

FLOAT32_NODE_NATS = 0.01  # that interpolation may cost a cell where products are float32; tests see a quarter

LEAST_COUNTS = 100.0  # a cell counts as having at least so many in that bound


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
    """How closely ln(1 + s rho) is interpolated: to max(relative, nats / counts of the deepest cell)."""

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


class SizeRange(NamedTuple):
    """The smallest and the largest size factor above 0 (0 where there is none), and the sum of all."""

    smallest: float = 0.0
    largest: float = 0.0
    total: float = 0.0

    @classmethod
    def of(cls, size_factors: np.ndarray) -> SizeRange:
        positive = size_factors[size_factors > 0]
        if not positive.size:
            return cls()
        return cls(float(positive.min()), float(positive.max()), float(size_factors.sum()))

    def joined(self, other: SizeRange) -> SizeRange:
        """That of two sets of cells together."""
        smallest = min((s for s in (self.smallest, other.smallest) if s > 0), default=0.0)
        return SizeRange(smallest, max(self.largest, other.largest), self.total + other.total)


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
        return cls.reaching(census, levels, SizeRange.of(size_factors), precision)

    @classmethod
    def reaching(
        cls, census: CountCensus, levels: CountLevels, sizes: SizeRange, precision: Precision = EXACT
    ) -> Basis:
        """As ``from_census``, where no more is known of the size factors."""
        rate = census.total / max(sizes.total, np.finfo(float).tiny)
        deepest = max(census.deepest, rate * sizes.largest)
        ends = np.array([sizes.smallest, sizes.largest])
        nodes = SizeFactorNodes.spanning(ends, precision.tolerance(deepest))
        return cls(nodes, levels, precision, rate)

    def own_nodes(self, sizes: np.ndarray, deepest: float) -> tuple[SizeFactorNodes, Tensor]:
        """Nodes for some cells, and the weights (own nodes, nodes) that interpolate to them from these.

        ``deepest`` is the most counts that one of the cells has. Where they would need as many nodes as there
        are, they take these.
        """
        # a cell may have fewer counts than its size factor lets expect
        expected = self.rate * float(sizes.max(initial=0.0))
        own = SizeFactorNodes.spanning(sizes, self.precision.tolerance(max(deepest, expected)))
        n_nodes = self.nodes.log_nodes.numel()
        if own.log_nodes.numel() < n_nodes:
            return own, self.nodes.weights(torch.exp(own.log_nodes))
        return self.nodes, torch.eye(n_nodes, dtype=torch.float64)

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
        origins: (cells,) int64, what each cell comes from, see ``nbmix.core.offsets``; None: nothing known.
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
    origins: Tensor | None = None

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
        origins: np.ndarray | None = None,
        keep: bool = False,
    ) -> CellBatch:
        """Prepare cells of checked counts (cells, genes).

        Args:
            counts, size_factors: of these cells and maybe others; a cell with s = 0 must be empty.
            basis: of data that holds these cells, on the CPU.
            pick: positions of the cells in ``counts``; all of them by default.
            rows: their positions in the whole data; by default ``pick``.
            fold: that they belong to.
            prior, labels, origins: (cells of the batch, ...) see the attributes.
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
            used.size,
        )
        sizes = np.ascontiguousarray(size_factors[pick], dtype=np.float64)
        used_t = torch.from_numpy(used)
        totals = pairs.matmul(basis.levels.count[used_t][:, None])[:, 0]
        deepest = float(totals.max()) if totals.numel() else 0.0
        own, to_own = basis.own_nodes(sizes, deepest)
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
            torch.exp(own.log_nodes),
            deepest,
            totals * log_s + torch.from_numpy(constant),
            log_prior,
            None if labels is None else torch.from_numpy(labels),
            None if origins is None else torch.from_numpy(origins),
        )

    @property
    def n_cells(self) -> int:
        return self.pairs.n_rows

    @property
    def origin(self) -> int:
        """What all cells come from; -1 where nothing is known, or there is no cell.

        Raises:
            ValueError: they come from several.
        """
        if self.origins is None or not self.n_cells:
            return -1
        first = int(self.origins[0])
        if bool((self.origins != first).any()):
            raise ValueError("cells of several origins in one batch")
        return first

    def given_log_prior(self, n_components: int) -> Tensor:
        """(cells, K) ln pi as the data gives it.

        Raises:
            InputError: it gives none, or one of other components.
        """
        if self.log_prior is None or self.log_prior.shape[1] != n_components:
            raise InputError(
                f"model.weights=given: the data holds no prior of {n_components} columns; set data.prior_key "
                "to such a field of obsm"
            )
        return self.log_prior

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


def nodes_of_genes(basis: Basis) -> np.ndarray:
    """(genes, padded) S_m, the same for all genes unless they have their own, as compiled loops take them."""
    if basis.nodes.log_nodes.dim() == 2:
        return padded_nodes(basis.nodes.log_nodes)
    return np.tile(padded_nodes(basis.nodes.log_nodes), (basis.levels.n_genes, 1))

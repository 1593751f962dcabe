"""The distinct pairs of gene and count of a data set.

Counts are small integers, and few different ones occur in a gene. So what a count adds is kept in tables
over pairs (j, c), and a cell is a list of places in these. D(c, r), a sum over levels t < c, needs every
level up to the gene's largest count: hence the order of the pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import scipy.sparse as sp
import scipy.special
import torch
from torch import Tensor

from nbmix.core.kernels.sparse import PairPlaces, code_rows, largest_and_high
from nbmix.core.special import EXACT_COUNT

LOG_FACTORIAL = scipy.special.gammaln(np.arange(1024) + 1.0)


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

    def places(self) -> PairPlaces:
        """Where the pairs of every gene stand, as compiled loops take it."""
        return PairPlaces(self.first.numpy(), self.high_first.numpy(), self.high_count.numpy())

    def places_of(self, gene: Tensor, count: Tensor) -> Tensor:
        """Positions among the pairs of some that are listed, given as (some,) genes and counts."""
        keys = _keys(self.gene, self.count)
        order = np.argsort(keys)
        return torch.from_numpy(order[np.searchsorted(keys, _keys(gene, count), sorter=order)])

    def to(self, device: torch.device | str) -> CountLevels:
        return CountLevels(*(getattr(self, f.name).to(device) for f in fields(self)))

    def code(self, counts: sp.csr_matrix, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions among the pairs of the nonzeros of some rows, row by row, and -sum_j ln G(x_ij + 1).

        Raises:
            KeyError: a pair that is not listed.
        """
        size = int((counts.indptr[rows + 1] - counts.indptr[rows]).sum())
        codes, constant = np.empty(size, np.int32), np.empty(rows.size)
        matrix = (counts.indptr, counts.indices, counts.data)
        stranger = code_rows(rows, matrix, self.places(), LOG_FACTORIAL, codes, constant)
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


def _keys(gene: Tensor, count: Tensor) -> np.ndarray:
    """One number a pair of gene and count."""
    return (gene.numpy() << 32) | count.numpy().astype(np.int64)


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

    @property
    def seen(self) -> np.ndarray:
        """(genes,) bool, whether there is a count."""
        return self._largest > 0

    def plain(self) -> dict[str, Any]:
        """Tensors and numbers, as a checkpoint keeps them."""
        arrays = {"largest": torch.from_numpy(self._largest), "high": torch.from_numpy(self._high)}
        return arrays | {"deepest": self.deepest, "total": self.total}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> CountCensus:
        """The census that ``plain`` came from."""
        census = cls(0)
        census._largest, census._high = (plain[name].numpy().copy() for name in ("largest", "high"))
        census.deepest, census.total = plain["deepest"], plain["total"]
        return census

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

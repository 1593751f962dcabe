"""Stepwise EM: cells arrive in parts, and nothing but sums is kept of them.

Each cell is met once. Its responsibilities q are those of the components as they stand when it comes, and

    S <- S + sum_i s(x_i, q_i) over the part,    M step on S

is stepwise EM (Cappe & Moulines 2009, J. R. Stat. Soc. B 71, eq. 3) on the mean S / n of n cells, with the
step size m / (n + m) for a part of m cells. Every cell counts alike, however cells are cut into parts. With a
larger step first parts, whose responsibilities came from components that were not yet what they are, would be
forgotten, and the mean be that of fewer cells.

The M step depends on the cells through these sums alone (``nbmix.core.statistics``): over pairs of gene and
count, and at nodes of the size factor. A part may reach beyond the counts, size factors and genes met so far;
then the sums are moved to a basis that reaches as far.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from nbmix.core.batch import Basis, Precision, SizeRange
from nbmix.core.levels import CountCensus
from nbmix.core.statistics import SufficientStatistics


@dataclass(frozen=True)
class RunningStatistics:
    """Sums over the cells met so far.

    Attributes:
        statistics: on ``basis``.
        basis: of the genes that have had a count.
        genes: (genes,) int64 which these are among all genes, ascending.
        census: of all genes.
        sizes: of the cells.
        n_cells: how many.
    """

    statistics: SufficientStatistics
    basis: Basis
    genes: np.ndarray
    census: CountCensus
    sizes: SizeRange
    n_cells: int

    @classmethod
    def none(cls, n_genes: int, n_components: int, precision: Precision) -> RunningStatistics:
        """Before the first cell of that many genes."""
        census, sizes = CountCensus(n_genes), SizeRange()
        genes, basis = _basis(census, sizes, precision)
        return cls(SufficientStatistics.zeros(basis, n_components, "cpu"), basis, genes, census, sizes, 0)

    def zeros(self) -> SufficientStatistics:
        """None, on the basis."""
        return SufficientStatistics.zeros(self.basis, self.statistics.weight.numel(), "cpu")

    def reaching(self, counts: sp.csr_matrix, size_factors: np.ndarray) -> RunningStatistics:
        """The same sums on a basis that holds cells (cells, all genes) to come, too; these are not added."""
        census, sizes = deepcopy(self.census), self.sizes.joined(SizeRange.of(size_factors))
        census.add(counts)
        genes, basis = _basis(census, sizes, self.basis.precision)
        stand = torch.from_numpy(np.searchsorted(genes, self.genes))
        statistics = self.statistics.moved(self.basis, basis, stand)
        return RunningStatistics(statistics, basis, genes, census, sizes, self.n_cells)

    def plus(self, part: SufficientStatistics, n_cells: int) -> RunningStatistics:
        """With those of so many cells, on the same basis."""
        return replace(self, statistics=self.statistics + part, n_cells=self.n_cells + n_cells)

    def plain(self) -> dict[str, Any]:
        """Tensors, numbers and lists, as a checkpoint keeps them."""
        return {
            "statistics": self.statistics.tensors(),
            "census": self.census.plain(),
            "sizes": list(self.sizes),
            "precision": list(self.basis.precision),
            "n_cells": self.n_cells,
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> RunningStatistics:
        """The sums that ``plain`` came from."""
        census, sizes = CountCensus.of(plain["census"]), SizeRange(*plain["sizes"])
        genes, basis = _basis(census, sizes, Precision(*plain["precision"]))
        statistics = SufficientStatistics(*plain["statistics"])
        return cls(statistics, basis, genes, census, sizes, plain["n_cells"])


def _basis(census: CountCensus, sizes: SizeRange, precision: Precision) -> tuple[np.ndarray, Basis]:
    """The genes with counts, and the basis of these."""
    genes = np.flatnonzero(census.seen)
    return genes, Basis.reaching(census, census.levels(genes), sizes, precision)

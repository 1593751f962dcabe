"""Some genes of some origins: rows of arrays that hold nothing of the others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OriginGenes(NamedTuple):
    """Genes of origins, gene by gene.

    Attributes:
        first: (genes + 1,) int64, where the rows of each gene begin.
        gene, origin: (rows,) int64.
        row: (origins, genes) int32, -1 where there is none.
    """

    first: Tensor
    gene: Tensor
    origin: Tensor
    row: Tensor

    @classmethod
    def where(cls, chosen: Tensor) -> OriginGenes:
        """Those that are ``chosen``, (origins, genes) bool on the CPU."""
        gene, origin = torch.nonzero(chosen.T, as_tuple=True)
        first = torch.zeros(chosen.shape[1] + 1, dtype=torch.int64)
        first[1:] = torch.cumsum(chosen.sum(0), 0)
        row = torch.full(chosen.shape, -1, dtype=torch.int32)
        row[origin, gene] = torch.arange(len(gene), dtype=torch.int32)
        return cls(first, gene, origin, row)

    @property
    def n_rows(self) -> int:
        return len(self.gene)

    @property
    def chosen(self) -> tuple[Tensor, Tensor]:
        """Where the rows are in an array (origins, genes)."""
        return self.origin, self.gene

"""CSR matrices of ones on any torch device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from nbmix.core.kernels.sparse import transpose_pattern


@dataclass(frozen=True)
class CsrMatrix:
    """A CSR matrix whose entries are all 1, on any torch device.

    Attributes:
        indptr: (rows + 1,) int32 or int64.
        indices: (nonzeros,) columns, of the same type.
        n_columns: number of columns.
    """

    indptr: Tensor
    indices: Tensor
    n_columns: int

    @property
    def n_rows(self) -> int:
        return self.indptr.numel() - 1

    def to(self, device: torch.device | str) -> CsrMatrix:
        return replace(self, indptr=self.indptr.to(device), indices=self.indices.to(device))

    def transposed(self) -> CsrMatrix:
        """The transpose."""
        if self.indices.device.type == "cpu":
            indptr, rows = transpose_pattern(self.indptr.numpy(), self.indices.numpy(), self.n_columns)
            return CsrMatrix(torch.from_numpy(indptr), torch.from_numpy(rows), self.n_rows)
        row = torch.repeat_interleave(self.indptr.diff().long())
        filled = torch.bincount(self.indices, minlength=self.n_columns)
        indptr = torch.cat([filled.new_zeros(1), torch.cumsum(filled, 0)])
        order = torch.argsort(self.indices, stable=True)
        kind = self.indptr.dtype
        return CsrMatrix(indptr.to(kind), row[order].to(kind), self.n_rows)

    def matmul(self, dense: Tensor) -> Tensor:
        """This matrix times ``dense`` (columns, width), accumulated in the dtype of ``dense``."""
        if dense.shape[0] != self.n_columns:
            raise ValueError(f"cannot multiply: {self.n_columns} columns times {dense.shape[0]} rows")
        if self.indices.numel() == 0:
            return dense.new_zeros(self.n_rows, dense.shape[1])
        # in float32 the bag's kernel takes half the time of a CSR product at these widths
        if dense.dtype == torch.float32:
            return embedding_bag(self.indices, dense, self.indptr[:-1], mode="sum")
        values = dense.new_ones(self.indices.numel())
        matrix = torch.sparse_csr_tensor(
            self.indptr, self.indices, values, size=(self.n_rows, self.n_columns), check_invariants=False
        )
        return matrix @ dense

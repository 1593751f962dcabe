"""The encoder network q(z given x)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from nbmix.products import CsrMatrix


class SparseEncoder(nn.Module):
    """ln softmax(Linear(h, K) . ReLU . Linear(genes, h) . log1p(x)), reading CSR counts.

    Only rows of the first layer that a batch has counts for are read; its counts are never made dense.

    Args:
        n_genes, n_components: sizes of input and output.
        n_hidden: h, 128 in the source.
    """

    def __init__(self, n_genes: int, n_components: int, n_hidden: int = 128) -> None:
        super().__init__()
        bound = n_genes**-0.5  # as nn.Linear draws it
        self.first = nn.Parameter(torch.empty(n_genes, n_hidden).uniform_(-bound, bound))
        self.first_bias = nn.Parameter(torch.empty(n_hidden).uniform_(-bound, bound))
        self.last = nn.Linear(n_hidden, n_components)

    def forward(self, counts: CsrMatrix) -> Tensor:
        """(cells, genes) counts -> (cells, K) log probabilities, float32."""
        assert counts.values is not None
        if counts.indices.numel() == 0:  # still a function of all weights, as data-parallel training wants
            hidden = self.first_bias + self.first[:0].sum(0) + self.first_bias.new_zeros(counts.n_rows, 1)
        else:
            hidden = self.first_bias + embedding_bag(
                counts.indices,
                self.first,
                counts.indptr[:-1],
                mode="sum",
                per_sample_weights=torch.log1p(counts.values),
            )
        return torch.log_softmax(self.last(torch.relu(hidden)), 1)

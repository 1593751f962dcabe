"""The encoder network q(z given x)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nbmix.minibatch import log_count_product
from nbmix.products import CellBatch, CountLevels


class SparseEncoder(nn.Module):
    """ln softmax(Linear(h, K) . ReLU . Linear(genes, h) . log1p(x)), reading sparse counts.

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

    def forward(self, batch: CellBatch, levels: CountLevels) -> Tensor:
        """(cells, K) log probabilities, float32; ``levels`` are those that the batch was built with."""
        hidden = self.first_bias + log_count_product(batch, levels, self.first)
        return torch.log_softmax(self.last(torch.relu(hidden)), 1)

"""Networks: those that read sparse counts, normals by mean and ln sd, and the decoder of the deep models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from nbmix.core.batch import CellBatch
from nbmix.core.levels import CountLevels
from nbmix.core.minibatch import log_count_product
from nbmix.core.parameters import START_LOG_INV_DISP

LOG_SD_RANGE = (-6.0, 3.0)  # of every latent normal: one that collapses or explodes ends the fit

CELLS_AT_ONCE = 256  # that are dense in genes


class OriginLayer(nn.Module):
    """What a layer of h units is told of the origin of the cells of a batch: one-hot times W, (G, h).

    As scvi-tools appends a batch to the input of a layer; W begins at 0, so that no origin differs at first.

    Args:
        n_origins: G.
        n_hidden: h.
    """

    def __init__(self, n_origins: int, n_hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_origins, n_hidden))

    @property
    def n_origins(self) -> int:
        """G."""
        return self.weight.shape[0]

    def forward(self, origin: int) -> Tensor:
        """(h,); the mean of all origins for cells of none, -1."""
        return self.weight.mean(0) if origin < 0 else self.weight[origin]


class SparseLayer(nn.Module):
    """A first layer on sparse counts: bias + log1p(x) W, (cells, h).

    Only the rows of W that a batch has counts for are read; counts are never made dense.

    Attributes:
        first: (genes, h) W.
        first_bias: (h,).
        of_origin: what is added for the origin of the cells; None where there are none.
    """

    def __init__(self, n_genes: int, n_hidden: int) -> None:
        super().__init__()
        bound = n_genes**-0.5  # as nn.Linear draws it
        self.first = nn.Parameter(torch.empty(n_genes, n_hidden).uniform_(-bound, bound))
        self.first_bias = nn.Parameter(torch.empty(n_hidden).uniform_(-bound, bound))
        self.of_origin: OriginLayer | None = None

    def know_origins(self, n_origins: int) -> None:
        """Tell so many origins apart."""
        self.of_origin = OriginLayer(n_origins, self.first_bias.numel())

    def knows(self, origin: int) -> bool:
        """Whether it can tell cells of an origin from those of others, if there are others."""
        return self.of_origin is None or 0 <= origin < self.of_origin.n_origins

    def first_layer(self, batch: CellBatch, levels: CountLevels) -> Tensor:
        """(cells, h); ``levels`` are those that the batch was built with."""
        bias = self.first_bias
        if self.of_origin is not None:
            bias = bias + self.of_origin(batch.origin)
        return bias + log_count_product(batch, levels, self.first)

    def restrict_genes(self, positions: Tensor) -> None:
        """Keep the genes at ``positions`` alone; the others count as silent."""
        self.first = nn.Parameter(self.first.data[positions])


class SparseEncoder(SparseLayer):
    """ln softmax(Linear(h, K) . ReLU . first layer): ln q(z given x).

    Args:
        n_genes, n_components: sizes of input and output.
        n_hidden: h, 128 in the source.
    """

    def __init__(self, n_genes: int, n_components: int, n_hidden: int = 128) -> None:
        super().__init__(n_genes, n_hidden)
        self.last = nn.Linear(n_hidden, n_components)

    def forward(self, batch: CellBatch, levels: CountLevels) -> Tensor:
        """(cells, K) log probabilities, float32; ``levels`` are those that the batch was built with."""
        return torch.log_softmax(self.last(torch.relu(self.first_layer(batch, levels))), 1)


class SparseTrunk(SparseLayer):
    """ReLU . LayerNorm . first layer: (cells, h), what the networks of a deep model begin with.

    The norm takes away most of what a cell's depth does to the sum over genes.

    Args:
        n_genes: of the input.
        n_hidden: h.
    """

    def __init__(self, n_genes: int, n_hidden: int) -> None:
        super().__init__(n_genes, n_hidden)
        self.norm = nn.LayerNorm(n_hidden)

    def forward(self, batch: CellBatch, levels: CountLevels) -> Tensor:
        """(cells, h); ``levels`` are those that the batch was built with."""
        return torch.relu(self.norm(self.first_layer(batch, levels)))


class Normal(NamedTuple):
    """Independent normals (..., dimensions) by mean and ln of the standard deviation."""

    mean: Tensor
    log_sd: Tensor

    @classmethod
    def of(cls, both: Tensor) -> Normal:
        """From the output (..., 2 dimensions) of a network."""
        mean, log_sd = both.chunk(2, -1)
        return cls(mean, log_sd.clamp(*LOG_SD_RANGE))

    def sample(self, noise: Tensor) -> Tensor:
        """mean + sd noise, for standard normal ``noise`` (..., dimensions)."""
        return self.mean + self.log_sd.exp() * noise

    def log_density(self, value: Tensor) -> Tensor:
        """(...,) float64 ln N(value; mean, sd^2), nats."""
        scaled = (value - self.mean) * (-self.log_sd).exp()
        return -(scaled.square() / 2 + self.log_sd + math.log(2 * math.pi) / 2).double().sum(-1)

    def entropy(self) -> Tensor:
        """(...,) float64 nats."""
        return (self.log_sd + math.log(2 * math.pi * math.e) / 2).double().sum(-1)


def normal_kl(q: Normal, p: Normal) -> Tensor:
    """(...,) float64 KL(q || p) in nats, summed over dimensions.

    sum_d ln(sd_p / sd_q) + [sd_q^2 + (m_q - m_p)^2] / (2 sd_p^2) - 1/2
    """
    ratio = 2 * (q.log_sd - p.log_sd)
    off = (q.mean - p.mean) * (-p.log_sd).exp()
    return ((ratio.exp() - ratio - 1 + off.square()) / 2).double().sum(-1)


def standard_normal_like(q: Normal) -> Normal:
    """N(0, I) in the shape of ``q``."""
    return Normal(torch.zeros_like(q.mean), torch.zeros_like(q.log_sd))


class Decoder(nn.Module):
    """ln mu_j(z) = ln unit + ln softmax_j(Linear(h, genes) . ReLU . Linear(dimensions, h) . z), and ln r_j.

    A softmax, because size factors say how many counts a cell has (Lopez et al. 2018, scVI). Genes that the
    data lacks still belong to it. Where cells are of several origins the hidden layer is told which, and what
    the softmax is of has the offsets of genes there.

    Attributes:
        log_inv_disp: (genes,) ln r_j.
        log_unit: () ln of the counts per unit of size factor.
        kept: (genes of the data,) int64, their positions among all genes.
        of_origin: what is added to the hidden layer for the origin of the cells; None where there are none.
        offsets: (origins, all genes) natural logarithm; of cells of no origin there are none.
    """

    log_unit: Tensor
    kept: Tensor
    offsets: Tensor

    def __init__(self, n_genes: int, n_latent: int, n_hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(n_latent, n_hidden)
        self.out = nn.Linear(n_hidden, n_genes)
        nn.init.zeros_(self.out.weight)  # random ones of rare genes would stay what they are
        self.log_inv_disp = nn.Parameter(torch.full((n_genes,), START_LOG_INV_DISP))
        self.register_buffer("log_unit", torch.zeros(()))
        self.register_buffer("kept", torch.arange(n_genes), persistent=False)
        self.of_origin: OriginLayer | None = None

    def know_origins(self, n_origins: int) -> None:
        """Tell so many origins apart."""
        self.of_origin = OriginLayer(n_origins, self.hidden.out_features)
        self.register_buffer("offsets", torch.zeros(n_origins, self.out.out_features))

    def logits(self, z: Tensor, origin: int = -1) -> Tensor:
        """(rows, all genes) that the softmax is of, for z (rows, dimensions) of one origin."""
        hidden = self.hidden(z)
        if self.of_origin is not None:
            hidden = hidden + self.of_origin(origin)
        logits = self.out(torch.relu(hidden))
        return logits if self.of_origin is None or origin < 0 else logits + self.offsets[origin]

    def log_mean(self, z: Tensor, origin: int = -1) -> Tensor:
        """(rows, genes of the data) ln mu, per unit of size factor."""
        return torch.log_softmax(self.logits(z, origin), 1)[:, self.kept] + self.log_unit

    def restrict_genes(self, positions: Tensor) -> None:
        """Keep the genes at ``positions`` alone; the others keep their share of the softmax."""
        self.log_inv_disp = nn.Parameter(self.log_inv_disp.data[positions])
        self.kept = self.kept[positions]

    def log_likelihood(
        self, z: Tensor, log_size: Tensor, cells: SparseCells, cells_at_once: int = CELLS_AT_ONCE
    ) -> Tensor:
        """(cells,) float64 ln p(x_i | z_i, s_i) without its part in
        ``DeepMixture.shared_log_likelihood``, in nats.

            sum_{x > 0} x [ln mu - ln(1 + s rho)] - sum_j r ln(1 + s rho),    rho = mu / r

        Args:
            z: (cells, dimensions).
            log_size: (cells,) ln s; -inf for an empty cell that has none.
            cells: their counts, and their origin.
            cells_at_once: that are dense in genes.
        """
        parts = [
            self._block(z[rows], log_size[rows], cells.block(rows))
            for first in range(0, max(1, len(z)), cells_at_once)
            for rows in [slice(first, min(first + cells_at_once, len(z)))]
        ]
        return torch.cat(parts)

    def _block(self, z: Tensor, log_size: Tensor, cells: SparseCells) -> Tensor:
        logits = self.logits(z, cells.origin)
        shift = self.log_unit - torch.logsumexp(logits, 1)  # (cells,)
        if self.kept.numel() < logits.shape[1]:
            logits = logits[:, self.kept]
        # ln rho + ln s, dense in (cells, genes): what a zero costs needs every gene
        log_rate = logits + (shift + log_size)[:, None] - self.log_inv_disp
        zeros = softplus(log_rate) @ self.log_inv_disp.exp()
        at = cells.row * logits.shape[1] + cells.gene
        found = torch.index_select(log_rate.reshape(-1), 0, at)
        log_mean = found - log_size[cells.row] + self.log_inv_disp[cells.gene]
        counted = cells.count * (log_mean - softplus(found)).double()
        return (-zeros.double()).index_add(0, cells.row, counted)


@dataclass(frozen=True)
class SparseCells:
    """The nonzero counts of some cells, one by one.

    Attributes:
        indptr: (cells + 1,) int64, where each cell's begin.
        row, gene: (nonzeros,) int64.
        count: (nonzeros,) float64.
        origin: of all of these cells; -1 for nothing known.
    """

    indptr: Tensor
    row: Tensor
    gene: Tensor
    count: Tensor
    origin: int = -1

    @classmethod
    def of(cls, batch: CellBatch, levels: CountLevels) -> SparseCells:
        pair = batch.used[batch.pairs.indices.long()]
        indptr = batch.pairs.indptr.long()
        row = torch.repeat_interleave(indptr.diff())
        return cls(indptr, row, levels.gene[pair], levels.count[pair], batch.origin)

    def block(self, rows: slice) -> SparseCells:
        """The cells of ``rows``."""
        if rows.start == 0 and rows.stop == self.indptr.numel() - 1:
            return self
        first, last = int(self.indptr[rows.start]), int(self.indptr[rows.stop])
        inside = slice(first, last)
        return SparseCells(
            self.indptr[rows.start : rows.stop + 1] - first,
            self.row[inside] - rows.start,
            self.gene[inside],
            self.count[inside],
            self.origin,
        )

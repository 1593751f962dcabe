"""What a mixture in memory says of the cells of its batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nbmix.core.batch import CellBatch
from nbmix.core.mixture import Mixture


def responsibilities_of(mixture: Mixture, batches: Sequence[CellBatch], n_cells: int) -> tuple[Tensor, float]:
    """(n_cells, K) responsibilities from copies that have not seen the cell, and nats per cell."""
    q = torch.zeros(n_cells, mixture.settings.n_components, dtype=torch.float64)
    total = 0.0
    for batch in batches:
        posterior = mixture.posterior(batch)
        q[batch.rows] = posterior.responsibilities.cpu()
        total += float(posterior.log_likelihood.sum())
    return q, total / max(1, sum(batch.n_cells for batch in batches))

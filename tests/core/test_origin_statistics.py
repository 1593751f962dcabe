"""Statistics of genes of origins against sums over cells."""

from __future__ import annotations

import torch

from nbmix.core.origin_genes import OriginGenes
from nbmix.core.origin_statistics import OriginStatistics
from nbmix.core.statistics import SufficientStatistics
from tests.helpers.elsewhere import back, elsewhere
from tests.helpers.origins import BatchedCells


def test_rows_are_the_statistics_of_the_cells_of_their_origin():
    cells = BatchedCells(n=90, p=20, g=3)
    chosen = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    q = torch.softmax(torch.randn(90, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1)
    here, there = (
        OriginStatistics(cells.basis, OriginGenes.where(chosen), (4, 2, 1), room)
        for room in (None, torch.ones(50_000, dtype=torch.float64))
    )
    batches = cells.batches(folds=4)
    for batch in batches:
        here.add(batch, q[batch.rows])
        there.add(batch, elsewhere(q[batch.rows]))
    torch.testing.assert_close(back(there.rate), here.rate, rtol=1e-10, atol=1e-10)
    seen = here.seen_without([2, None])
    for copy, fold in enumerate((2, None)):
        for origin in range(3):
            wanted = SufficientStatistics.zeros(cells.basis, 2, "cpu")
            for batch in batches:
                if batch.fold != fold:
                    of_origin = q[batch.rows] * (batch.origins == origin)[:, None]
                    wanted.add_batch_(batch, cells.basis, of_origin, torch.float64)
            torch.testing.assert_close(seen.node[copy, origin], wanted.node, rtol=1e-9, atol=1e-9)
            rate = seen.rate.sum(0) - (0 if fold is None else seen.rate[fold])
            mine = seen.genes.origin == origin
            genes = seen.genes.gene[mine]
            torch.testing.assert_close(rate[mine], wanted.rate[genes], rtol=1e-6, atol=1e-6)

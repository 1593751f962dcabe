"""Statistics of the mixture with shared axes by fold."""

from __future__ import annotations

import torch

from nbmix.core.factor_statistics import FactorStatistics
from tests.helpers.mixtures import awkward_data, random_q


def test_a_total_without_a_fold_is_that_of_the_other_cells():
    data, q = awkward_data(folds=3, block_size=10), random_q(90, 6).view(90, 2, 3)
    whole, others = FactorStatistics(data.basis, 2, 3, 3), FactorStatistics(data.basis, 2, 3, 3)
    for batch in data.batches:
        whole.add(batch, q[batch.rows])
        if batch.fold != 1:
            others.add(batch, q[batch.rows])
    for one, other in zip(whole.without(1, whole.total()).tensors(), others.total().tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert all(float(t.abs().sum()) == 0 for s in whole.zero_().of_fold for t in s.tensors())

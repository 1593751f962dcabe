"""Statistics by fold: leaving one out is a subtraction."""

from __future__ import annotations

import pytest
import torch

from nbmix.core.fold_statistics import FoldStatistics
from nbmix.core.statistics import SufficientStatistics
from tests.helpers.mixtures import awkward_data, random_q


@pytest.mark.parametrize("left_out", [0, 2])
def test_a_total_without_a_fold_is_that_of_the_other_cells(left_out):
    data, q = awkward_data(folds=3, block_size=10), random_q(90, 3)
    statistics = FoldStatistics(data.basis, 3, 3, torch.float64)
    whole, others = (SufficientStatistics.zeros(data.basis, 3, "cpu") for _ in range(2))
    for batch in data.batches:
        statistics.add(batch, q[batch.rows])
        whole.add_batch_(batch, data.basis, q[batch.rows], torch.float64)
        if batch.fold != left_out:
            others.add_batch_(batch, data.basis, q[batch.rows], torch.float64)
    total = statistics.total()
    for found, wanted in ((total, whole), (statistics.without(left_out, total), others)):
        for one, other in zip(found.tensors(), wanted.tensors(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_fold_of_which_no_cell_was_met_leaves_the_total_as_it_is():
    data, q = awkward_data(folds=3), random_q(90, 3)
    statistics = FoldStatistics(data.basis, 3, 3, torch.float64)
    for batch in data.batches:
        if batch.fold != 1:
            statistics.add(batch, q[batch.rows])
    total = statistics.total()
    for one, other in zip(statistics.without(1, total).tensors(), total.tensors(), strict=True):
        assert torch.equal(one, other)


def test_a_batch_outside_the_folds_is_refused():
    data = awkward_data(folds=1)
    statistics = FoldStatistics(data.basis, 3, 3, torch.float64)
    with pytest.raises(ValueError, match="fold -1"):
        statistics.add(data.batches[0], random_q(90, 3)[data.batches[0].rows])

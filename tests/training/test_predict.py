"""Predictions in the order of the cells, and models brought to the genes of new cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbmix.errors import InputError
from nbmix.models.base import Prediction
from nbmix.models.mixture_em import MixtureEM
from nbmix.training.predict import join_batches, predict_here, restore_for
from nbmix.training.saved_fit import checkpoint_of
from tests.helpers.running import fit, small_data


@pytest.fixture(scope="module")
def fitted():
    """The model, its data module, and predictions of a fit."""
    data = small_data()
    model = MixtureEM(data.gene_names, n_components=2, folds=1, dtype="float64")
    module, cells = fit(model, data, epochs=5, dtype="float64")
    return model, module, cells


def prediction(rows):
    column = torch.tensor(rows, dtype=torch.float64)
    both = torch.stack([column, -column], 1)
    return Prediction(torch.tensor(rows), both, column, column, column, both)


def test_predictions_are_put_back_in_order():
    cells = join_batches([prediction([3, 1]), prediction([0, 4, 2])], 5)
    assert cells.rows.tolist() == [0, 1, 2, 3, 4]
    assert cells.log_likelihood.tolist() == [0, 1, 2, 3, 4]
    assert cells.responsibilities[:, 1].tolist() == [0, -1, -2, -3, -4]


@pytest.mark.parametrize("rows", [[[0, 1], [1, 2]], [[0, 2]]])
def test_every_cell_must_be_there_once(rows):
    with pytest.raises(RuntimeError, match="every cell once"):
        join_batches([prediction(r) for r in rows], 3)


def test_predictions_without_a_trainer_are_those_of_the_trainer(fitted):
    model, module, cells = fitted
    checkpoint = checkpoint_of(model, module)
    found = predict_here(*restore_for(checkpoint, module.data, "test"))
    assert found.rows.tolist() == list(range(60))
    torch.testing.assert_close(found.responsibilities, cells.responsibilities, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.log_likelihood, cells.log_likelihood, rtol=1e-9, atol=0)


def test_genes_are_matched_by_name(fitted, caplog):
    model, module, _ = fitted
    checkpoint, data = checkpoint_of(model, module), module.data
    backwards = data.select_genes(np.arange(data.n_genes)[::-1])
    restored, cells = restore_for(checkpoint, backwards, "test")
    assert cells.gene_names.tolist() == restored.gene_names.tolist() == data.gene_names.tolist()
    assert restored.n_genes_missing == 0
    assert (cells.counts != data.counts).nnz == 0
    fewer, cells = restore_for(checkpoint, data.select_genes(np.arange(5, data.n_genes)), "test")
    assert fewer.n_genes_missing == 5
    assert "test: 5 of its" in caplog.text
    assert torch.equal(fewer.mixture.log_mean, model.mixture.log_mean[..., 5:])
    assert fewer.gene_names.tolist() == cells.gene_names.tolist() == data.gene_names[5:].tolist()


def test_other_genes_are_refused(fitted):
    model, module, _ = fitted
    data = small_data()
    other = type(data)(data.counts, data.size_factors, data.cell_names, np.char.add("x", data.gene_names))
    with pytest.raises(InputError, match="test: was fitted to other genes"):
        restore_for(checkpoint_of(model, module), other, "test")

"""Cells of batches that a fit knows, of new ones, and of none."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from nbmix import NBMixture
from nbmix.errors import InputError
from nbmix.models.gmvae import GMVAE
from nbmix.models.vaec import VAEC
from nbmix.training.new_batches import meet_batches
from tests.helpers.origins import BatchedCells


@pytest.fixture(scope="module")
def cells():
    return BatchedCells(n=500, p=80, k=3, spread=0.7)


@pytest.fixture(scope="module")
def names(cells):
    return np.array(["first", "second"])[cells.origins]


FITS = {
    "em": {"folds": 3, "max_iter": 8, "tol": 1e-3},
    "amortized": {
        "max_iter": 6,
        "batch_size": 50,
        "model_settings": {"n_hidden": 16, "encoder_epochs": 4, "lr": 1e-2},
    },
}


@pytest.fixture(scope="module", params=FITS)
def fitted(cells, names, request):
    arguments = {"start": "labels", "model": request.param, **FITS[request.param]}
    return NBMixture(3, **arguments).fit(cells.counts[:400], cells.kinds[:400], batch=names[:400])


def test_known_batches_are_taken_by_name(cells, names, fitted):
    x = cells.counts[400:]
    known = fitted.score(x, batch=names[400:])
    assert fitted.batch_names_ == ("first", "second")
    assert known > fitted.score(x) + 1  # as the average cell
    other = np.where(names == "first", "second", "first")
    assert known > fitted.score(x, batch=other[400:]) + 1


def test_a_new_batch_gets_offsets_of_its_own(cells, names, fitted):
    rows = np.flatnonzero(names == "second")
    new = fitted.score(cells.counts[rows], batch=np.full(rows.size, "new"))
    assert new > fitted.score(cells.counts[rows]) + 1
    assert new == pytest.approx(fitted.score(cells.counts[rows], batch=names[rows]), abs=1.5)
    assert fitted.batch_names_ == ("first", "second")
    found = fitted.predict(cells.counts[rows], batch=np.full(rows.size, "new"))
    assert (found == fitted.predict(cells.counts[rows], batch=names[rows])).mean() > 0.98


def test_cells_of_no_known_batch_are_a_warning(cells, fitted, caplog):
    with caplog.at_level(logging.WARNING):
        fitted.predict(cells.counts[:5])
    assert "knows the batches first, second" in caplog.text


def test_batches_of_a_fit_without_any_are_an_error(cells, names):
    mixture = NBMixture(2, start="kmeans", folds=1, max_iter=9, tol=1.0).fit(cells.counts)
    with pytest.raises(InputError, match="fitted without batches; set batch_key=None"):
        mixture.predict(cells.counts, batch=names)


def test_a_saved_fit_knows_its_batches(cells, names, fitted, tmp_path):
    fitted.save(tmp_path / "a.ckpt")
    again = NBMixture.load(tmp_path / "a.ckpt")
    np.testing.assert_array_equal(again.batch_offsets_, fitted.batch_offsets_)
    assert again.score(cells.counts, batch=names) == fitted.score(cells.counts, batch=names)


@pytest.mark.parametrize("kind", [VAEC, GMVAE], ids=["vaec", "gmvae"])
def test_deep_models_learn_no_new_batch_from_cells(cells, kind, caplog):
    model = kind(cells.data.gene_names, n_components=3)
    model.know_origins(("first", "other"))
    with pytest.raises(
        InputError, match=f"here: knows the batches first, other, not second, and model={kind.kind}"
    ):
        meet_batches(model, cells.data, "here")
    unknown = replace(cells.data, origins=None, origin_names=())
    assert meet_batches(model, unknown, "here") is unknown
    assert "taken for cells of the average batch" in caplog.text
    model.know_origins(("none", "second", "first"))
    known = meet_batches(model, cells.data, "here")
    assert np.array_equal(known.origins, 2 - cells.origins)

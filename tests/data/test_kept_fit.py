"""A fit in what an AnnData can hold."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import torch

from nbmix.data.kept_fit import as_fields, of_fields
from nbmix.errors import InputError
from tests.helpers.results import results_of
from tests.helpers.running import small_data


@pytest.fixture(scope="module")
def checkpoint():
    results = results_of(small_data(), components_per_group=2)
    return results.model.as_checkpoint(results.data, results.model.state_dict(), "of these cells")


@pytest.mark.parametrize("pseudo_cells", ["auto", 1.0])
def test_what_comes_back_is_the_fit_to_all_cells(pseudo_cells, tmp_path):
    results = results_of(small_data(), pseudo_cells=pseudo_cells)
    fit = results.model.as_checkpoint(results.data, results.model.state_dict())
    adata = ad.AnnData(np.ones((2, 2)), uns={"fit": as_fields(fit, {"layer": "counts", "batch_key": ["a"]})})
    adata.write_h5ad(tmp_path / "a.h5ad")
    again, arguments = of_fields(ad.read_h5ad(tmp_path / "a.h5ad").uns["fit"], "adata")
    assert arguments == {"layer": "counts", "batch_key": ["a"]}
    assert again.gene_names.tolist() == fit.gene_names.tolist()
    assert again._replace(gene_names=None, state=None) == fit._replace(gene_names=None, state=None)
    assert again.state.keys() == fit.state.keys()
    for name, tensor in fit.state.items():
        found = again.state[name]
        assert found.shape == tensor.shape and found.dtype == tensor.dtype
        assert torch.equal(found[-1:], tensor[-1:])


def test_copies_of_folds_are_not_kept(checkpoint):
    fields = as_fields(checkpoint, {})
    assert fields["state"]["mixture.log_mean"].shape == (1, 4, 80)


@pytest.mark.parametrize(
    "damage",
    [
        lambda fields: fields.pop("model"),
        lambda fields: fields.update(model="{}"),
        lambda fields: fields["state"].update({"mixture.log_mean": np.full((1, 4, 80), np.nan)}),
        lambda fields: fields.update(state=3),
        lambda fields: fields.update(gene_names=np.ones((2, 2))),
    ],
)
def test_a_damaged_one_is_refused(checkpoint, damage):
    fields = as_fields(checkpoint, {})
    damage(fields)
    with pytest.raises(InputError, match=r"^adata: holds no fit that can be used, or a damaged one"):
        of_fields(fields, "adata")

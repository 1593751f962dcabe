"""Models made again from checkpoints, found by their kind, and what a fit may go on with."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nbmix.data.checkpoint import load_checkpoint
from nbmix.data.module import CountsDataModule
from nbmix.errors import InputError
from nbmix.models.amortized import AmortizedMixture
from nbmix.models.base import MixtureModule
from nbmix.models.gmvae import GMVAE
from nbmix.models.mixture_em import MixtureEM
from nbmix.models.restore import check_resumable, model_class, restore
from nbmix.models.vaec import VAEC
from tests.helpers.running import ROOT, configure, small_data

GENES = np.array(["a", "b", "c"])


def cells(n_cells=30, **batches):
    data = replace(small_data(n_cells, 3), gene_names=GENES)
    module = CountsDataModule(lambda: data, folds=3, **batches)
    module.setup()
    return module


def save(model, path):
    content = {"state_dict": model.state_dict()}
    model.trainer = SimpleNamespace(datamodule=cells())
    MixtureModule.on_save_checkpoint(model, content)
    torch.save(content, path)
    return load_checkpoint(path)


@pytest.mark.parametrize("file", sorted((ROOT / "conf/model").glob("*.yaml")), ids=lambda file: file.stem)
def test_models_are_found_by_the_names_that_conf_has_for_them(file):
    found = model_class(file.stem)
    assert configure(f"model={file.stem}").model._target_ == f"{found.__module__}.{found.__qualname__}"


def test_a_class_that_only_inherits_its_kind_is_not_the_model():
    class Other(AmortizedMixture):
        pass

    assert model_class(Other.kind) is AmortizedMixture


def test_a_model_that_there_is_not(tmp_path):
    with pytest.raises(LookupError):
        model_class("none")
    checkpoint = save(MixtureEM(GENES, n_components=2), tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="it is damaged, or of another version of nbmix"):
        restore(checkpoint._replace(model="none"))


@pytest.mark.parametrize(
    "model",
    [
        MixtureEM(GENES, n_components=2, folds=3),
        AmortizedMixture(GENES, n_components=2, n_hidden=4),
        VAEC(GENES, n_components=2, n_hidden=4, size_factors="latent"),
        GMVAE(GENES, n_components=2, n_hidden=4),
    ],
    ids=lambda model: model.kind,
)
def test_round_trip(model, tmp_path):
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + number)
    checkpoint = save(model, tmp_path / "a.ckpt")
    again = restore(checkpoint)
    assert type(again) is type(model)
    assert again.plain == model.plain
    assert again.gene_names.tolist() == GENES.tolist()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(checkpoint.components.log_mean, model.mixture.components().log_mean)


@pytest.mark.parametrize(
    "other, words",
    [
        (AmortizedMixture(GENES, n_components=2), "is of model=em"),
        (MixtureEM(GENES[::-1], n_components=2, folds=3), "3 genes that are not the 3 of the data"),
        (MixtureEM(GENES, n_components=3, folds=3), r"was fitted with model\.n_components=2;"),
        (MixtureEM(GENES, n_components=2, folds=1), r"was fitted with model\.folds=3;"),
        (MixtureEM(GENES, n_components=2, folds=3, weights="uniform"), r"with model\.weights=learned;"),
    ],
)
def test_what_cannot_go_on(other, words, tmp_path):
    checkpoint = save(MixtureEM(GENES, n_components=2, folds=3), tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=words):
        check_resumable(checkpoint, other, cells(), "ckpt_path=a.ckpt")


@pytest.mark.parametrize("other", [{"seed": 1}, {"validation_share": 0.3}, {"n_cells": 29}], ids=str)
def test_other_cells_or_another_split_of_them_cannot_go_on(other, tmp_path):
    model = MixtureEM(GENES, n_components=2, folds=3)
    checkpoint = save(model, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="other cells, or to another split of them"):
        check_resumable(checkpoint, model, cells(**other), "ckpt_path=a.ckpt")


@pytest.mark.parametrize(
    "kind, changed",
    [
        (MixtureEM, {"tolerance": 1e-3, "patience": 5}),
        (
            AmortizedMixture,
            {
                "lr": 0.1,
                "components_lr": 0.1,
                "em_iterations": 0,
                "encoder_start": "random",
                "encoder_epochs": 1,
                "heldout_tolerance": None,
            },
        ),
        *((deep, {"lr": 0.1, "start_epochs": 1, "kl_epochs": 1, "n_draws": 2}) for deep in (VAEC, GMVAE)),
    ],
)
def test_how_far_and_how_fast_a_fit_goes_may_change(kind, changed, tmp_path):
    assert set(changed) == kind.free_to_change
    checkpoint = save(kind(GENES, n_components=2), tmp_path / "a.ckpt")
    data = cells()
    check_resumable(checkpoint, kind(GENES, n_components=2, **changed), data, "ckpt_path=a.ckpt")

"""Checkpoints: what is read, what is refused, genes by name."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nbmix.data.checkpoint import SECTION, align_to_genes, load_checkpoint
from nbmix.data.module import CountsDataModule
from nbmix.errors import InputError
from nbmix.models.amortized import AmortizedMixture
from nbmix.models.base import MixtureModule
from nbmix.models.mixture_em import MixtureEM
from nbmix.models.restore import check_resumable, restore
from tests.helpers.running import small_data

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


@pytest.mark.parametrize(
    "model",
    [MixtureEM(GENES, n_components=2, folds=3), AmortizedMixture(GENES, n_components=2, n_hidden=4)],
    ids=["em", "amortized"],
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


def test_a_file_that_is_not_there():
    with pytest.raises(InputError, match=r"ckpt_path=/no/such\.ckpt: there is no such file"):
        load_checkpoint("/no/such.ckpt")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"PK\x03\x04garbage",
        {"state_dict": {}},
        {SECTION: 1, "state_dict": {}},
        [1],
        {SECTION: {}},
    ],
    ids=str,
)
def test_files_that_are_no_checkpoint_of_ours(content, tmp_path):
    path = tmp_path / "a.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match="is not a checkpoint of nbmix, or is damaged") as refused:
        load_checkpoint(path)
    assert "\n" not in str(refused.value)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    torch.save({SECTION: Payload(), "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(InputError):
        load_checkpoint(tmp_path / "a.ckpt")
    assert capsys.readouterr().out == ""


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


def test_what_can_go_on(tmp_path):
    checkpoint = save(MixtureEM(GENES, n_components=2, folds=3), tmp_path / "a.ckpt")
    other = MixtureEM(GENES, n_components=2, folds=3, tolerance=1e-3)
    check_resumable(checkpoint, other, cells(), "ckpt_path=a.ckpt")


def test_genes_are_matched_in_the_order_of_the_checkpoint(caplog):
    there, here = align_to_genes(GENES, np.array(["x", "c", "a"]), "ckpt_path=f")
    assert (there.tolist(), here.tolist()) == ([0, 2], [2, 1])
    assert "1 of its 3 genes are missing in the data and are left out (b)" in caplog.text


def test_no_gene_in_common():
    with pytest.raises(InputError, match=r"was fitted to other genes \(such as 'a'; the data has 'x'"):
        align_to_genes(GENES, np.array(["x", "y"]), "ckpt_path=f")

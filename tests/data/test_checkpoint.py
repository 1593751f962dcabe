"""Checkpoints: what is read, what is refused, genes by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbmix.data.checkpoint import SECTION, align_to_genes, checksum, load_checkpoint
from nbmix.errors import InputError

GENES = np.array(["a", "b", "c"])


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


def test_the_checksum_is_that_of_files_that_are_there():
    names = ["CD3E", "3'UTR", "\u00e9\udc80"]
    assert checksum({"gene_names": names, "empty": [], "mixed": ["a", 1], "tuple": ("b",)}) == 2595648189


def test_an_empty_tensor_has_a_checksum_whatever_its_strides():
    empty = torch.zeros(1, dtype=torch.int64).expand(7)[:0]
    assert checksum(empty) == checksum(torch.zeros(0, dtype=torch.int64))
    assert checksum(empty) != checksum(torch.zeros(0, dtype=torch.int32))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    torch.save({SECTION: Payload(), "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(InputError):
        load_checkpoint(tmp_path / "a.ckpt")
    assert capsys.readouterr().out == ""


def test_genes_are_matched_in_the_order_of_the_checkpoint(caplog):
    there, here = align_to_genes(GENES, np.array(["x", "c", "a"]), "ckpt_path=f")
    assert (there.tolist(), here.tolist()) == ([0, 2], [2, 1])
    assert "1 of its 3 genes are missing in the data and are left out (b)" in caplog.text


def test_no_gene_in_common():
    with pytest.raises(InputError, match=r"was fitted to other genes \(such as 'a'; the data has 'x'"):
        align_to_genes(GENES, np.array(["x", "y"]), "ckpt_path=f")

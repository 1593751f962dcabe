"""What a result says of its making."""

from __future__ import annotations

from importlib.metadata import version

import torch

import nbmix
from nbmix.training.provenance import provenance


def test_settings_versions_and_threads():
    said = provenance({"seed": 1})
    assert said["config"] == {"seed": 1}
    assert said["versions"]["nbmix"] == nbmix.__version__
    assert said["versions"]["torch"] == version("torch")
    assert said["threads"] == torch.get_num_threads()

"""Settings, versions and threads that made a result."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

PACKAGES = ("nbmix", "torch", "pytorch-lightning", "numpy", "scipy", "scikit-learn", "anndata")


def provenance(config: Any) -> dict[str, Any]:
    """``config``, the settings as plain values, and what else numbers may hang on."""
    versions = {name: version(name) for name in PACKAGES}
    return {"config": config, "versions": versions, "threads": torch.get_num_threads()}

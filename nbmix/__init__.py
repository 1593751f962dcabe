"""Mixtures of negative binomials for single-cell counts, by EM and amortized inference."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbmix import em, likelihood
    from nbmix.data.simulate import simulate
    from nbmix.estimator import NBMixture, cluster, read_10x
    from nbmix.likelihood import component_log_likelihood

__version__ = version("nbmix")
__all__ = [
    "NBMixture",
    "__version__",
    "cluster",
    "component_log_likelihood",
    "em",
    "likelihood",
    "read_10x",
    "simulate",
]

_MODULES = ("em", "likelihood")
_HOMES = {
    "NBMixture": "nbmix.estimator",
    "cluster": "nbmix.estimator",
    "component_log_likelihood": "nbmix.likelihood",
    "read_10x": "nbmix.estimator",
    "simulate": "nbmix.data.simulate",
}


def __getattr__(name: str) -> Any:
    """Import public names at first use: ``import nbmix`` alone stays instant."""
    if name in _MODULES:
        return import_module(f"nbmix.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'nbmix' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Mixtures of negative binomials for single-cell counts, by EM and amortized inference."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbmix.clustering import cluster
    from nbmix.core import likelihood
    from nbmix.core.likelihood import component_log_likelihood
    from nbmix.data.simulate import simulate
    from nbmix.data.tenx import read_10x
    from nbmix.estimator import NBMixture
    from nbmix.genes import em, supervised
    from nbmix.new_cells import predict
    from nbmix.output import pl
    from nbmix.output.compare import compare
    from nbmix.output.editing import merge, rename
    from nbmix.output.groups import regroup
    from nbmix.reclustering import recluster

# Idle threads of torch sleep; else they spin for milliseconds after every operation, on the cores that
# compiled loops run on. It is read once, when torch is imported, and changes no result.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = version("nbmix")
__all__ = [
    "NBMixture",
    "__version__",
    "cluster",
    "compare",
    "component_log_likelihood",
    "em",
    "likelihood",
    "merge",
    "pl",
    "predict",
    "read_10x",
    "recluster",
    "regroup",
    "rename",
    "simulate",
    "supervised",
]

_MODULES = {
    "em": "nbmix.genes.em",
    "likelihood": "nbmix.core.likelihood",
    "pl": "nbmix.output.pl",
    "supervised": "nbmix.genes.supervised",
}
_HOMES = {
    "NBMixture": "nbmix.estimator",
    "cluster": "nbmix.clustering",
    "compare": "nbmix.output.compare",
    "component_log_likelihood": "nbmix.core.likelihood",
    "predict": "nbmix.new_cells",
    "merge": "nbmix.output.editing",
    "read_10x": "nbmix.data.tenx",
    "recluster": "nbmix.reclustering",
    "regroup": "nbmix.output.groups",
    "rename": "nbmix.output.editing",
    "simulate": "nbmix.data.simulate",
}


def __getattr__(name: str) -> Any:
    """Import public names at first use: ``import nbmix`` alone stays instant."""
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _HOMES:
        raise AttributeError(f"module 'nbmix' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _PublicModules(MetaPathFinder, Loader):
    """Lets ``import nbmix.em`` find a public module in the package where it lives."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in _MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.rpartition(".")[2]
        sys.modules[module.__name__] = import_module(_MODULES[name])  # the import system takes what is there


sys.meta_path.append(_PublicModules())

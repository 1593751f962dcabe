"""What a baseline is, and how the benchmark finds all of them: a new one is a new file of this package."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from numpy.typing import NDArray

import nbmix.evaluation.baselines
from nbmix.data.counts import CountData
from nbmix.errors import InputError


class Outcome(NamedTuple):
    """What a method makes of the cells.

    Attributes:
        found: (cells,) clusters, or names of labels; or (cells, K) posterior.
        remark: what else is to be known.
    """

    found: NDArray
    remark: str = ""


class Baseline(NamedTuple):
    """A method from raw counts to clusters; any module of this package may hold some.

    Attributes:
        name: in the table.
        about: one line of help.
        run: (data, number of clusters, seed) -> outcome; raises ``InputError``.
        supervised: it sees labels, and names them.
        packages: optional ones that it imports.
        warms_up: it is run on a few cells first, which is not timed.
    """

    name: str
    about: str
    run: Callable[[CountData, int, int], Outcome]
    supervised: bool = False
    packages: tuple[str, ...] = ()
    warms_up: bool = True

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed; looked up, not imported."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def find_baselines(package: ModuleType = nbmix.evaluation.baselines) -> list[Baseline]:
    """All at the top of the modules of a package, by module and as they stand there."""
    modules = [
        importlib.import_module(f"{package.__name__}.{found.name}")
        for found in pkgutil.iter_modules(package.__path__)
    ]
    return [value for module in modules for value in vars(module).values() if isinstance(value, Baseline)]


def require(*names: str, extra: str = "benchmarks") -> ModuleType:
    """Import optional packages; the first of them.

    Raises:
        InputError: one is not installed; the line names the extra that brings it.
    """
    modules = []
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # scanpy's, of what it imports
                modules.append(importlib.import_module(name))
        except ImportError as error:
            raise InputError(
                f"{error.name or name} is not installed, which this baseline needs: "
                f"pip install 'nbmix[{extra}]'"
            ) from error
    return modules[0]

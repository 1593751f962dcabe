"""Starts by their names in Python: every class of this package that has a ``name``."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import nbmix.starts
from nbmix.starts.base import Start


def named_starts() -> dict[str, type[Start]]:
    """Name -> class, for starts that need no arguments, in the order of their names."""
    modules = [
        import_module(f"{nbmix.starts.__name__}.{m.name}")
        for m in pkgutil.iter_modules(nbmix.starts.__path__)
    ]
    found = {
        value.__dict__["name"]: value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and isinstance(value.__dict__.get("name"), str)
    }
    return dict(sorted(found.items()))

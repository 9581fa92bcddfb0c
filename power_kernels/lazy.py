"""Packages whose names are imported when they are first used (PEP 562): `power-kernels --help` needs no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping


def on_demand(names: dict, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    names: its `globals()`, where a name stays once it was imported. homes: the module of each name; a module of the
    package is its own home.
    """
    package = names["__name__"]

    def getattr_(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(homes[name])
        names[name] = module if homes[name] == f"{package}.{name}" else getattr(module, name)
        return names[name]

    def dir_() -> list[str]:
        return sorted({*names, *homes})

    return getattr_, dir_

"""Public names of a package, imported when they are asked for, so that importing one of its modules stays light."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]  # the folder that holds our packages
PACKAGES = ("export", "bench", "devices")


def handed_out(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """Make a ``__getattr__`` for a package's ``__init__``; ``homes`` names the module that defines each name."""

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name], package), name)

    return get


def moved(old: str, new: str) -> Callable[[str], object]:
    """Make a ``__getattr__`` for a module whose names have moved to another one; it warns once a place of use."""

    def get(name: str) -> object:
        value = getattr(import_module(new), name)
        warnings.warn(f"{old}.{name} has moved to {new}", FutureWarning, stacklevel=2)
        return value

    return get


def strangers() -> dict[str, Path]:
    """Return where each name of ours leads to that another package has taken."""
    places = {name: spec.origin for name in PACKAGES if (spec := find_spec(name)) and spec.origin}
    return {name: Path(place) for name, place in places.items() if Path(place).resolve().parents[1] != HOME}

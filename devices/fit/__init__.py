"""Will a bundle load on a device, how much memory does it take, how fast could it be."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devices.fit.fitting import Fit as Fit
    from devices.fit.fitting import fit as fit

__all__ = ["Fit", "fit"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from devices.fit import fitting

        return getattr(fitting, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

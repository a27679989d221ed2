"""Will a bundle load on a device, how much memory does it take, how fast could it be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saap.base.lazy import handed_out

if TYPE_CHECKING:
    from devices.fit.fitting import Fit as Fit
    from devices.fit.fitting import fit as fit

__all__ = ["Fit", "fit"]
__getattr__ = handed_out(__name__, {"Fit": ".fitting", "fit": ".fitting"})

"""The probe of a device: board, CPU, caches, memory, clocks and versions (``probe()``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saap.base.lazy import handed_out

if TYPE_CHECKING:
    from devices.probe.host import HostFacts as HostFacts
    from devices.probe.host import probe as probe

__all__ = ["HostFacts", "probe"]
__getattr__ = handed_out(__name__, {"HostFacts": ".host", "probe": ".host"})

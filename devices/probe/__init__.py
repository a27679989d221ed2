"""What a device is: board, CPU, caches, memory, clocks and versions (``probe()``), and its state of the moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devices.probe.host import HostFacts as HostFacts
    from devices.probe.host import probe as probe

__all__ = ["HostFacts", "probe"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from devices.probe import host

        return getattr(host, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

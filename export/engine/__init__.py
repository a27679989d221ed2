"""Engines that run a model: one protocol, a module and a row of the table for each. No torch, but in :mod:`.torch`.

``open_engine("out/bundle@llama.cpp", EngineOptions(threads=2))`` opens a bundle in this process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saap.base.lazy import handed_out

if TYPE_CHECKING:
    from export.engine.opening import open_engine as open_engine
    from export.engine.protocol import Engine as Engine
    from export.engine.protocol import EngineOptions as EngineOptions

__all__ = ["Engine", "EngineOptions", "open_engine"]
__getattr__ = handed_out(__name__, {"Engine": ".protocol", "EngineOptions": ".protocol", "open_engine": ".opening"})

"""From a model to what a device runs: ``export(model, ExportOptions(...), output=...)``.

A bundle (:mod:`export.bundle`) holds graphs for ONNX Runtime, in its own operators (:mod:`export.graph`) or in standard
ones (:mod:`export.portable`); :mod:`export.gguf` writes a file for llama.cpp. :mod:`export.parity` compares a bundle
with its torch model, :mod:`export.generate` writes text with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.options import ExportOptions as ExportOptions
    from export.write import ExportResult as ExportResult
    from export.write import export as export

__all__ = ["ExportOptions", "ExportResult", "export"]


def __getattr__(name: str) -> object:
    if name == "ExportOptions":
        from export.options import ExportOptions

        return ExportOptions
    if name in __all__:
        import export.write

        return getattr(export.write, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

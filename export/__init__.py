"""Export a model to what a device runs: ``export(model, ExportOptions(...), output=...)``.

A bundle (:mod:`export.bundle`) holds graphs for ONNX Runtime, in its own operators (:mod:`export.graph`) or in standard
ones (:mod:`export.portable`); :mod:`export.gguf` writes a file for llama.cpp. :mod:`export.parity` compares a bundle
with its torch model, :mod:`export.generate` writes text with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saap.base.lazy import handed_out

if TYPE_CHECKING:
    from export.options import ExportOptions as ExportOptions
    from export.write import ExportResult as ExportResult
    from export.write import export as export

__all__ = ["ExportOptions", "ExportResult", "export"]
__getattr__ = handed_out(__name__, {"ExportOptions": ".options", "ExportResult": ".write", "export": ".write"})

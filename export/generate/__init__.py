"""Text from a bundle: ``generate(bundle, prompt, GenerateOptions(...))``. No torch, except for :mod:`ort_model`, which
gives a bundle to transformers' own ``generate``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saap.base.lazy import handed_out

if TYPE_CHECKING:
    from export.generate.options import GenerateOptions as GenerateOptions
    from export.generate.text import GenerateResult as GenerateResult
    from export.generate.text import generate as generate

__all__ = ["GenerateOptions", "GenerateResult", "generate"]
__getattr__ = handed_out(__name__, {"GenerateOptions": ".options", "GenerateResult": ".text", "generate": ".text"})

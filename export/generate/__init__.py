"""Text from a bundle: ``generate(bundle, prompt, GenerateOptions(...))``. No torch, except for :mod:`ort_model`, which
gives a bundle to transformers' own ``generate``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.generate.options import GenerateOptions as GenerateOptions
    from export.generate.text import GenerateResult as GenerateResult
    from export.generate.text import generate as generate

__all__ = ["GenerateOptions", "GenerateResult", "generate"]


def __getattr__(name: str) -> object:
    if name == "GenerateOptions":
        from export.generate.options import GenerateOptions

        return GenerateOptions
    if name in __all__:
        import export.generate.text

        return getattr(export.generate.text, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

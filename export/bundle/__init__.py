"""The bundle: what bench, generate and a board read. No torch.

bundle = Bundle.open(path)
bundle.graph(), bundle.file("llama.cpp/model.gguf"), bundle.tokenizer   # checked when they are first handed out
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saap.base.lazy import handed_out

if TYPE_CHECKING:
    from export.bundle.bundle import Bundle as Bundle
    from export.bundle.bundle import foreign_graph as foreign_graph

__all__ = ["Bundle", "foreign_graph"]
__getattr__ = handed_out(__name__, {"Bundle": ".bundle", "foreign_graph": ".bundle"})

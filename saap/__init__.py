"""saap: prune a language model until it is as fast as you need on the device you have.

``import saap`` stays free of torch; :func:`load_model` imports it when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def load_model(path: str | Path, **kwargs: Any) -> Any:
    """Load a dense, slim or tuned directory as a transformers model; see :func:`saap.models.checkpoint.load_model`."""
    from saap.models.checkpoint import load_model as load

    return load(path, **kwargs)

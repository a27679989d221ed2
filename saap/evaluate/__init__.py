"""Evaluation: perplexity, agreement with the dense model, and zero-shot tasks."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devices.common.quality import Quality as Quality
    from saap.evaluate.evaluation import evaluate as evaluate
    from saap.evaluate.options import EvalOptions as EvalOptions

__all__ = ["EvalOptions", "Quality", "evaluate"]
_HOMES = {"EvalOptions": "saap.evaluate.options", "Quality": "devices.common.quality"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "saap.evaluate.evaluation")), name)

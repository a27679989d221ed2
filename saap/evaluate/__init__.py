"""Evaluation: perplexity, agreement with the dense model, and zero-shot tasks."""

from typing import TYPE_CHECKING

from saap.base.lazy import handed_out

if TYPE_CHECKING:
    from saap.base.quality import Quality as Quality
    from saap.evaluate.evaluation import evaluate as evaluate
    from saap.evaluate.options import EvalOptions as EvalOptions

__all__ = ["EvalOptions", "Quality", "evaluate"]
__getattr__ = handed_out(
    __name__, {"EvalOptions": ".options", "Quality": "saap.base.quality", "evaluate": ".evaluation"}
)

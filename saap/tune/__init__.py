"""Tuning: quantise a pruned model and train its groups, so that what is trained is what is deployed."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saap.tune.options import TrainOptions as TrainOptions
    from saap.tune.options import TuneOptions as TuneOptions
    from saap.tune.tuning import TuneResult as TuneResult
    from saap.tune.tuning import tune as tune

__all__ = ["TrainOptions", "TuneOptions", "TuneResult", "tune"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("saap.tune.options" if name.endswith("Options") else "saap.tune.tuning"), name)

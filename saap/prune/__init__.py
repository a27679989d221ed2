"""Pruning: score every structure, search for the plan that meets a budget, cut, and refit what remains.

``scores/`` says how important a structure is, ``search/`` what to keep, ``cut/`` carries it out, ``baselines/`` holds
the methods that SAAP is compared with. :mod:`saap.prune.pruning` leads through them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saap.prune.options import PruneOptions as PruneOptions
    from saap.prune.pruning import PruneResult as PruneResult
    from saap.prune.pruning import prune as prune

__all__ = ["PruneOptions", "PruneResult", "prune"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{'options' if name == 'PruneOptions' else 'pruning'}"), name)

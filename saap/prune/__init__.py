"""Pruning: score every structure, search for the plan that meets a budget, cut, and refit what remains.

``scores/`` says how important a structure is, ``search/`` what to keep, ``cut/`` carries it out, ``baselines/`` holds
the methods that SAAP is compared with. :mod:`saap.prune.pruning` leads through them.
"""

from typing import TYPE_CHECKING

from saap.base.lazy import handed_out

if TYPE_CHECKING:
    from saap.prune.options import PruneOptions as PruneOptions
    from saap.prune.pruning import PruneResult as PruneResult
    from saap.prune.pruning import prune as prune

__all__ = ["PruneOptions", "PruneResult", "prune"]
__getattr__ = handed_out(__name__, {"PruneOptions": ".options", "PruneResult": ".pruning", "prune": ".pruning"})

"""Layer costs: what the parts of a decoder layer take on a device, at every size, for a budget in milliseconds."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.costs.measure import Costs as Costs
    from bench.costs.measure import measure_costs as measure_costs
    from bench.costs.options import CostsOptions as CostsOptions

__all__ = ["Costs", "CostsOptions", "measure_costs"]
_MODULES = {
    "Costs": "bench.costs.measure",
    "CostsOptions": "bench.costs.options",
    "measure_costs": "bench.costs.measure",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

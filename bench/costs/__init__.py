"""Layer costs: what the parts of a decoder layer take on a device, at every size, for a budget in milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saap.base.lazy import handed_out

if TYPE_CHECKING:
    from bench.costs.measure import Costs as Costs
    from bench.costs.measure import measure_costs as measure_costs
    from bench.costs.options import CostsOptions as CostsOptions

__all__ = ["Costs", "CostsOptions", "measure_costs"]
__getattr__ = handed_out(__name__, {"Costs": ".measure", "CostsOptions": ".options", "measure_costs": ".measure"})

"""One option for each unit, of the least summed price within a budget: a mixed-integer program that HiGHS solves.

Pruning chooses what every block keeps (:mod:`saap.prune.search.milp`), tuning the integers of every matrix
(:mod:`saap.quantize.choose_forms`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint, OptimizeResult

GAP = 0.0  # between the answer and the bound: none, the answer is the best
NODES = 50_000  # of branch and bound; a limit in seconds would make the answer depend on the machine
Numbers = NDArray[np.float64]


def one_for_each(units: NDArray[np.intp], options: NDArray[np.intp], shape: tuple[int, int]) -> LinearConstraint:
    """Require that each unit is covered once: ``options[i]`` covers ``units[i]``; ``shape`` is their numbers."""
    from scipy.optimize import LinearConstraint
    from scipy.sparse import coo_array

    return LinearConstraint(coo_array((np.ones(len(units)), (units, options)), shape), 1, 1)


def within(costs: Numbers, budget: float) -> LinearConstraint:
    """Limit the summed costs of what is chosen."""
    from scipy.optimize import LinearConstraint

    largest = max(float(costs.max()), 1e-12)
    return LinearConstraint(costs[None] / largest, -np.inf, budget / largest)


def least_price(prices: Numbers, constraints: Sequence[LinearConstraint]) -> OptimizeResult:
    """Choose options whose prices add up to the least; ``x`` of the answer is None where none meet the constraints."""
    from scipy.optimize import Bounds, milp

    with _silent():
        return milp(
            prices / max(float(prices.max()), 1e-12),
            integrality=np.ones(len(prices)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop what HiGHS prints of its own search (in scipy 1.17), whatever its options say."""
    flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda _: None
    flush(None)
    with Path(os.devnull).open("w") as nowhere:
        stdout = os.dup(1)
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            flush(None)
            os.dup2(stdout, 1)
            os.close(stdout)

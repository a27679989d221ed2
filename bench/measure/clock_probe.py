"""Did the cores keep their clock? A fixed piece of work, timed before and after a measurement.

What a kernel says of its clocks may be wrong: a board has been seen to report four times its real clock. The work is a
chain of additions, each waiting for the one before, in the first-level cache: its time depends on the clock of the
core and on nothing else that a measurement shares (memory, vector units, a second hardware thread). It allocates
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

IDLE_PROBES = 30  # probes on each side; 20 are the least for a spread
ROUNDS = 64  # 2^17 additions, about a millisecond at 1 to 3 GHz
LEAST_LIMIT = 0.03
MADS = 4  # median absolute deviations
# A neighbour's time slice hits single probes and only lengthens them, so the undisturbed ones are the fast ones.
QUANTILE = 0.10

_ONES = np.ones(2048)
_SUMS = np.empty(2048)


def probe_clock(count: int = IDLE_PROBES, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of each of ``count`` runs of the same work on the calling thread, about 1 ms each."""
    _chain()  # pages and code are there from now on
    times = []
    for _ in range(count):
        start = clock()
        _chain()
        times.append(clock() - start)
    return times


def level(probes: Sequence[float]) -> float:
    """Seconds that the work takes undisturbed, robust to preemption; proportional to 1 / clock."""
    return float(np.quantile(np.asarray(probes), QUANTILE))


def drift(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """How much longer the same work takes now, and from where on that is no longer noise, both relative.

    The limit is 3 % or four median absolute deviations of the noisier side, whichever is more. 0.1 is a clock that
    fell by 9 %.

    Args:
        before, after: at least 20 probes each, of the same process.
    """
    return level(after) / level(before) - 1, max(LEAST_LIMIT, MADS * max(_spread(before), _spread(after)))


def _chain() -> None:
    for _ in range(ROUNDS):
        np.add.accumulate(_ONES, out=_SUMS)


def _spread(probes: Sequence[float]) -> float:
    values = np.asarray(probes)
    median = np.median(values)
    return float(np.median(np.abs(values - median)) / median)

"""Wait between repetitions until the cores are as cool as they were at the start."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from bench.measure.board_state import temperature

ABOVE_START_C = 3.0
LOOK_EVERY_S = 0.5


class CoolDown:
    """Keeps every repetition's start within 3 degrees of the first one's.

    Args:
        limit_s: longest wait before one repetition; 0 never waits.
        root: of /sys. A host that tells no temperature is not waited for.
        clock, sleep: of the wait.
    """

    def __init__(
        self,
        limit_s: float,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._limit_s, self._root, self._clock, self._sleep = limit_s, root, clock, sleep
        self._start_c = temperature(root) if limit_s > 0 else None

    def wait(self) -> float:
        """Seconds that were waited."""
        begun = self._clock()
        while (spent := self._clock() - begun) < self._limit_s and self._warm():
            self._sleep(LOOK_EVERY_S)
        return spent

    def _warm(self) -> bool:
        now = temperature(self._root) if self._start_c is not None else None
        return now is not None and self._start_c is not None and now > self._start_c + ABOVE_START_C

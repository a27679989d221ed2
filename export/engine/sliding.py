"""Caches of sliding layers that are no longer than what the layers see, and one piece of a prompt.

GroupQueryAttention on a CPU computes over all positions of a cache and masks those before the window, so a long cache
costs its time and its memory for nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.bundle.manifest import WINDOW_BACK, window_capacity


class SlidingCaches:
    """Keys and values of all sliding layers; whoever reads past the end first makes room.

    Args:
        window: positions that a token sees, itself included: the most of any layer.

    Attributes:
        capacity: positions of the buffers.
        start: [1] int64, the position that the first entry of the buffers stands for.
    """

    def __init__(self, window: int) -> None:
        self._window, self._kept = window, window - 1 + WINDOW_BACK
        self.capacity = window_capacity(window)
        self.start = np.zeros(1, np.int64)
        self.buffers: list[NDArray[np.generic]] = []  # each [1, kv_heads, capacity, head_dim]

    def make_room(self, length: int, count: int) -> None:
        """Let ``count`` positions, at most a piece of a prompt, fit behind the first ``length`` of the sequence."""
        old, new = int(self.start[0]), length - self._kept
        if length + count - old <= self.capacity:
            return
        for buffer in self.buffers:
            buffer[:, :, : self._kept] = buffer[:, :, new - old : length - old]
        self.start[0] = new

    def skip(self, length: int) -> None:
        """Count the first ``length`` positions as seen, whatever the buffers hold."""
        self.start[0] = max(0, length - self._kept)

    def holds(self, length: int) -> bool:
        """Whether all is there that the token behind the first ``length`` positions sees."""
        return bool(self.start[0] <= max(0, length - self._window + 1))

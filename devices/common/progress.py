"""How a long task reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, float], None]  # what is being done, how much is done, how much there is

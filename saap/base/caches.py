"""Bytes of KV caches that do not grow with every token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sliding:
    """The part of a cache whose layers see a window only, and which holds no more than that."""

    bytes_per_token: int = 0
    positions: int = 0  # that it holds

    def saved(self, positions: int) -> int:
        """Bytes that a sequence of a length takes less than if all of its cache grew."""
        return self.bytes_per_token * max(0, positions - self.positions)


GROWING = Sliding()  # all of a cache grows

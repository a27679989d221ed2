"""Words that messages of all packages need."""

from __future__ import annotations


def counted(count: int, noun: str, nouns: str = "") -> str:
    """Return a number and its noun: ``1 thread``, ``2 threads``, ``3 matrices``."""
    return f"{count} {noun if count == 1 else nouns or f'{noun}s'}"

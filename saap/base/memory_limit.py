"""Limits of the memory that a stranger's graph may take. Linux has them; elsewhere nothing is limited."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

with suppress(ImportError):  # Windows
    import resource

    _BEFORE = resource.getrlimit(resource.RLIMIT_DATA)

_STATM = Path("/proc/self/statm")
_DATA = 5  # its field of private writable pages


def most_bytes(stored: int, queries: int, keys: int, vocab: int) -> int:
    """Bound what a graph takes beside what the process has: weights, activations, scores of attention and logits.

    Args:
        stored: bytes of the graph and its data files; four bits may become 32.
        queries: tokens of all rows of a batch; 0 while the graph is loaded.
        keys: positions that they attend to; 128 heads have scores twice.
    """
    return (1 << 30) + 8 * stored + 4 * queries * (4 * vocab + 256 * keys)


def limit_memory(most: int) -> None:
    """Let this process take ``most`` bytes more than it has, from now on."""
    if _STATM.exists():
        used = int(_STATM.read_text().split()[_DATA]) * os.sysconf("SC_PAGE_SIZE")
        soft, hard = _BEFORE
        limits = [size for size in (used + most, soft, hard) if size != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))


class MemoryLimit:
    """A block in which this process may take ``most`` bytes more; it takes 10 us."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __enter__(self) -> None:
        limit_memory(self._most)

    def __exit__(self, *_: object) -> None:
        if _STATM.exists():
            resource.setrlimit(resource.RLIMIT_DATA, _BEFORE)

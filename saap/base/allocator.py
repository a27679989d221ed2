"""Freed memory stays with the process while a model is tuned or pruned, for speed: the next step takes it again.

glibc asks the system for every large tensor anew and returns it when it is freed, as it does with the top of its heap.
A training step frees all it has made, so that each step's memory came page by page, zeroed, from the system: 7 to 9 %
of the time of tuning SmolLM2 (studies/README.md, "Settled").
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEPT = {M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 << 20, M_MMAP_THRESHOLD: 2**31 - 1}
# What glibc's own adjustment ends at, which a call of mallopt switches off for good.
USUAL = {M_TRIM_THRESHOLD: 64 << 20, M_TOP_PAD: 128 << 10, M_MMAP_THRESHOLD: 32 << 20}


@contextmanager
def kept_memory() -> Iterator[None]:
    """Use freed memory again inside the block or function, and return it to the system at its end.

    Blocks do not nest. Nothing changes where the C library is another one, or the user has settings of his own.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    try:
        _set(libc, KEPT)
        yield
    finally:
        _set(libc, USUAL)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # no such handle on Windows
        return None


def _set(libc: ctypes.CDLL, values: dict[int, int]) -> None:
    for parameter, value in values.items():
        libc.mallopt(parameter, value)

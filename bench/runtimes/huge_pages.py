"""Put the weights that ONNX Runtime packed into memory on 2 MiB pages.

Decode reads every weight once per token. On 4 KiB pages the hardware prefetcher stops at every page and the TLB holds a
few megabytes; on 2 MiB pages SmolLM2-135M decodes 5 to 8 % faster (Zen 3). Linux gives them to a process that asks,
where transparent_hugepage is ``madvise`` or ``always``; MADV_COLLAPSE (Linux 6.1) moves what is there already.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE = 2 << 20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25


def collapse() -> int:
    """Move this process's large anonymous regions to huge pages; the bytes that were, 0 where the system has none."""
    if not sys.platform.startswith("linux"):
        return 0
    with contextlib.suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        return sum(_collapse(madvise, start, size) for start, size in whole_pages(maps))
    return 0


def whole_pages(maps: str) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the huge pages that fit into the writable anonymous regions of a ``/proc/PID/maps`` text."""
    for line in maps.splitlines():
        fields = line.split()
        if len(fields) < 5 or not fields[1].startswith("rw") or fields[4] != "0":
            continue  # a file, or nothing that weights are in
        if len(fields) > 5 and fields[5] != "[heap]":
            continue
        low, high = (int(address, 16) for address in fields[0].split("-"))
        start, end = -(-low // PAGE) * PAGE, high // PAGE * PAGE
        if end > start:
            yield start, end - start


def _collapse(madvise: ctypes._NamedFuncPointer, start: int, size: int) -> int:
    """Page by page: a region may have holes that were never touched, and one of them would refuse the whole."""
    if madvise(start, size, MADV_HUGEPAGE):
        return 0
    return sum(PAGE for page in range(start, start + size, PAGE) if madvise(page, PAGE, MADV_COLLAPSE) == 0)

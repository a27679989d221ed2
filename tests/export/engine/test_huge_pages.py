"""Weights go to huge pages, all of them, and nothing else of the process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from export.engine.huge_pages import PAGE, collapse, whole_pages

MAPS = """\
55d000000000-55d000400000 r-xp 00000000 fe:00 131 /usr/bin/python3
55d000600000-55d000900000 rw-p 00000000 00:00 0 [heap]
7f0000100000-7f0000800000 rw-p 00000000 00:00 0
7f0010000000-7f0010100000 rw-p 00000000 00:00 0
7f0020000000-7f0021000000 rw-s 00000000 fe:00 77 /data/model.onnx.data
7f0030000000-7f0031000000 r--p 00000000 00:00 0
7ffd00000000-7ffd00400000 rw-p 00000000 00:00 0 [stack]
"""


def test_only_whole_pages_of_writable_anonymous_memory_count():
    assert list(whole_pages(MAPS)) == [(0x55D000600000, PAGE), (0x7F0000200000, 3 * PAGE)]


def test_pages_that_were_touched_are_moved_and_keep_their_content():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text(encoding="utf-8"):
        pytest.skip("this kernel gives no transparent huge pages")
    array = np.arange(16 << 20, dtype=np.uint8)
    moved = collapse()
    if moved == 0:
        pytest.skip("this kernel has no MADV_COLLAPSE (Linux 6.1)")
    assert moved >= 7 * PAGE
    assert moved % PAGE == 0
    assert (array.reshape(-1, 256) == np.arange(256, dtype=np.uint8)).all()
    smaps = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    huge = sum(int(line.split()[1]) for line in smaps if line.startswith("AnonHugePages"))
    assert huge * 1024 >= 7 * PAGE


# 40 matrices that are shorter than a huge page, between what they were made from, which is freed.
SCRIPT = """
import json
import numpy as np
from export.engine.huge_pages import with_huge_pages

def load():
    sources, kept = [], []
    for _ in range(40):
        sources.append(np.ones(2_100_000, np.uint8))
        kept.append(sources[-1][:1_500_000].copy())
    return kept

loaded, moved = with_huge_pages(load, 60_000_000)
others = [with_huge_pages(load, size)[1] for size in (0, 2 << 30)]
print(json.dumps([sum(each.nbytes for each in loaded), moved, *others]))
"""


def test_matrices_shorter_than_a_page_are_moved_too():
    if collapse() == 0:
        pytest.skip("this kernel has no MADV_COLLAPSE, or gives no huge pages")
    clean = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES" and key[:7] != "MALLOC_"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=clean)
    size, moved, of_a_file, too_large = json.loads(done.stdout)
    assert moved >= 0.95 * size
    assert (of_a_file, too_large) == (0, 0)

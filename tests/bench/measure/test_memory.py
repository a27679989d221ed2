import subprocess
import sys
from pathlib import Path

import pytest

from bench.measure.memory import Split, peak_rss, reset_peak, resident_split

MIB = 1 << 20


def test_a_process_that_tells_everything_or_nothing(tmp_path: Path) -> None:
    assert peak_rss(tmp_path) is None
    assert resident_split(tmp_path) == Split()
    assert reset_peak(tmp_path / "none") is False
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t   13900 kB\nRssShmem:\t     16 kB\n")
    (tmp_path / "smaps_rollup").write_text(
        "0-1 ---p 0 00:00 0 [rollup]\nRss: 2000 kB\nPss: 900 kB\nAnonymous: 500 kB\n"
    )
    assert peak_rss(tmp_path) == 13900 * 1024
    assert resident_split(tmp_path) == Split(anonymous=516 * 1024, file=1484 * 1024, pss=900 * 1024)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_is_reset_and_rises_again() -> None:
    """In a process of its own, which allocates 40 MiB, frees them, resets, then allocates 20 MiB."""
    code = """
from bench.measure.memory import peak_rss, reset_peak, resident_split
start = peak_rss()
block = bytearray(40 << 20); high = peak_rss(); del block
assert reset_peak()
low = peak_rss()
block = bytearray(20 << 20)
print(start, high, low, peak_rss(), resident_split().anonymous)
"""
    root = Path(__file__).resolve().parents[3]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    start, high, low, again, anonymous = map(int, out.split())
    assert high - start > 38 * MIB
    assert high - low > 38 * MIB
    assert 18 * MIB < again - low < 30 * MIB
    assert anonymous > 20 * MIB

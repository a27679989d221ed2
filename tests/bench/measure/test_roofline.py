import pytest

from bench.measure.result import Bandwidth
from bench.measure.roofline import READERS, joined, probe_bandwidth, read_passes
from saap.base.cores import choose_cores


def test_bytes_over_the_best_reader() -> None:
    ticks = iter(range(1000))
    # Each reader spans one tick of this clock, so every pass reads the buffer in 1 s; the first pass is dropped.
    assert read_passes(2, 1 << 20, 3, lambda: float(next(ticks))) == [1 << 20] * 3
    assert next(ticks) == 2 * len(READERS) * 4


def test_probe_of_this_host_reads_a_buffer_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measure.roofline.PASSES", 2)
    found = probe_bandwidth(choose_cores(1), cache_bytes=None)
    assert found.buffer_bytes == 256 << 20 and found.n_threads == 1
    assert len(found.samples) == 2
    assert found.bytes_per_s is not None and 1e8 < found.bytes_per_s < 5e12


def test_a_probe_that_fails_is_unknown_with_its_reason() -> None:
    found = probe_bandwidth(choose_cores(1), cache_bytes=1 << 50)
    assert found.bytes_per_s is None and found.samples == []
    assert "MiB of memory are free" in found.unknown["samples"]


def test_joined_keeps_all_samples() -> None:
    good, bad = Bandwidth(1, 10, [1.0, 3.0]), Bandwidth(1, 10, [], unknown={"samples": "why"})
    assert joined(good, Bandwidth(1, 10, [2.0])).samples == [1.0, 3.0, 2.0]
    assert joined(bad, good).bytes_per_s == 3.0 and joined(bad, good).unknown == {}
    assert joined(bad, bad).unknown == {"samples": "why"}

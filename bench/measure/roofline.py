"""The ceiling of decode: measured read bandwidth divided by the bytes that a token reads.

``python -m bench.measure.roofline`` is the child that probes: it reads a buffer larger than any cache with as many
threads as the measurement uses, on the same cores. numpy releases the interpreter's lock inside its reductions, so
Python threads read in parallel. Each pass tries the reductions that stream best on different CPUs and keeps the
fastest: a ceiling must err upwards.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import msgspec
import numpy as np
import psutil
from numpy.typing import NDArray

from bench.measure.result import Bandwidth
from saap.base.child import ChildFailedError, call, job_and_tell
from saap.base.cores import choose_cores, physical_cores, pin

BUFFER = 256 << 20
PASSES = 5
TIMEOUT_S = 120

Floats = NDArray[np.float32]
READERS: tuple[Callable[[Floats], object], ...] = (
    lambda part: np.dot(part, part),  # BLAS: wide vectors, several accumulators
    lambda part: part.view(np.int32).max(),  # numpy's own SIMD
    lambda part: part.sum(),
)


@dataclass(frozen=True)
class _Job:
    cpus: list[int]
    buffer_bytes: int
    passes: int


def probe_bandwidth(cpus: Sequence[int], cache_bytes: int | None) -> Bandwidth:
    """Probe in a child pinned to ``cpus``, one thread each. A child that fails leaves no samples and the reason."""
    job = _Job(list(cpus), max(BUFFER, 4 * (cache_bytes or 0)), PASSES)
    # One BLAS thread: the parallelism is the probe's own.
    env = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    bandwidth = Bandwidth(len(cpus), job.buffer_bytes, [], cache_bytes)
    try:
        samples = call("bench.measure.roofline", asdict(job), TIMEOUT_S, env)["samples"]
    except ChildFailedError as error:
        return replace(bandwidth, unknown={"samples": f"the bandwidth probe failed: {error}"})
    return replace(bandwidth, samples=msgspec.convert(samples, list[float]))


def probe_bandwidths(cache_bytes: int | None) -> list[Bandwidth]:
    """Probe with 1, 2, 4, ... threads and with all cores, one thread each."""
    most = physical_cores()
    counts = sorted({most, *(1 << power for power in range(most.bit_length()) if 1 << power <= most)})
    return [probe_bandwidth(choose_cores(count), cache_bytes) for count in counts]


def joined(first: Bandwidth, second: Bandwidth) -> Bandwidth:
    """Join the samples of two probes of the same threads, e.g. before and after a run."""
    samples = [*first.samples, *second.samples]
    return replace(first, samples=samples, unknown={} if samples else {**second.unknown, **first.unknown})


def read_passes(threads: int, buffer_bytes: int, passes: int, clock: Callable[[], float]) -> list[float]:
    """Bytes per second of each pass over the buffer: its best reduction, all threads together, first pass warm-up."""
    buffer = np.ones(buffer_bytes // 4, np.float32)
    parts = np.array_split(buffer, threads)
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes + 1):
            best = 0.0
            for read in READERS:
                start = clock()
                list(pool.map(read, parts))
                best = max(best, buffer.nbytes / (clock() - start))
            rates.append(best)
    return rates[1:]


def main() -> None:
    job, tell = job_and_tell(_Job)
    pin(job.cpus)
    if job.buffer_bytes > psutil.virtual_memory().available:
        sys.exit(f"less than {job.buffer_bytes >> 20} MiB of memory are free")
    tell({"samples": read_passes(len(job.cpus), job.buffer_bytes, job.passes, time.perf_counter)})


if __name__ == "__main__":
    main()

"""A class of edge devices on this host: its number of cores and its memory, never its speed.

Cores are limited by affinity and memory by a control group. A CPU quota is not used: it stops all threads for the rest
of each period of 100 ms (kernel documentation, sched-bwc), so times per token fall in two heaps. Neither the kind of
core nor the memory's bandwidth can be limited honestly. So what is learnt is whether a model runs in that memory and
that many threads, and how two models compare under it; rates are this host's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.cores import allowed_cores, choose_cores
from bench.peer import PeerError
from bench.plan import Plan
from bench.result import CACHE_FACTOR, INVALID, OK, WARN, Measurement, Result
from bench.rounds import Progress
from bench.run import bench
from devices.cgroup import CgroupError, MemoryGroup, limited_memory
from devices.fit_memory import usable_memory
from devices.probe import probe
from devices.profile import Profile

KILLED, TOO_LATE = "killed by SIGKILL", "no answer within"  # as bench.child tells it


@dataclass(frozen=True)
class EdgeClass:
    """What of a device is imitated. None: not limited."""

    device: str
    title: str
    cores: int | None
    fast_cores: int | None
    memory_bytes: int | None  # that a process may take
    memory_source: str
    bandwidth: float | None  # B/s, of the profile
    bandwidth_source: str
    cache_bytes: int | None = None  # last level


def edge_class(name: str, profile: Profile, memory_bytes: int | None = None) -> EdgeClass:
    """The limits of a profile.

    Args:
        memory_bytes: that a process may take, in place of what the board leaves it by its profile.

    Raises:
        PeerError: the profile knows no memory and none was given.
    """

    def value(key: str) -> float | None:
        number = profile.numbers.get(key)
        return number.value if number else None

    known = {key: value(key) for key in ("memory_visible", "memory_capacity")}
    usable = (memory_bytes, "as given") if memory_bytes else usable_memory(known)
    if usable is None:
        number = profile.numbers.get("memory_capacity")
        why = f" ({number.source})" if number else ""
        raise PeerError(f"the memory of {name} is not known{why}: say which with --emulate-memory, such as 2GB")
    bandwidth = profile.numbers.get("memory_bandwidth")
    cache = value("last_level_cache")
    cores, fast = value("cores"), value("big_cores")
    return EdgeClass(
        device=name,
        title=profile.title,
        cores=int(cores) if cores else None,
        fast_cores=int(fast) if fast else None,
        memory_bytes=usable[0],
        memory_source=usable[1],
        bandwidth=value("memory_bandwidth"),
        bandwidth_source=bandwidth.source if bandwidth else "the profile holds no bandwidth",
        cache_bytes=int(cache) if cache else None,
    )


def bench_emulated(
    specs: Sequence[str],
    plan: Plan,
    edge: EdgeClass,
    *,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
    run: Callable[..., Result] = bench,
) -> Result:
    """``bench.run.bench`` within the limits of an edge class.

    The workers run inside, this process does not: a worker that the limit kills makes its measurement INVALID with that
    reason. Where no group can be made, cores alone are limited and every measurement is WARN with the reason. The
    device of the result is not the host's any more, so it does not compare with results made without limits.

    Raises:
        PeerError: a GPU, whose memory no control group holds; and as ``bench``.
    """
    if plan.provider != "cpu":
        raise PeerError(f"--emulate limits cores and memory of a CPU: leave --provider {plan.provider} out")
    with _cores(edge) as cores, _memory(edge, plan.root) as (group, why):
        # The model's pages are charged to whoever reads them first: a cold load drops them, so that workers do.
        limited = replace(plan, cold=True, launch=group.launcher) if group else plan
        if plan.threads is None and edge.fast_cores:
            limited = replace(limited, threads=min(edge.fast_cores, cores))
        result = run(specs, limited, names=names, progress=progress)
        killed = group.oom_kills() if group else 0
    facts = {
        **asdict(edge),
        "cores_used": cores,
        "memory_limited": group is not None,
        "memory_reason": why,
        "cgroup_version": group.version if group else None,
        "processes_killed": killed,
    }
    return replace(
        result,
        device=_other_device(result.device, facts),
        settings={**result.settings, "emulated": facts},
        measurements=[_judged(m, edge, killed, why) for m in result.measurements],
    )


def notes(result: Result) -> list[str]:
    """What has to stand beside the numbers of an emulated run, a sentence each."""
    facts = result.settings["emulated"]
    device = facts["device"]
    cores = f"{facts['cores_used']} of this host's cores"
    if facts["cores"] and facts["cores_used"] < facts["cores"]:
        cores += f" ({device} has {facts['cores']}, this process may use no more)"
    memory = (
        f"{facts['memory_bytes'] / 1e6:.0f} MB ({facts['memory_source']})"
        if facts["memory_limited"]
        else "memory not limited"
    )
    return [
        f"edge class of {device}: {cores}, {memory}. Rates are this host's, not those of {device}",
        *_projections(result),
    ]


def _projections(result: Result) -> Iterator[str]:
    facts = result.settings["emulated"]
    bandwidth, device = facts["bandwidth"], facts["device"]
    for m in result.measurements:
        if not m.n_gen or m.bytes_per_token is None or m.status == INVALID:
            continue
        if bandwidth is None:
            yield f"no projection for {device}: {facts['bandwidth_source']}"
            return
        if m.bytes_per_token <= CACHE_FACTOR * (facts["cache_bytes"] or 0):
            yield f"no projection for {m.name}: on {device} it may run from cache"
            continue
        yield (
            f"projection, not measured: {m.name} on {device} stays under {bandwidth / m.bytes_per_token:.0f} tok/s, "
            f"its memory ceiling ({bandwidth / 1e9:.1f} GB/s over {m.bytes_per_token / 1e6:.1f} MB a token)"
        )


@contextlib.contextmanager
def _cores(edge: EdgeClass) -> Iterator[int]:
    """Keep this process, and all that it starts, on as many cores as the device has; their number."""
    before = allowed_cores()
    chosen = choose_cores(edge.cores) if edge.cores else before
    if not hasattr(os, "sched_setaffinity"):
        raise PeerError("--emulate needs a system that pins processes to cores: run it on Linux")
    os.sched_setaffinity(0, chosen)
    try:
        yield len(chosen)
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _memory(edge: EdgeClass, root: Path) -> Iterator[tuple[MemoryGroup | None, str | None]]:
    """The group, or why there is none."""
    has = probe(root)["memory_bytes"]
    if edge.memory_bytes is None or (has and has <= edge.memory_bytes):
        yield None, f"this host has {has / 1e6:.0f} MB, no more than {edge.device}"
        return
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(limited_memory(edge.memory_bytes, root))
        except CgroupError as error:
            yield None, str(error)
            return
        yield group, None


def _judged(m: Measurement, edge: EdgeClass, killed: int, why: str | None) -> Measurement:
    reasons, status = list(m.reasons), m.status
    if killed and not m.samples and reasons and reasons[0].startswith(KILLED):
        assert edge.memory_bytes is not None
        limit = f"{edge.memory_bytes / 1e6:.0f} MB ({edge.device})"
        reasons[0] = (
            f"killed by the memory limit of {limit}: the model and its cache do not fit, or ask for fewer tokens"
        )
        status = INVALID
    elif reasons and reasons[0].startswith(TOO_LATE) and why is None:
        reasons[0] += f"; {edge.memory_bytes} bytes may be too few, so that its pages are read again and again"
    if why:
        reasons.append(f"memory is not limited: {why}")
        status = WARN if status == OK else status
    return replace(m, reasons=reasons, status=status)


def _other_device(device: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The host within limits, under a fingerprint of its own."""
    name = f"{facts['device']}, {facts['cores_used']} cores, {facts['memory_bytes'] / 1e6:.0f} MB"
    name += "" if facts["memory_limited"] else " (not limited)"
    mixed = json.dumps([device.get("fingerprint"), name])
    return {**device, "emulated": name, "fingerprint": hashlib.sha256(mixed.encode()).hexdigest()[:16]}

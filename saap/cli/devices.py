"""`saap devices list`, `show` and `probe`: known devices, and what this host is. Neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import click

from saap.cli.console import print_table

UNKNOWN = "unknown"


def list_devices(as_json: bool = False) -> None:
    """Names, processors and bandwidths of all profiles."""
    from devices.profiles.profile import load_profiles

    profiles = sorted(load_profiles().items())
    if as_json:
        click.echo(json.dumps({name: asdict(profile) for name, profile in profiles}, indent=1))
        return
    rows = []
    for name, profile in profiles:
        bandwidth = profile.numbers["memory_bandwidth"].value
        rows.append([name, profile.title, profile.cpu, "-" if bandwidth is None else f"{bandwidth / 1e9:.1f}"])
    print_table("devices", ["name", "board", "processor", "GB/s"], rows)


def show_device(name: str, as_json: bool = False) -> None:
    """All facts of one profile."""
    from devices.profiles.profile import load_profile

    profile = load_profile(name)
    if as_json:
        click.echo(json.dumps(asdict(profile), indent=1))
        return
    facts = {
        "name": profile.name,
        "architecture": profile.architecture,
        "processor": profile.cpu,
        "GPU": f"{profile.gpu} ({profile.cuda})" if profile.gpu and profile.cuda else profile.gpu or "none",
        "features": ", ".join(profile.isa),
        "lacks": ", ".join(profile.lacks) or "nothing that is known",
        "power modes": ", ".join(profile.power_modes) or "none",
        "device tree": ", ".join(profile.compatible) or "none",
    }
    print_table(profile.title, ["fact", "value"], [list(row) for row in facts.items()])
    numbers = [[key, _quantity(n.value, n.unit), n.level, n.source] for key, n in profile.numbers.items()]
    if runtime := profile.runtime:
        version = f"{runtime.onnxruntime} (Python {runtime.python})"
        numbers.append(["onnxruntime", version, runtime.level, f"{runtime.system}; {runtime.source}"])
    print_table("", ["number", "value", "level", "source"], numbers)
    for note in profile.notes:
        click.echo(f"  {note}")


def probe_host(as_json: bool, bandwidth: bool = False) -> None:
    """What this host is, for people or machines; ``bandwidth`` reads memory for some seconds."""
    from devices.probe.host import probe_all
    from devices.profiles.profile import load_profiles, profile_of

    facts: dict[str, Any] = {**probe_all()}
    facts["profile"] = profile_of(facts["compatible"], load_profiles())
    if bandwidth:
        facts["bandwidth"] = read_bandwidth(facts["last_level_cache_bytes"])
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    print_table("this host", ["fact", "value"], list(_host_rows(facts)))
    print_table(
        "clusters", ["CPUs", "core", "capacity", "governor", "clock MHz", "from", "to", "hardware"], _clusters(facts)
    )
    print_table("now", ["fact", "value"], list(_state_rows(facts["state"])))
    if bandwidth:
        _show_bandwidth(facts["bandwidth"])


def read_bandwidth(cache_bytes: int | None) -> list[dict[str, Any]]:
    """Read bandwidth with 1, 2, 4, ... threads and with all cores, one thread each; a failed probe says why.

    Returns:
        Per count: threads, cpus, bytes_per_s (best pass) and samples (bytes per second), or unknown.
    """
    from bench.measure.cores import allowed_cores, choose_cores, physical_cores
    from bench.measure.roofline import probe_bandwidth

    most = physical_cores(allowed_cores())
    counts = sorted({most, *(1 << power for power in range(most.bit_length()) if 1 << power <= most)})
    found = []
    for count in counts:
        cpus = choose_cores(count)
        probed = probe_bandwidth(cpus, cache_bytes)
        best = max(probed.samples, default=None)
        row = {"threads": count, "cpus": cpus, "bytes_per_s": best, "samples": probed.samples}
        found.append(row | ({"unknown": probed.unknown} if best is None else {}))
    return found


def _show_bandwidth(found: list[dict[str, Any]]) -> None:
    rows = [
        [
            str(row["threads"]),
            f"{row['bytes_per_s'] / 1e9:.1f}" if row["bytes_per_s"] else str(row["unknown"]["samples"]),
        ]
        for row in found
    ]
    print_table("reading memory", ["threads", "GB/s"], rows)


def _host_rows(facts: dict[str, Any]) -> Iterable[list[str]]:
    nested = {"state", "clusters", "frequencies", "unknown", "bandwidth"}
    for key, value in facts.items():
        if key not in nested:
            yield [key, _plain(value, facts["unknown"].get(key, "no profile names this board"))]


def _clusters(facts: dict[str, Any]) -> list[list[str]]:
    clocks = ("current_hz", "min_hz", "max_hz", "hardware_max_hz")
    return [
        [
            c["cpus"],
            c["core"] or UNKNOWN,
            "-" if c["capacity"] is None else str(c["capacity"]),
            c["governor"] or UNKNOWN,
            *("-" if c[key] is None else f"{c[key] / 1e6:.0f}" for key in clocks),
        ]
        for c in facts["clusters"] or []
    ]


def _state_rows(state: dict[str, Any]) -> Iterable[list[str]]:
    heat = {name: None if value is None else f"{value:.1f} C" for name, value in (state["temperatures"] or {}).items()}
    flat = {"temperatures": heat or None, **state["throttling"], **state["memory"]}
    for key, value in flat.items():
        yield [key, _plain(value, state["unknown"].get(key, UNKNOWN))]


def _plain(value: Any, why: str) -> str:
    """A JSON value as a person would write it, or why there is none."""
    if value is None:
        return f"{UNKNOWN}: {why}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {UNKNOWN if v is None else _plain(v, '')}" for key, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_plain(item, "") for item in value) or "none"
    return f"{value} ({value / 2**20:.0f} MiB)" if isinstance(value, int) and value > 1 << 20 else str(value)


def _quantity(value: float | None, unit: str) -> str:
    if value is None:
        return UNKNOWN
    scale, name = {"B/s": (1e9, "GB/s"), "B": (2**20, "MiB"), "Hz": (1e6, "MHz")}.get(unit, (1, ""))
    return f"{value / scale:g} {name}".strip()

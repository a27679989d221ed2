"""``saap devices probe``: what this host is. Neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from saap.cli.console import print_table
from saap.cli.types import Sections

if TYPE_CHECKING:
    from bench.measure.result import Bandwidth
    from devices.probe.cpu import Cluster
    from devices.probe.host import HostFacts

UNKNOWN = "unknown"
NO_PROFILE = f"{UNKNOWN}: no profile names this board"


@click.command(cls=Sections)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--bandwidth", is_flag=True, help="Also read memory with 1, 2, 4, ... threads, for some seconds.")
def probe(as_json: bool, bandwidth: bool) -> None:
    """Describe this host.

    \b
    Example:
      saap devices probe
    """
    from devices.probe.host import probe as probe_host
    from devices.profiles.profile import load_profiles, profile_of

    facts = probe_host()
    profile = profile_of(facts["compatible"], load_profiles())
    speeds = read_bandwidth(facts["last_level_cache_bytes"]) if bandwidth else []
    if as_json:
        read = {"bandwidth": [{**asdict(speed), "bytes_per_s": speed.bytes_per_s} for speed in speeds]}
        click.echo(json.dumps({**facts, "profile": profile, **(read if bandwidth else {})}, indent=1))
        return
    print_table("this host", ["fact", "value"], [*_host_rows(facts), ["profile", profile or NO_PROFILE]])
    headings = ["CPUs", "core", "capacity", "governor", "clock MHz", "from", "to", "hardware"]
    print_table("clusters", headings, [*map(_cluster, facts["clusters"] or [])])
    if bandwidth:
        print_table("reading memory", ["threads", "GB/s"], [[str(speed.n_threads), _rate(speed)] for speed in speeds])


def read_bandwidth(cache_bytes: int | None) -> list[Bandwidth]:
    """Read memory with 1, 2, 4, ... threads and with all cores, one thread each."""
    from bench.measure.roofline import probe_bandwidth
    from saap.base.cores import choose_cores, physical_cores

    most = physical_cores()
    counts = sorted({most, *(1 << power for power in range(most.bit_length()) if 1 << power <= most)})
    return [probe_bandwidth(choose_cores(count), cache_bytes) for count in counts]


def _rate(bandwidth: Bandwidth) -> str:
    best = bandwidth.bytes_per_s
    return f"{best / 1e9:.1f}" if best else bandwidth.unknown["samples"]


def _host_rows(facts: HostFacts) -> Iterable[list[str]]:
    nested = {"clusters", "unknown"}
    for key, value in facts.items():
        if key not in nested:
            yield [key, _plain(value, facts["unknown"].get(key, ""))]


def _cluster(cluster: Cluster) -> list[str]:
    clocks = (cluster["current_hz"], cluster["min_hz"], cluster["max_hz"], cluster["hardware_max_hz"])
    return [
        cluster["cpus"],
        cluster["core"] or UNKNOWN,
        "-" if cluster["capacity"] is None else str(cluster["capacity"]),
        cluster["governor"] or UNKNOWN,
        *("-" if clock is None else f"{clock / 1e6:.0f}" for clock in clocks),
    ]


def _plain(value: object, why: str) -> str:
    """Spell a JSON value as a person would write it, or say why there is none."""
    if value is None:
        return f"{UNKNOWN}: {why}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {UNKNOWN if v is None else _plain(v, '')}" for key, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_plain(item, "") for item in value) or "none"
    return f"{value} ({value / 2**20:.0f} MiB)" if isinstance(value, int) and value > 1 << 20 else str(value)

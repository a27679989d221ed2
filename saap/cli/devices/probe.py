"""``saap devices probe``: what this host is. Neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import click

from saap.cli.console import print_table
from saap.system.errors import UserError

UNKNOWN = "unknown"


class ProbeCommand(click.Command):
    """It once timed layers too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if any(word.partition("=")[0] == "--costs" for word in args):
            raise UserError("the costs of layers have a command of their own: `saap devices costs MODEL -o cost.json`")
        return super().parse_args(ctx, args)


@click.command(cls=ProbeCommand)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--bandwidth", is_flag=True, help="Also read memory with 1, 2, 4, ... threads, for some seconds.")
def probe(as_json: bool, bandwidth: bool) -> None:
    """What this host is.

    \b
    Example:
      saap devices probe
    """
    probe_host(as_json, bandwidth)


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
    from bench.measure.cores import choose_cores
    from bench.measure.roofline import probe_bandwidth
    from devices.common.cores import physical_cores

    most = physical_cores()
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

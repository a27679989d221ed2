"""``saap devices probe``: what this host or a board is. Neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated

import click

from bench.remote.options import BoardOptions
from saap.base.options import Option
from saap.cli.console import Console, print_table
from saap.cli.options import OptionsCommand, options_of

if TYPE_CHECKING:
    from bench.measure.result import Bandwidth
    from devices.probe.cpu import Cluster
    from devices.probe.host import HostFacts

UNKNOWN = "unknown"
NO_PROFILE = f"{UNKNOWN}: no profile names this board"


@dataclass(frozen=True)
class ProbeOptions:
    """The options of ``saap devices probe``."""

    bandwidth: Annotated[bool, Option("Also read memory with 1, 2, 4, ... threads, for some seconds.")] = False
    on: Annotated[
        str | None, Option("A board: ssh://user@host[:port], adb://[serial], labgrid://PLACE.", metavar="URL")
    ] = None
    board: BoardOptions = field(default_factory=BoardOptions)

    def check(self) -> None:
        self.board.check(on_a_board=self.on is not None)


@click.command(cls=OptionsCommand)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@options_of(ProbeOptions)
def probe(as_json: bool, options: ProbeOptions) -> None:
    """Describe this host, or a board.

    \b
    Example:
      saap devices probe
      saap devices probe --bandwidth --on ssh://pi@raspberrypi
    """
    from bench.remote.target import target
    from devices.profiles.profile import load_profiles, profile_of
    from saap.base.interrupt import ended_as_by_a_person

    options.check()
    bandwidth = options.bandwidth
    with Console() as console, ended_as_by_a_person():
        device = target(options.on, options.board, console.say)
        answer = device.probe(bandwidth, progress=console.report)
        console.finish()
    facts, speeds = answer.host, answer.bandwidth
    profile = profile_of(facts["compatible"], load_profiles())
    if as_json:
        read = {"bandwidth": [{**asdict(speed), "bytes_per_s": speed.bytes_per_s} for speed in speeds]}
        click.echo(json.dumps({**facts, "profile": profile, **(read if bandwidth else {})}, indent=1))
        return
    print_table(device.url or "this host", ["fact", "value"], [*_host_rows(facts), ["profile", profile or NO_PROFILE]])
    headings = ["CPUs", "core", "capacity", "governor", "clock MHz", "from", "to", "hardware"]
    print_table("clusters", headings, [*map(_cluster, facts["clusters"] or [])])
    if bandwidth:
        print_table("reading memory", ["threads", "GB/s"], [[str(speed.n_threads), _rate(speed)] for speed in speeds])


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

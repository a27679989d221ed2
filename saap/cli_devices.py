"""The commands about devices: profiles, what this host is, what fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from saap.cli_types import Counts, directory
from saap.console import Console


@click.group()
def devices() -> None:
    """Known devices and this host."""


@devices.command(name="list")
def devices_list() -> None:
    """The devices that have a profile.

    \b
    Example:
      saap devices list
    """
    from saap.board import list_devices

    list_devices()


@devices.command(name="show")
@click.argument("name")
def devices_show(name: str) -> None:
    """A profile: every number with its unit, source and level.

    \b
    Example:
      saap devices show raspberry-pi-5
    """
    from saap.board import show_device

    show_device(name)


@devices.command(name="probe")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--costs", metavar="MODEL", help="Time the layer sizes of a model directory, name or bundle here.")
@click.option("-o", "--out", type=directory, default=Path("cost.json"), show_default=True, help="Of --costs.")
@click.option("-t", "--threads", type=Counts(), help="Of --costs; default: all physical cores.")
@click.option("--bits", type=click.Choice(["4", "8", "32"]), help="Of --costs; default: 4, or the bundle's.")
@click.option("--group", type=click.Choice(["32", "64", "128"]), help="Of --costs; default: 32, or the bundle's.")
@click.option("-d", "--depth", type=int, help="Of --costs: tokens in the cache; default: 192.")
def devices_probe(as_json: bool, costs: str | None, **options: Any) -> None:
    """What this host is, or with --costs what each layer size of a model takes on it.

    \b
    Example:
      saap devices probe
      saap devices probe --costs smollm2-135m -t 1 -o cost.json
    """
    if costs is None:
        from saap.board import probe_host

        probe_host(as_json)
        return
    from saap.costs_command import probe_costs_step

    bits, block = (int(options[name]) if options[name] else None for name in ("bits", "group"))
    with Console() as console:
        probe_costs_step(
            costs, options["out"], threads=options["threads"], bits=bits, block=block, depth=options["depth"],
            console=console,
        )  # fmt: skip

"""The commands about devices: profiles, what this host is, what fits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from saap.cli.console import Console
from saap.cli.guard_options import COMMANDS
from saap.cli.types import BYTES, Counts, directory
from saap.system.interrupt import ended_as_by_a_person


@click.group()
def devices() -> None:
    """Known devices and this host."""


@devices.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def devices_list(as_json: bool) -> None:
    """The devices that have a profile.

    \b
    Example:
      saap devices list
    """
    from saap.cli.devices import list_devices

    list_devices(as_json)


@devices.command(name="show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def devices_show(name: str, as_json: bool) -> None:
    """A profile: every number with its unit, source and level.

    \b
    Example:
      saap devices show raspberry-pi-5
    """
    from saap.cli.devices import show_device

    show_device(name, as_json)


@devices.command(name="probe")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--bandwidth", is_flag=True, help="Also read memory with 1, 2, 4, ... threads, for some seconds.")
def devices_probe(as_json: bool, bandwidth: bool) -> None:
    """What this host is.

    \b
    Example:
      saap devices probe
    """
    from saap.cli.devices import probe_host

    probe_host(as_json, bandwidth)


@devices.command(name="costs")
@click.argument("model")
@click.option("-o", "--out", type=directory, default=Path("cost.json"), show_default=True, help="The JSON file.")
@click.option("-t", "--threads", type=Counts(), help="Default: all physical cores.")
@click.option("--bits", type=click.Choice(["4", "8", "32"]), help="Default: 4, or the bundle's.")
@click.option("--group-size", "group", type=click.Choice(["32", "64", "128"]), help="Default: 32, or the bundle's.")
@click.option("-d", "--depth", type=int, help="Tokens in the cache; default: 192.")
@click.option("--on", metavar="URL", help="A board: ssh://user@host[:port], adb://[serial], labgrid://PLACE.")
@click.option("--wheels", type=directory, help="With --on: wheels for a board that reaches no index.")
@click.option("--board-packages", is_flag=True, help="With --on: use what the board's Python has.")
def devices_costs(model: str, on: str | None, **options: Any) -> None:
    """What each layer size of MODEL takes, on this device or on a board.

    With --on the graphs are made here and timed there; the board needs Python and nothing else.

    \b
    Example:
      saap devices costs smollm2-135m -t 1 -o cost.json
      saap devices costs smollm2-135m -t 4 --on ssh://pi@raspberrypi -o pi.json
    """
    from bench.costs.options import CostsOptions
    from bench.remote.options import BoardOptions
    from bench.remote.target import target
    from saap.cli.costs import Precision, costs_step

    timing = {name: options[name] for name in ("threads", "depth") if options[name] is not None}
    board_options = BoardOptions(options["wheels"], options["board_packages"])
    board_options.check()
    precision = Precision(*(int(options[name]) if options[name] else None for name in ("bits", "group")))
    with Console() as console, ended_as_by_a_person(), target(on, board_options, console.say) as device:
        costs_step(model, options["out"], CostsOptions(**timing), precision, device, console)


@devices.command(name="check")
@click.argument("bundle", type=directory)
@click.option("--device", "name", metavar="NAME", help="A profile of `saap devices list`; default: this host.")
@click.option("--context", type=int, help="Tokens that the cache holds; default: 4096, or what the model has.")
@click.option("--memory", type=BYTES, help="RAM of the device, such as 8GiB, where its profile does not know it.")
@click.option("--onnxruntime", metavar="VERSION", help="That is on the device, where it is not its system's.")
@click.option("--bandwidth", is_flag=True, help="Without --device: read memory for some seconds, for the ceiling.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def devices_check(bundle: Path, name: str | None, **options: Any) -> None:
    """Will a bundle run there? Exit 1 when it does not fit.

    Whether it loads, how much memory it takes, how much context fits, which kernels run it, how fast it could be at
    most, and what would make it fit. Nothing is run.

    \b
    Example:
      saap devices check out/demo/slim-int4 --device raspberry-pi-4 --memory 2GiB
    """
    from saap.cli.fit import check_step

    sys.exit(check_step(bundle, name, options))


for command in COMMANDS:
    devices.add_command(command)

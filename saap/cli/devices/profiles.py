"""``saap devices list`` and ``show``: known devices. Neither torch nor transformers."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from saap.cli.console import print_table, tell
from saap.cli.types import Sections, device_names, offered

UNKNOWN = "unknown"


@click.command(name="list", cls=Sections)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def list_devices(as_json: bool) -> None:
    """List the devices that have a profile: names, processors and bandwidths.

    \b
    Example:
      saap devices list
    """
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


@click.command(name="show", cls=Sections)
@click.argument("name", shell_complete=lambda _, __, typed: offered(device_names(), typed))
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def show_device(name: str, as_json: bool) -> None:
    """Show a profile: every number with its unit, source and level.

    \b
    Example:
      saap devices show raspberry-pi-5
    """
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
        tell(f"  {note}")


def _quantity(value: float | None, unit: str) -> str:
    if value is None:
        return UNKNOWN
    scale, name = {"B/s": (1e9, "GB/s"), "B": (2**20, "MiB"), "Hz": (1e6, "MHz")}.get(unit, (1, ""))
    return f"{value / scale:g} {name}".strip()

"""``saap devices``: known devices, what this host is, what fits, what a layer costs, and what became worse."""

from __future__ import annotations

import click

from saap.cli.types import LazyGroup

COMMANDS = {
    "list": ("devices.profiles:list_devices", "List the devices that have a profile."),
    "show": ("devices.profiles:show_device", "Show a profile: every number with its unit, source and level."),
    "probe": ("devices.probe:probe", "What this host is."),
    "check": ("devices.check:check", "Will a bundle run there?"),
    "costs": ("devices.costs:costs", "What each layer size of a model takes, here or on a board."),
    "baseline": ("devices.test:baseline", "Record what a bundle is on a device."),
    "test": ("devices.test:test", "Measure a bundle again: what became worse?"),
    "emulate": ("devices.emulate:emulate", "Compare a bundle's answers on aarch64 with this host's."),
}


@click.group(cls=LazyGroup, modules=COMMANDS)
def devices() -> None:
    """Known devices and this host."""

"""The commands that guard a device: record a baseline, test against it, and run a bundle on an emulated aarch64 CPU."""

from __future__ import annotations

import sys
from typing import Any

import click

from saap.cli.console import Console
from saap.cli.types import directory


def on_a_device(command: Any) -> Any:
    """Options of both commands: where the baselines are, and which device is measured."""
    for option in reversed(
        (
            click.option(
                "--baselines", type=directory, help="Folder of baselines; default: devices/baselines, below this one."
            ),
            click.option("--name", help="Of the model; default: the bundle's folder."),
            click.option(
                "--on", "url", metavar="URL", help="A board: ssh://user@host[:port], adb://[serial], labgrid://PLACE."
            ),
            click.option("--wheels", type=directory, help="With --on: wheels for a board that reaches no index."),
            click.option("--board-packages", is_flag=True, help="With --on: use what the board's Python has."),
            click.option("--max-time", "max_time_s", type=float, default=120, show_default=True, help="Seconds a run."),
        )
    ):
        command = option(command)
    return command


@click.command()
@click.argument("bundle")
@click.option("-p", "--prompt", type=int, default=128, show_default=True, help="Prompt tokens.")
@click.option("-n", "--generate", type=int, default=128, show_default=True, help="Generated tokens.")
@click.option("-d", "--depth", type=int, default=0, show_default=True, help="Tokens in the cache before.")
@click.option("-t", "--threads", type=int, help="Default: all physical cores.")
@click.option("-r", "--repetitions", type=int, help="Of each run; default: until the rate is known to 2 %.")
@click.option("--runs", type=int, default=2, show_default=True, help="What differs between them is taken for noise.")
@click.option("--text", type=directory, help="A text file to ask the model about; default: a few sentences of ours.")
@on_a_device
def baseline(bundle: str, **options: Any) -> None:
    """Record what BUNDLE is on this device, or on a board: speed, memory, load, energy, answers.

    \b
    Example:
      saap devices baseline out/demo/slim-int4 -t 4 --baselines ours/baselines
      saap devices baseline out/demo/slim-int4 --on ssh://pi@board
    """
    from saap.cli.guard import baseline_step

    with Console() as console:
        baseline_step(bundle, options, console)


@click.command()
@click.argument("bundle")
@click.option("--min-effect", type=float, default=0.05, show_default=True, help="Smallest change of speed that counts.")
@click.option("--junit", type=directory, help="Write JUnit XML here.")
@on_a_device
def test(bundle: str, **options: Any) -> None:
    """Measure BUNDLE again and say what became worse than the baseline of this device.

    What looks worse is measured a second time before it is said. Exit 1 when something is worse, 3 when there is no
    baseline of this device or a run is INVALID.

    \b
    Example:
      saap devices test out/demo/slim-int4 --baselines ours/baselines --junit devices.xml
    """
    from saap.cli.guard import test_step

    with Console() as console:
        sys.exit(test_step(bundle, options, console))


@click.command()
@click.argument("bundle")
@click.option(
    "--cpu",
    "cpus",
    type=click.Choice(["cortex-a72", "cortex-a76", "max"]),
    multiple=True,
    help="May be given again; default: all three.",
)
@click.option("--text", type=directory, help="A text file to ask the model about; default: a few sentences of ours.")
@click.option("--tokens", type=int, default=64, show_default=True, help="Of the text.")
@click.option("--json", "json_path", type=directory, help="Write the answers here; - prints them.")
def emulate(bundle: str, cpus: tuple[str, ...], **options: Any) -> None:
    """Does BUNDLE say the same on aarch64? Run it under qemu-user, without a board.

    The agent, the worker and the aarch64 wheel of ONNX Runtime are the real ones, so kernels are chosen as on a board:
    cortex-a72 is a Raspberry Pi 4, cortex-a76 a Raspberry Pi 5, max has i8mm. Speeds are null. Needs qemu-user and
    mmdebstrap; what is fetched, about 120 MB, is kept in the cache. Exit 1 when an answer differs.

    \b
    Example:
      saap devices emulate out/demo/slim-int4 --cpu cortex-a72
    """
    from saap.cli.emulate import emulate_step

    with Console() as console:
        sys.exit(emulate_step(bundle, cpus, options, console))


COMMANDS = (baseline, test, emulate)

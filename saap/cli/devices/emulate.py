"""``saap devices emulate``: answers of a bundle on emulated CPUs, beside this host's."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click

from saap.base.errors import UserError
from saap.base.files import write_text
from saap.base.interrupt import ended_as_by_a_person
from saap.base.options import COUNT, Option
from saap.base.wording import counted
from saap.cli.bench import STDOUT
from saap.cli.console import Console, print_table, tell
from saap.cli.devices.test import text_ids
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import directory, force

if TYPE_CHECKING:
    from bench.remote.emulated import Emulation


@dataclass(frozen=True)
class EmulateCommand:
    """The options of ``saap devices emulate``."""

    cpu: Annotated[
        tuple[Literal["cortex-a72", "cortex-a76", "max"], ...], Option("May be given again; default: all three.")
    ] = ()
    tokens: Annotated[int, Option("Of the text that the bundle is asked about."), COUNT] = 64


@click.command(cls=OptionsCommand)
@click.argument("bundle")
@options_of(EmulateCommand)
@click.option("--json", "json_path", type=directory, help="Write the answers here; - prints them.")
@force
def emulate(bundle: str, json_path: Path | None, options: EmulateCommand) -> None:
    """Compare BUNDLE's answers on aarch64, emulated by qemu-user without a board, with those of this host.

    The agent, the worker and the aarch64 wheel of ONNX Runtime are the real ones, so kernels are chosen as on a board:
    cortex-a72 is a Raspberry Pi 4, cortex-a76 a Raspberry Pi 5, max has i8mm. Speeds are null. Needs qemu-user and
    mmdebstrap; what is fetched, about 120 MB, is kept in the cache. Exit 1 when an answer differs.

    \b
    Example:
      saap devices emulate out/demo/slim-int4 --cpu cortex-a72
    """
    from bench.remote.emulated import document
    from bench.remote.emulated import emulate as run_emulated
    from devices.emulate.qemu import CPUS, prepare
    from devices.probe.host import probe
    from saap.base.files import cache_directory
    from saap.base.outputs import EMULATION, check_place

    if options.tokens < 2:
        raise UserError(f"a text of {counted(options.tokens, 'token')} has no likelihood: give --tokens 2 or more")
    check_place(json_path, EMULATION, bundle)
    ids = text_ids(Path(bundle))[: options.tokens]
    if len(ids) < 2:
        raise UserError(f"{bundle} has room for {counted(len(ids), 'token')} of text, and 2 are needed: export it anew")
    onnxruntime = probe()["onnxruntime"]
    if onnxruntime is None:
        raise UserError(
            "answers are compared with ONNX Runtime's, which is not installed here: pip install onnxruntime"
        )
    console = Console.of_command()
    console.report("emulate, arm64 packages and wheels", 0, 0)
    root = prepare(cache_directory(), str(onnxruntime))
    with ended_as_by_a_person():
        emulation = run_emulated(bundle, options.cpu or tuple(CPUS), ids, root, progress=console.report)
    console.finish()
    if json_path == STDOUT:
        click.echo(json.dumps(document(emulation), allow_nan=False))
        sys.exit(emulation.exit_code)
    if json_path is not None:
        write_text(json_path, json.dumps(document(emulation), indent=1, allow_nan=False) + "\n")
    _show(emulation)
    sys.exit(emulation.exit_code)


def _show(emulation: Emulation) -> None:
    rows = [[emulation.reference.cpu, "-", f"{emulation.reference.nll:.4f}", "-", "-"]]
    for answer in emulation.answers:
        same = f"{answer.same_tokens} of {len(emulation.reference.tokens)}"
        verdict = "differs" if answer.faults else "same"
        rows.append([answer.cpu, same, f"{answer.nll:.4f}", f"{answer.nll_difference:+.4f}", verdict])
    title = f"{emulation.bundle}, {emulation.bits} bit, {len(emulation.text)} tokens of text"
    print_table(title, ["CPU", "same greedy tokens", "NLL", "difference", "verdict"], rows)
    for answer in emulation.answers:
        for fault in answer.faults:
            tell(f"  {answer.cpu}: {fault}")
    tell("  speeds are null: an emulator's times say nothing of a board")

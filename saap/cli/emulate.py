"""``saap devices emulate``: answers of a bundle on emulated CPUs, beside this host's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from devices.common.files import write_text
from saap.cli.bench import STDOUT
from saap.cli.console import Console, print_table
from saap.cli.guard import text_ids
from saap.system.errors import UserError
from saap.system.interrupt import ended_as_by_a_person


def emulate_step(bundle: str, cpus: tuple[str, ...], options: dict[str, Any], console: Console) -> int:
    """Prepare, run, show; the exit code."""
    from bench.remote.emulated import document, emulate
    from bench.runtimes.session import cache_directory
    from devices.emulate.qemu import CPUS, prepare
    from devices.probe.host import probe

    if options["tokens"] < 2:
        raise UserError(f"a text of {options['tokens']} tokens has no likelihood: give --tokens 2 or more")
    ids = text_ids(Path(bundle), options["text"])[: options["tokens"]]
    if len(ids) < 2:
        raise UserError(f"a text of {len(ids)} tokens has no likelihood: give a longer --text")
    onnxruntime = probe()["onnxruntime"]
    if onnxruntime is None:
        raise UserError("ONNX Runtime is not installed here, and answers are compared with its: install saap[bench]")
    console.report("emulate, arm64 packages and wheels", 0, 1)
    root = prepare(cache_directory(), str(onnxruntime))
    with ended_as_by_a_person():
        found = emulate(bundle, cpus or tuple(CPUS), ids, root, progress=console.report)
    console.finish()
    if options["json_path"] == STDOUT:
        click.echo(json.dumps(document(found), allow_nan=False))
        return int(found.exit_code)
    if options["json_path"] is not None:
        write_text(options["json_path"], json.dumps(document(found), indent=1, allow_nan=False) + "\n")
    _show(found)
    return int(found.exit_code)


def _show(found: Any) -> None:
    rows = [[found.reference.cpu, "-", f"{found.reference.nll:.4f}", "-", "-"]]
    for answer in found.answers:
        same = f"{answer.same_tokens} of {len(found.reference.tokens)}"
        verdict = "differs" if answer.faults else "same"
        rows.append([answer.cpu, same, f"{answer.nll:.4f}", f"{answer.nll_difference:+.4f}", verdict])
    title = f"{found.bundle}, {found.bits} bit, {len(found.text)} tokens of text"
    print_table(title, ["CPU", "same greedy tokens", "NLL", "difference", "verdict"], rows)
    for answer in found.answers:
        for fault in answer.faults:
            click.echo(f"  {answer.cpu}: {fault}")
    click.echo("  speeds are null: an emulator's times say nothing of a board")

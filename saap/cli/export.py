"""``saap export``: a model directory to a bundle or a GGUF file, and what a bundle holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from export.options import ExportOptions
from saap.base.errors import UserError
from saap.base.options import changed_in
from saap.cli.console import LOADING, Console, print_table, tell
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import complete_model, directory, force

if TYPE_CHECKING:
    from export.gguf.write import GGUFReport


@click.command(cls=OptionsCommand)
@click.argument("model", shell_complete=complete_model)
@options_of(ExportOptions)
@click.option("-o", "--out", type=directory, help="The bundle (or the .gguf file) to write.")
@click.option("--inspect", is_flag=True, help="Write nothing: show what is in the bundle MODEL.")
@click.option("--json", "as_json", is_flag=True, help="With --inspect, for machines.")
@force
def export(model: str, out: Path | None, inspect: bool, as_json: bool, options: ExportOptions) -> None:
    """Write a model (directory, GGUF file or name) as a bundle, with parity checked; or look into a bundle.

    \b
    Example:
      saap export out/tuned -o out/bundle
      saap export smollm2-135m -o out/dense
      saap export out/slim -o out/slim.gguf --target gguf --bits 8
      saap export --inspect out/bundle
    """
    if inspect:
        flags = ["-o"] if out else []
        flags += [setting.flag for setting, _ in changed_in(options)]
        if flags:
            raise UserError(f"--inspect writes nothing, so {flags[0]} has no effect: leave one of them out")
        show_inside(Path(model), as_json)
        return
    if as_json:
        raise UserError("--json is for --inspect: leave it out")
    if out is None:
        raise click.UsageError("give -o OUT, where the bundle should be written, or --inspect to look into one")
    with Console() as console:
        export_model(model, out, options, console)


def show_inside(bundle: Path, as_json: bool) -> None:
    from export.bundle.inspect import inspect_bundle

    report = inspect_bundle(bundle)
    if as_json:
        click.echo(json.dumps(report.document(), indent=1))
        return
    for line in report.lines():
        tell(line)
    for title, columns, rows in report.tables():
        print_table(title, columns, rows)


def export_model(model: str | Path, out: Path, options: ExportOptions, console: Console) -> None:
    from saap.models.resolve import kind_of

    kind_of(model)  # before what takes seconds to import
    options.check()
    console.report(LOADING, 0, 0)
    from export.write import export as write

    result = write(model, options, output=out, progress=console.report)
    console.finish()
    if result.gguf is not None:
        show_gguf(result.gguf)
    elif result.manifest is not None:
        from export.bundle.inspect import summary

        for line in summary(out, result.manifest):
            tell(line)


def show_gguf(report: GGUFReport) -> None:
    tell(
        f"{report.file}: {report.bytes / 1e6:.1f} MB, {report.architecture}, {report.layers} layers, "
        f"{report.kind or 'as tuned'}"
    )
    errors = {"carried over": report.worst_error_carried, "rounded anew": report.worst_error_rounded}
    for what, error in errors.items():
        if error is not None:
            tell(f"  largest relative error of a matrix whose groups were {what}: {error:.2g}")
    for note in report.notes:
        tell(f"  note: {note}")

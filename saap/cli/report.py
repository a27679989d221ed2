"""``saap report``: a page of results or of a run. No torch, no transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from saap.cli.types import directory
from saap.system.errors import UserError


@click.command()
@click.argument("results", type=directory, nargs=-1)
@click.option("-o", "--out", type=directory, required=True, help="The HTML file to write.")
@click.option(
    "--history", type=directory, help="A folder of `saap bench --history`: speeds over time, and their steps."
)
def report(results: tuple[Path, ...], out: Path, history: Path | None) -> None:
    """One self-contained page from files of `saap bench` and `saap eval`, a run's directory, or a history.

    \b
    Example:
      saap report out/demo -o report.html
      saap report bench.json quality.json -o report.html
      saap report --history results/ -o history.html
    """
    if not results and history is None:
        raise click.UsageError("give result files, the directory of a run, or --history FOLDER")
    make_report(list(results), out, history)


def make_report(results: list[Path], out: Path, history: Path | None = None) -> None:
    """A page from files of `saap bench` and `saap eval`, or of a run's directory (``run.json``)."""
    from bench.report import report as write_report

    run: dict[str, Any] | None = None
    paths: list[Path] = []
    for path in results:
        if path.is_dir():
            run = read_run(path)
            paths += [path / name for name in run.get("results", [])]
        else:
            paths.append(path)
    write_report(paths, out, run=run, history=history)
    click.echo(f"wrote {out}")


def read_run(folder: Path) -> dict[str, Any]:
    from saap.system.files import read_object

    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no run.json: give the -o directory of `saap run`, or result files")
    return read_object(path, "run `saap run` again")

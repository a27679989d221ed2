"""The report of results or of a run: no torch, no transformers. Called by :mod:`saap.cli.board_commands` only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from saap.system.errors import UserError
from saap.system.files import read_object


def make_report(results: list[Path], out: Path, history: Path | None = None) -> None:
    """A page from files of `saap bench` and `saap eval`, or of a run's directory (``run.json``)."""
    from bench.report import report

    run: dict[str, Any] | None = None
    paths: list[Path] = []
    for path in results:
        if path.is_dir():
            run = read_run(path)
            paths += [path / name for name in run.get("results", [])]
        else:
            paths.append(path)
    report(paths, out, run=run, history=history)
    click.echo(f"wrote {out}")


def read_run(directory: Path) -> dict[str, Any]:
    """``run.json`` of a run's directory."""
    path = directory / "run.json"
    if not path.is_file():
        raise UserError(f"{directory} holds no run.json: give the -o directory of `saap run`, or result files")
    return read_object(path, "run `saap run` again")

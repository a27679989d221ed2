"""``saap report``: a page of results or of a run. No torch, no transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

import click

from saap.base.documents import Document
from saap.base.errors import UserError
from saap.cli.console import tell
from saap.cli.types import Sections, directory, force


class FinishedStep(TypedDict, total=False):
    """A step of a run that is finished; ``key`` is the hash of what went into it."""

    name: str
    key: str
    seconds: float
    command: str


class DeviceFit(TypedDict):
    """The slim bundle on the device that it was made for; sizes are in bytes."""

    name: str
    fits: bool
    context: int  # tokens
    takes: int  # with that context
    has: int  # that a process may take
    memory: str  # how that is known
    threads: int | None  # where the default, all cores, would be slower


class RunFile(TypedDict, total=False):
    """``run.json``: the steps of a run, and what the page is made of."""

    model: str
    steps: list[FinishedStep]
    results: list[str]
    plan: dict[str, object]
    parity: dict[str, object]
    quality: dict[str, object]
    texts: list[dict[str, object]]
    silence: str  # whether the slim model does not answer any more
    versions: dict[str, str]
    device: DeviceFit
    device_told: str  # the same in a sentence


RUN = Document(RunFile, "run", "run `saap run` again")


@click.command(cls=Sections)
@click.argument("results", type=directory, nargs=-1)
@click.option("-o", "--out", type=directory, required=True, help="The HTML file to write.")
@click.option(
    "--history", type=directory, help="A folder of `saap bench --history`: speeds over time, and their steps."
)
@force
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
    """Write a page of files of `saap bench` and `saap eval`, or of a run's directory (``run.json``)."""
    from bench.report.page import report as write_report
    from saap.base.outputs import PAGE, check_place

    check_place(out, PAGE, *results, history)
    run: RunFile | None = None
    paths: list[Path] = []
    for path in results:
        if path.is_dir():
            if run is not None:
                raise UserError(f"{path} is a second directory of a run, and a page tells of one: give one of them")
            run = read_run(path)
            paths += [path / name for name in run.get("results", [])]
        else:
            paths.append(path)
    write_report(paths, out, run=run, history=history)
    tell(f"wrote {out}")


def read_run(folder: Path) -> RunFile:
    from export.bundle.manifest import inside

    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no run.json: give the -o directory of `saap run`, or result files")
    run = RUN.read(path)
    if strange := [name for name in run.get("results", []) if inside(folder, name) is None]:
        raise UserError(f"{path} names {strange[0]!r}, which lies outside the run's directory: do not use it")
    return run

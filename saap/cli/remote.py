"""``saap bench --on``: boards are measured at once, shown one after the other and then side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from saap.cli.bench import NOTHING_MEASURED, PLAN, STDOUT, keep, show_reasons, show_result
from saap.cli.console import Console, print_table
from saap.system.errors import UserError
from saap.system.files import read_object
from saap.system.interrupt import ended_as_by_a_person


def bench_on_step(specs: list[str], urls: tuple[str, ...], options: dict[str, Any], console: Console) -> int:
    """Measure on boards; the exit code: 2 when one of them could not be used."""
    from bench.measure.options import BenchOptions
    from bench.remote import BoardOptions, bench_on

    board_options = BoardOptions(options["wheels"], options["board_packages"])
    board_options.check()
    _check(urls, options)
    quality = read_object(options["quality"], "write it with `saap eval --json`") if options["quality"] else None
    with ended_as_by_a_person():
        answers = bench_on(
            urls,
            [*specs, *specs[: int(options["noise_floor"])]],
            BenchOptions(**{name: options[name] for name in PLAN}),
            board_options,
            progress=console.report,
            say=console.say,
        )
    console.finish()
    if len(answers) == 1 and answers[0].error is not None:
        raise answers[0].error
    measured = {a.url: replace(a.result, quality=quality) for a in answers if a.result is not None}
    places = _places(options["json_path"], [answer.url for answer in answers])
    for url, result in measured.items():
        _show(url, result, options, several=len(answers) > 1)
        keep(result, places[url], options["history"])
    if len(measured) > 1 and not options["form"]:
        _side_by_side(measured)
    failed = [answer.error for answer in answers if answer.error is not None]
    for error in failed:
        click.echo(f"saap: {error}", err=True)
    if failed:
        return UserError.exit_code
    return 0 if any(m.samples for r in measured.values() for m in r.measurements) else NOTHING_MEASURED


def _check(urls: tuple[str, ...], options: dict[str, Any]) -> None:
    if len(urls) > 1 and options["form"] == "csv":
        raise UserError("--format csv is of one board: give md, or --json FILE")


def _show(url: str, result: Any, options: dict[str, Any], several: bool) -> None:
    from bench.report.tables import formatted
    from devices.transport import printable

    if several and options["form"] in (None, "md"):
        board = result.device.get("board") or result.device.get("cpu_model") or "unknown board"
        click.echo(f"### {url}: {printable(board)}\n")
    if options["form"]:
        click.echo(formatted(result, options["form"]), nl=False)
        show_reasons(result, to_stderr=True)
    else:
        show_result(result, noise_floor=options["noise_floor"])


def _places(path: Path | None, urls: Sequence[str]) -> dict[str, Path | None]:
    """One document per board: ``result.json`` becomes ``result.pi-board.json``; never two in one file."""
    if path is None or path == STDOUT or len(urls) < 2:
        return dict.fromkeys(urls, path)
    labels = {url: _label(url.partition("://")[2]) or _label(url) for url in urls}
    found: dict[str, Path | None] = {}
    for number, (url, label) in enumerate(labels.items(), 1):
        unique = label if [*labels.values()].count(label) == 1 else f"{_label(url)}-{number}"
        found[url] = path.with_name(f"{path.stem}.{unique}{path.suffix}")
    return found


def _label(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _side_by_side(measured: dict[str, Any]) -> None:
    from bench.report.tables import main_table

    tables = {url: main_table(result) for url, result in measured.items()}
    columns = list(dict.fromkeys(column for table in tables.values() for column in table.header))
    rows = []
    for url, table in tables.items():
        for row in table.rows:
            cells = dict(zip(table.header, row, strict=True))
            rows.append([url, *(cells.get(column, "-") for column in columns)])
    print_table("side by side", ["board", *columns], rows)

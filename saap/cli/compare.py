"""``saap compare`` of two documents of ``saap eval --json``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from saap.cli.console import print_table, shown
from saap.system.errors import UserError
from saap.system.json_files import write_document


def compare_quality_step(old: str, new: str, both: bool, options: dict[str, Any]) -> int:
    """Show what became better or worse; the exit code."""
    from bench.judge.quality import compare_quality, exit_code, read_quality

    if not both:
        raise UserError(f"{old} and {new} do not compare: one is of `saap eval`, the other is not; give two of a kind")
    if options["junit"]:
        raise UserError("--junit is for speeds: use --json for qualities")
    rows = compare_quality(read_quality(old), read_quality(new))
    pairs = {row.models: None for row in rows}
    for models in pairs:
        cells = [_cells(row) for row in rows if row.models == models]
        title = " -> ".join(dict.fromkeys(models))
        print_table(title, ["measure", "pairs", "old", "new", "difference", "95 %", "verdict"], cells)
    for row in rows:
        if row.reason:
            click.echo(shown(f"  {row.measure}: {row.reason}"))
    if options["json_path"] is not None:
        document = {"kind": "saap-quality-comparison", "version": 1, "rows": [asdict(row) for row in rows]}
        if str(options["json_path"]) == "-":
            import json

            click.echo(json.dumps(document))
        else:
            write_document(Path(options["json_path"]), document)
    return exit_code(rows, options["fail_on"] == "regression")


def _cells(row: Any) -> list[str]:
    if row.difference is None:
        return [row.measure, "-", "-", "-", "-", "-", row.verdict]
    unit = 1 if row.measure == "NLL" else 100
    sign = "" if unit == 1 else " %"
    digits = 4 if unit == 1 else 2
    values = [f"{value * unit:.{digits}f}{sign}" for value in (row.old, row.new)]
    changes = [f"{value * unit:+.{digits}f}" for value in (row.difference, row.low, row.high)]
    return [row.measure, str(row.pairs), *values, changes[0], f"{changes[1]} to {changes[2]}", row.verdict]

"""``saap compare`` of two documents of ``saap eval --json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from saap.cli.console import print_table, shown
from saap.system.errors import UserError
from saap.system.files import write_document


def compare_quality_step(old: str, new: str, both: bool, options: dict[str, Any]) -> int:
    """Show what became better or worse; the exit code."""
    from bench.judge.quality import compare_quality, exit_code, read_quality
    from bench.report.verdicts import QUALITY, quality_json, verdict_table

    if not both:
        raise UserError(f"{old} and {new} do not compare: one is of `saap eval`, the other is not; give two of a kind")
    if options["junit"]:
        raise UserError("--junit is for speeds: use --json for qualities")
    rows = compare_quality(read_quality(old), read_quality(new))
    pairs = dict.fromkeys((row.against, row.name) for row in rows)
    for pair in pairs:
        table = verdict_table([row for row in rows if (row.against, row.name) == pair], QUALITY)
        print_table(" -> ".join(filter(None, pair)), table.header, table.rows)
    for row in rows:
        if row.reason:
            click.echo(shown(f"  {row.what}: {row.reason}"))
    if options["json_path"] is not None:
        document = quality_json(rows)
        if str(options["json_path"]) == "-":
            import json

            click.echo(json.dumps(document))
        else:
            write_document(Path(options["json_path"]), document)
    return exit_code(rows, options["fail_on"] == "regression")

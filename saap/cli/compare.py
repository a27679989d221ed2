"""``saap compare``: two results, two bundles or two qualities."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click
from msgspec import Meta

from bench.measure.options import BenchOptions
from saap.base.errors import UserError
from saap.base.files import write_text
from saap.base.options import Option, Part, refuse_unused
from saap.base.values import parse_pair
from saap.cli.bench import STDOUT, check_ending, check_turns, show_reasons, verify_models
from saap.cli.console import Console, print_table, tell
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import directory, force

if TYPE_CHECKING:
    from bench.judge.comparison import Comparison
    from bench.judge.confirm import Measure

LENGTHS = ("prompt", "generate", "depth", "threads")
MEASURED = (*LENGTHS, "repetitions", "precision", "max_time_s", "ratio_time_s", "timeout_s")
SUMMARY = "GITHUB_STEP_SUMMARY"  # names the file that a workflow shows as the step's summary


@dataclass(frozen=True)
class CompareCommand:
    """The options of ``saap compare``: how two bundles are measured, and what counts."""

    options: Annotated[BenchOptions, Part(MEASURED)] = field(default_factory=BenchOptions)
    min_effect: Annotated[float, Option("Smallest change that counts."), Meta(gt=0, lt=1)] = 0.02
    fail_on: Annotated[
        Literal["regression"] | None, Option("Exit with 1 when something became slower, 3 when that cannot be told.")
    ] = None
    confirm: Annotated[bool, Option("Measure again before it says slower.")] = True
    pair: Annotated[
        tuple[str, str] | None,
        Option(
            "Compare these two of the documents' models, whose names differ.",
            flags=("--as",),
            metavar="OLD=NEW",
            parse=parse_pair,
        ),
    ] = None
    junit: Annotated[Path | None, Option("Write JUnit XML here.")] = None

    def check(self, *, of: str) -> None:
        """Refuse what has no effect on a comparison ``of`` qualities, results or bundles."""
        from bench.judge.comparison import LEAST_REPETITIONS

        if of == "qualities":
            refuse_unused(self, (*MEASURED, "min_effect", "confirm", "junit"), "speeds, and these are qualities")
        elif of == "results":
            refuse_unused(self, LENGTHS, "bundles, and results have theirs")
            if not self.confirm:
                refuse_unused(self, MEASURED, "a second run, which --no-confirm leaves out")
        check_ending(self, repetitions := self.options.repetitions)
        if of == "bundles":
            check_turns(self, self.options)
            refuse_unused(self, ("pair",), "documents, and these are bundles")
        if repetitions is not None and repetitions < LEAST_REPETITIONS:
            raise UserError(f"--repetitions {repetitions} tell no difference: give {LEAST_REPETITIONS} or more")


@click.command(cls=OptionsCommand)
@click.argument("old")
@click.argument("new")
@options_of(CompareCommand)
@click.option("--json", "json_path", type=directory, help="Write the verdicts here; - prints them.")
@force
def compare(old: str, new: str, json_path: Path | None, options: CompareCommand) -> None:
    """Is NEW faster or slower, or better or worse, than OLD? Exit 3 when they do not compare.

    Both are results of `saap bench --json` (or folders of `--history`: several runs tell how much runs differ), or both
    are bundles, which are then measured, interleaved. A regression is measured a second time before it is said, and so
    is what results cannot tell of bundles that are still there. In a GitHub workflow the table also goes to the step's
    summary. Two documents of `saap eval --json` are compared answer by answer, and only where they are of the same
    protocol and the same examples.

    \b
    Example:
      saap compare before.json after.json --fail-on regression
      saap compare out/demo/dense-int4 out/demo/slim-int4 -t 1
      saap compare flap-quality.json saap-quality.json
    """
    from bench.judge.comparison import compare as compare_results
    from bench.judge.comparison import only, runs_of
    from bench.judge.confirm import compare_live, confirm_files
    from bench.judge.quality import is_quality
    from bench.report.verdicts import comparison_json
    from saap.base.interrupt import ended_as_by_a_person
    from saap.base.outputs import JUNIT, QUALITIES, SPEEDS, check_place

    for spec in (old, new):
        if spec.endswith(".json") and not Path(spec).exists():
            raise UserError(
                f"there is no {spec}: give a file of `saap bench --json` or `saap eval --json`, or a bundle"
            )
    qualities = [is_quality(spec) for spec in (old, new)]
    check_place(json_path, QUALITIES if any(qualities) else SPEEDS, old, new)
    check_place(options.junit, JUNIT, old, new)
    if any(qualities):
        sys.exit(compare_qualities(old, new, all(qualities), options, json_path))
    console, minimum, plan, live = Console.of_command(), options.min_effect, options.options, None
    files = [_is_result(spec) for spec in (old, new)]
    options.check(of="results" if all(files) else "bundles")
    if all(files):
        before, after = options.pair or (None, None)
        olds, news = only(runs_of(old), before), only(runs_of(new), after)
        comparison = compare_results(olds, news, minimum)
        if options.confirm and (comparison.regressed or comparison.open):
            with ended_as_by_a_person():
                comparison = confirm_files(comparison, olds, news, plan, measuring(console)).comparison
    elif any(files):
        raise UserError(f"{old} and {new} do not compare: give two results of `saap bench --json`, or two bundles")
    else:
        verify_models([old, new])
        with ended_as_by_a_person():
            live = compare_live([old, new], plan, measuring(console), minimum, confirm=options.confirm)
        comparison = live.comparison
    console.finish()
    _write_verdicts(comparison, options, json_path)  # first: a terminal may be gone
    if live is not None:
        show_reasons(live.results[-1])
    show_comparison(comparison)
    if json_path == STDOUT:
        click.echo(json.dumps(comparison_json(comparison), allow_nan=False))
    sys.exit(comparison.exit_code(options.fail_on == "regression"))


def measuring(console: Console) -> Measure:
    """Return the bench, whose progress the console shows."""
    from bench.measure import measure

    return lambda specs, plan, names: measure(specs, plan, names=names, progress=console.report)


def _is_result(spec: str) -> bool:
    """Tell a file, there or not, or a folder of results from a spec of something to measure."""
    path = Path(spec)
    if path.is_dir():
        model = any((path / name).exists() for name in ("bundle.json", "config.json"))
        return not model and any(path.glob("*.json"))
    return path.suffix != ".gguf" and (path.is_file() or (path.suffix in (".json", ".jsonl") and not path.exists()))


def show_comparison(comparison: Comparison) -> None:
    from bench.report.verdicts import LEAST, SPEED, sentence, verdict_table

    table = verdict_table(comparison.rows, SPEED)
    print_table("new against old", table.header, table.rows, LEAST)
    for row in comparison.rows:
        if row.reason or row.confirmed:
            tell(f"  {row.label}, {row.setting}: {row.reason or sentence(row)}")


def _write_verdicts(comparison: Comparison, asked: CompareCommand, json_path: Path | None) -> None:
    from bench.report.verdicts import comparison_json, comparison_junit, step_summary

    if asked.junit is not None:
        write_text(asked.junit, comparison_junit(comparison))
    if summary := os.environ.get(SUMMARY):
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(step_summary(comparison))
    if json_path not in (None, STDOUT):
        write_text(json_path, json.dumps(comparison_json(comparison), allow_nan=False) + "\n")


def compare_qualities(old: str, new: str, both: bool, asked: CompareCommand, json_path: Path | None) -> int:
    """Show what became better or worse; the exit code."""
    from bench.judge.quality import compare_quality, exit_code, read_quality
    from bench.report.verdicts import LEAST, QUALITY, quality_json, verdict_table
    from saap.base.writing import write_document

    if not both:
        raise UserError(f"{old} and {new} do not compare: one is of `saap eval`, the other is not; give two of a kind")
    asked.check(of="qualities")
    rows = compare_quality(read_quality(old), read_quality(new), asked.pair)
    document = quality_json(rows)
    if json_path not in (None, STDOUT):
        write_document(json_path, document)
    pairs = dict.fromkeys((row.against, row.name) for row in rows)
    for pair in pairs:
        table = verdict_table([row for row in rows if (row.against, row.name) == pair], QUALITY)
        print_table(" -> ".join(filter(None, pair)), table.header, table.rows, LEAST)
    for row in rows:
        if row.reason:
            tell(f"  {row.what}: {row.reason}")
    if json_path == STDOUT:
        click.echo(json.dumps(document))
    return exit_code(rows, asked.fail_on == "regression")

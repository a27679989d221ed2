"""``saap bench`` and ``saap compare`` on the command line: what is asked, measured, printed and kept."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from devices.common.files import write_text
from saap.cli.compare import compare_quality_step
from saap.cli.console import Console, print_table
from saap.system.errors import UserError
from saap.system.files import read_object
from saap.system.interrupt import ended_as_by_a_person

if TYPE_CHECKING:
    from bench.judge.comparison import Comparison

STDOUT = Path("-")
SUMMARY = "GITHUB_STEP_SUMMARY"  # names the file that a workflow shows as the step's summary
NOTHING_MEASURED = 3
PLAN = (
    "prompt", "generate", "depth", "threads", "pairs", "repetitions", "precision", "max_time_s", "timeout_s", "seed",
    "provider", "cuda_graph", "cool_down_s", "cold",
)  # fmt: skip


def bench_step(specs: list[str], options: dict[str, Any], console: Console) -> int:
    """``saap bench``; the exit code."""
    from bench.measure.options import BenchOptions
    from bench.report.tables import formatted

    quality = read_object(options["quality"], "write it with `saap eval --json`") if options["quality"] else None
    plan = BenchOptions(**{name: options[name] for name in PLAN})
    result = measured([*specs, *specs[: int(options["noise_floor"])]], plan, console)
    result = replace(result, quality=quality)
    if options["form"]:
        click.echo(formatted(result, options["form"]), nl=False)
        show_reasons(result, to_stderr=True)
    else:
        show_result(result, noise_floor=options["noise_floor"])
    keep(result, options["json_path"], options["history"])
    return 0 if any(m.samples for m in result.measurements) else NOTHING_MEASURED


def measured(specs: list[str], plan: Any, console: Console, names: list[str] | None = None) -> Any:
    """The result of a bench run, with its progress shown."""

    from bench.measure import measure

    verify_models(specs)
    with ended_as_by_a_person():
        result = measure(specs, plan, names=names, progress=console.report)
    console.finish()
    return result


def verify_models(specs: list[str]) -> None:
    """Hold the files of directories for torch against their hashes: within a run that would count as loading."""
    from saap.models.integrity import check_directory

    for spec in specs:
        if spec.startswith("torch:"):
            check_directory(spec.removeprefix("torch:"))


def keep(result: Any, json_path: Path | None, history: Path | None = None) -> None:
    """Write the result where it was asked for."""
    from bench.measure.result import result_text, write_result

    if history is not None:
        from bench.report.history import add

        add(history, result)
    if json_path == STDOUT:
        click.echo(result_text(result))
    elif json_path is not None:
        write_result(json_path, result)


def show_result(result: Any, noise_floor: bool = False) -> None:
    """The tables of a bench result, the reasons behind a status, and each spec against the first."""
    from bench.report.tables import detail_table, energy_notes, main_table

    counts = sorted({len(m.samples) for m in result.measurements})
    runs = "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    first = result.measurements[0]
    several = len({m.key[1:4] for m in result.measurements}) > 1
    what = "" if several else f"{first.test}, "
    for table, title in ((main_table(result), f"{what}medians of {runs} interleaved runs"), (detail_table(result), "")):
        print_table(title, table.header, table.rows)
    for note in energy_notes(result):
        click.echo(f"  {note}")
    show_reasons(result)
    names = list(dict.fromkeys(m.name for m in result.measurements))
    floor = _noise_floor(result, names) if noise_floor else None
    for other in names[1:]:
        _show_against(result, names[0], other, floor)


def show_reasons(result: Any, to_stderr: bool = False) -> None:
    """Why a measurement is WARN or INVALID, and what a worker that failed wrote last."""
    for m in result.measurements:
        for reason in m.reasons:
            click.echo(f"  {m.name}, {m.test}: {m.status}: {reason}", err=to_stderr)
        for line in m.stderr[:-1]:
            click.echo(f"    | {line}", err=to_stderr)


def _show_against(result: Any, base: str, other: str, floor: float | None) -> None:
    from bench.judge.comparison import compare_within

    for row in compare_within(result, base, other).rows:
        if row.ratio is None or not row.low or not row.high:
            click.echo(f"  {other}, {row.setting}: not comparable with {base}: {row.reason}")
            continue
        speed = f"{1 / row.ratio:.3f}x as fast as {base} (95 %: {1 / row.high:.3f} to {1 / row.low:.3f})"
        within = floor is not None and abs(row.ratio - 1) <= floor
        verdict = "within the noise floor" if within else row.reason or row.verdict
        threads = f"{row.n_threads} thread{'s' * (row.n_threads > 1)}"
        click.echo(f"  {other}, {row.setting}, {threads}: {row.what} {speed}: {verdict}")


def _noise_floor(result: Any, names: list[str]) -> float | None:
    """Say how far the first spec is from itself; it was measured twice, the second time under the last name."""
    from bench.judge.comparison import CompareError, noise_floor

    try:
        floor = noise_floor(result, names[0], names[-1])
    except CompareError as error:
        click.echo(f"  {error}")
        return None
    click.echo(f"  noise floor: {names[0]} against itself is within {floor:.1%} (95 %)")
    return floor


def compare_step(old: str, new: str, options: dict[str, Any], console: Console) -> int:
    """``saap compare``; the exit code."""
    from bench.judge.comparison import compare
    from bench.judge.confirm import compare_live, confirm_files
    from bench.judge.quality import is_quality
    from bench.measure.options import BenchOptions
    from bench.measure.result import read_result

    if any(qualities := [is_quality(spec) for spec in (old, new)]):
        return compare_quality_step(old, new, all(qualities), options)
    files = [_is_result(spec) for spec in (old, new)]
    minimum, fail = options["min_effect"], options["fail_on"] == "regression"
    plan = BenchOptions(**{name: options[name] for name in PLAN if name in options})
    if all(files):
        results = read_result(old), read_result(new)
        comparison = compare(*results, minimum)
        if options["confirm"] and comparison.regressed:
            with ended_as_by_a_person():
                comparison = confirm_files(comparison, *results, plan, progress=console.report).comparison
    elif any(files):
        raise UserError(f"{old} and {new} do not compare: give two results of `saap bench --json`, or two bundles")
    else:
        verify_models([old, new])
        with ended_as_by_a_person():
            live = compare_live([old, new], plan, minimum, confirm=options["confirm"], progress=console.report)
        comparison = live.comparison
        show_reasons(live.results[-1])
    console.finish()
    show_comparison(comparison)
    _write_verdicts(comparison, options)
    return int(comparison.exit_code(fail))


def _is_result(spec: str) -> bool:
    """A file, there or not, and not a spec of something to measure."""
    path = Path(spec)
    return path.suffix != ".gguf" and (path.is_file() or (path.suffix in (".json", ".jsonl") and not path.exists()))


def show_comparison(comparison: Comparison) -> None:
    """One row per name and setting, and the reasons."""
    from bench.report.verdicts import SPEED, sentence, verdict_table

    table = verdict_table(comparison.rows, SPEED)
    print_table("time, new / old", table.header, table.rows)
    for row in comparison.rows:
        if row.reason or row.confirmed:
            click.echo(f"  {row.label}, {row.setting}: {row.reason or sentence(row)}")


def _write_verdicts(comparison: Comparison, options: dict[str, Any]) -> None:
    from bench.report.verdicts import comparison_json, comparison_junit, step_summary

    if options["junit"] is not None:
        write_text(options["junit"], comparison_junit(comparison))
    if summary := os.environ.get(SUMMARY):
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(step_summary(comparison))
    if options["json_path"] is not None:
        document = json.dumps(comparison_json(comparison), allow_nan=False)
        if options["json_path"] == STDOUT:
            click.echo(document)
        else:
            write_text(options["json_path"], document + "\n")

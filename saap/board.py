"""Commands that run on a board: no torch, no transformers. Called by :mod:`saap.cli` only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from saap.console import Console, print_table
from saap.errors import SaapError
from saap.json_files import read_object


def bench_specs(
    specs: list[str],
    *,
    prompt: int,
    generate: int,
    threads: int | None,
    repetitions: int,
    json_path: Path | None,
    console: Console,
    names: list[str] | None = None,
    show: bool = True,
) -> None:
    """Measure, print the table and the comparison with the first spec, and write the result."""
    from bench.run import bench
    from bench.store import write_result

    result = bench(
        specs, prompt=prompt, generate=generate, threads=threads, repetitions=repetitions, names=names,
        progress=console.report,
    )  # fmt: skip
    console.finish()
    if json_path is not None:
        write_result(json_path, result)
    if show:
        show_result(result)


def show_result(result: Any) -> None:
    """The table of a bench result, the reasons behind a status, and each spec against the first."""
    from bench.compare import compare_within
    from bench.table import TABLE_HEADER, table_rows, table_text

    first = result.measurements[0]
    title = f"{first.n_prompt} prompt + {first.n_gen} generated tokens, median of {len(first.samples)} interleaved runs"
    print_table(title, list(TABLE_HEADER), table_text(result))
    for row in table_rows(result):
        for reason in row["reasons"]:
            click.echo(f"  {row['name']}: {row['status']}: {reason}")
    for other in result.measurements[1:]:
        for against in compare_within(result, first.name, other.name).rows:
            if against.ratio is None:
                click.echo(f"  {against.name}: not comparable with {first.name}: {against.reason}")
            else:
                low, high = (1 / against.high, 1 / against.low) if against.low and against.high else (float("nan"),) * 2
                speed = f"{1 / against.ratio:.2f}x as fast as {first.name} (95 %: {low:.2f} to {high:.2f})"
                click.echo(f"  {against.name} decodes {speed}")


def compare_results(old: Path, new: Path, min_effect: float, fail_on_regression: bool) -> int:
    """Print one row per name; the exit code."""
    from bench.compare import compare
    from bench.store import read_result

    comparison = compare(read_result(old), read_result(new), min_effect)
    rows = []
    for row in comparison.rows:
        interval = f"{row.low:.3f} to {row.high:.3f}" if row.low is not None and row.high is not None else "-"
        rows.append([row.name, str(row.n_threads), f"{row.ratio:.3f}" if row.ratio else "-", interval, row.verdict])
    print_table("time per token, new / old", ["name", "threads", "ratio", "95 %", "verdict"], rows)
    for row in comparison.rows:
        if row.reason:
            click.echo(f"  {row.name}: {row.reason}")
    return int(comparison.exit_code(fail_on_regression))


def list_devices() -> None:
    """Names and titles of all profiles."""
    from devices.profile import load_profiles

    rows = [[name, profile.title] for name, profile in sorted(load_profiles().items())]
    print_table("devices", ["name", "board"], rows)


def show_device(name: str) -> None:
    """All facts of one profile."""
    from devices.profile import load_profile

    profile = load_profile(name)
    rows = [[fact, *(str(v) for v in (n.value, n.unit, n.level, n.source))] for fact, n in profile.numbers.items()]
    print_table(profile.title, ["fact", "value", "unit", "level", "source"], rows)


def probe_host(as_json: bool) -> None:
    """What this host is, for people or machines."""
    from devices.probe import probe

    facts = probe()
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    rows = [
        [key, "unknown" if v is None else ", ".join(map(str, v)) if isinstance(v, list) else str(v)]
        for key, v in facts.items()
    ]
    print_table("this host", ["fact", "value"], rows)


def make_report(results: list[Path], out: Path) -> None:
    """A page from result files, or from a run's directory (``run.json`` and its bench results)."""
    from bench.report import write_report

    run: dict[str, Any] | None = None
    paths: list[Path] = []
    for path in results:
        if path.is_dir():
            run = read_run(path)
            paths += [path / name for name in run.get("results", [])]
        else:
            paths.append(path)
    write_report(paths, out, run=run)
    click.echo(f"wrote {out}")


def read_run(directory: Path) -> dict[str, Any]:
    """``run.json`` of a run's directory."""
    path = directory / "run.json"
    if not path.is_file():
        raise SaapError(f"{directory} holds no run.json: give the -o directory of `saap run`, or result files")
    return read_object(path, "run `saap run` again")

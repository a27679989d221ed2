"""Commands that run on a board: no torch, no transformers. Called by :mod:`saap.cli` only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from saap.console import print_table
from saap.errors import SaapError
from saap.json_files import read_object


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


def make_report(results: list[Path], out: Path, history: Path | None = None) -> None:
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
    write_report(paths, out, run=run, history=history)
    click.echo(f"wrote {out}")


def read_run(directory: Path) -> dict[str, Any]:
    """``run.json`` of a run's directory."""
    path = directory / "run.json"
    if not path.is_file():
        raise SaapError(f"{directory} holds no run.json: give the -o directory of `saap run`, or result files")
    return read_object(path, "run `saap run` again")

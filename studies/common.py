"""Cells, the tables of a README, and the origin of numbers, shared by the studies.

A study is a folder with README.md (the answer first), study.py and cells/ (the measurements, one JSON document each).
The tables in a README stand between markers and are made from the cells:

    python -m studies.NAME.study table            # print them
    python -m studies.NAME.study table --write    # put them into the README
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.measure.result import Result

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("saap", "torch", "transformers", "onnxruntime")
Cell = dict[str, Any]
METHODS = {
    "saap": "SAAP", "flap": "FLAP", "wanda_sp": "Wanda-sp", "param_mix": "LLM-Pruner param_mix",
    "vector": "LLM-Pruner vector", "shortgpt": "ShortGPT",
}  # fmt: skip
_TABLE = re.compile(r"(?P<start><!-- table: (?P<name>[\w-]+) -->\n).*?(?P<end>\n?<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Bar:
    """A check with its bar, its measurement, and whether it is reached; None: not measured."""

    check: str
    bar: str
    measured: str
    reached: bool | None


def bar_table(bars: Iterable[Bar]) -> str:
    """Bars as a table."""
    words = {True: "reached", False: "**not reached**", None: "-"}
    return markdown(["check", "bar", "measured", ""], ([b.check, b.bar, b.measured, words[b.reached]] for b in bars))


def read_cells(folder: Path) -> list[Cell]:
    """The JSON documents of a folder, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def provenance() -> dict[str, Any]:
    """Return the origin of a new cell: commit, machine, versions, command and date."""
    return {
        "commit": commit_of(ROOT),
        "machine": _machine(),
        "versions": {name: number for name in PACKAGES if (number := _version(name))},
        "command": ["python", "-m", _module(), *map(_without_home, sys.argv[1:])],
        "date": time.strftime("%Y-%m-%d"),
    }


def commit_of(checkout: Path) -> str | None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=checkout)
    return head.stdout.strip() or None


def saap(*words: object) -> None:
    """Run a command of saap to its end; CalledProcessError: it failed."""
    subprocess.run([sys.executable, "-m", "saap.cli", *map(str, words)], check=True)


def used_by_saap(
    checkout: Path, python: Path, words: Sequence[str | Path], place: Path, env: Mapping[str, str]
) -> resource.struct_rusage:
    """Run a command of another checkout's saap in ``place``, without its output; return the resources it used.

    Raises RuntimeError: it failed.
    """
    with (place / "stderr").open("w+") as errors:
        process = subprocess.Popen(
            [python, "-m", "saap.cli", *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            cwd=place, env={**os.environ, "PYTHONPATH": str(checkout), **env},
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{checkout}: saap {' '.join(map(str, words))}: {errors.read()[-500:]}")
    return used


def markdown(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; None is an empty column."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join("" if c is None else str(c) for c in line) + " |" for line in lines)


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A README with these tables between their markers.

    Raises:
        ValueError: a marker without a table, or a table without a marker.
    """
    marked = [match["name"] for match in _TABLE.finditer(text)]
    if sorted(marked) != sorted(tables):
        raise ValueError(f"the README marks tables {sorted(marked)}, the study makes {sorted(tables)}")
    return _TABLE.sub(lambda match: f"{match['start']}{tables[match['name']]}\n<!-- end -->", text)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_write_option(parser: argparse.ArgumentParser) -> None:
    """`--write` of `table`."""
    parser.add_argument("--write", action="store_true", help="table: into the README instead of to the terminal")


def show_tables(place: Path, tables: Mapping[str, str], write: bool = False) -> None:
    """Print a study's tables, or put them into a page: a file, or the README of a folder."""
    page = place / "README.md" if place.is_dir() else place
    if write:
        page.write_text(with_tables(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
        return
    for name, table in tables.items():
        print(f"{name}\n\n{table}\n")


def decode_over(result: Result, base: str, name: str, digits: int = 2) -> str:
    """Decode of one measurement over another's in pairs, with its 95 % interval.

    The comparison is of times per token, so speeds are one over them.
    """
    from bench.judge.comparison import compare_within
    from bench.measure.result import INVALID

    status = {measurement.name: measurement.status for measurement in result.measurements}.get(name)
    if name == base or status in (None, INVALID):
        return "1" if name == base else status or ""
    (pair,) = compare_within(result, base, name).rows
    if not (pair.ratio and pair.low and pair.high):
        return f"not comparable ({pair.reason})"
    return f"{1 / pair.ratio:.{digits}f} ({1 / pair.high:.{digits}f} to {1 / pair.low:.{digits}f})"


def _without_home(word: str) -> str:
    """A word of a command without the folders of the machine that ran it: of an absolute path its last name."""
    name, equals, path = word.rpartition("=")
    return f"{name}{equals}{Path(path).name}" if path.startswith("/") else word


# What of a CPU's instructions decides about speed here, by flags of /proc/cpuinfo: a name, best first.
ISA = (("amx_int8", "AMX"), ("avx512_bf16", "AVX512-BF16"), ("avx512_vnni", "AVX512-VNNI"), ("avx_vnni", "AVX-VNNI"),
       ("avx512f", "AVX512"), ("avx2", "AVX2"))  # fmt: skip


def cpu_of(machine: str) -> str:
    """The CPU of a cell's ``machine`` and what it can do, as ``AMD EPYC, AVX2``."""
    names = [name for flag, name in ISA if flag in machine]
    shown = [name for name in names if name not in ("AVX512", "AVX2")] or names[:1]
    return ", ".join([machine.split(" (")[0], *shown])


def _machine() -> str:
    from devices.probe.host import probe

    device = probe()
    return f"{device.get('cpu_model') or platform.machine()} ({device.get('isa') or platform.machine()})"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).stem

"""The size of each extra: packages, megabytes, seconds.

    python -m studies.install.study run [--rows bench]     # a fresh environment each, removed at the end; minutes
    python -m studies.install.study table [--write]        # --write: also into docs/install.md

An environment of `python -m venv` lies in a temporary folder; `pip install` of this checkout goes into it without pip's
cache, so that every package is downloaded, except those that pip finds in a local folder (`pip config get
global.find-links`). Megabytes are of `site-packages`, pip and setuptools not counted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if sys.version_info < (3, 11):
    import tomli as tomllib
else:
    import tomllib

from studies.common import ROOT, add_write_option, markdown, parser_of, provenance, read_cells, show_tables

HERE = Path(__file__).resolve().parent
CELLS = HERE / "cells"
BASE = "(none)"
VENVS = ("pip", "setuptools", "pkg_resources", "_distutils_hack")  # what a fresh environment holds
FOR = {
    BASE: "`devices`, `compare` without a page",
    "bench": "a board: generate, bench, compare, report",
    "prune": "prune, tune, eval",
    "export": "all of it: run, export",
    "tasks": "zero-shot tasks",
    "optimum": "optimum as a peer",
    "llama-cpp": "llama.cpp as an engine of a bundle, and as a peer",
    "openvino": "OpenVINO as an engine of a bundle, and as a peer",
    "gpu": "memory and clocks of NVIDIA GPUs",
    "labgrid": "boards of a farm",
    "dev": "tests and lint",
}
Cell = dict[str, Any]


def direct(extra: str) -> set[str]:
    """Names of what the base and the extra ask for themselves, whatever Python; an extra of ours adds its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def names(requirements: list[str]) -> set[str]:
        listed: set[str] = set()
        for text in requirements:
            match = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", text)
            assert match, text
            if match[1] == project["name"]:
                listed = listed.union(*(names(extras[each]) for each in match[2].split(",")))
            else:
                listed.add(match[1])
        return listed

    return names(project["dependencies"]) | (set() if extra == BASE else names(extras[extra]))


def megabytes(folder: Path, without: tuple[str, ...] = VENVS) -> float:
    """Sum the sizes of the files there that are not in folders of these packages."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    kept = [path for path in files if not path.relative_to(folder).parts[0].startswith(without)]
    return sum(path.stat().st_size for path in kept) / 1e6


def installed(extra: str) -> Cell:
    """A fresh environment with this extra."""
    requirement = str(ROOT) if extra == BASE else f"{ROOT}[{extra}]"
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        python = Path(place) / "bin" / "python"
        begun = time.monotonic()
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-cache-dir", requirement], check=True)
        seconds = time.monotonic() - begun
        (site,) = Path(place).glob("lib/python*/site-packages")
        listing = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True)
        packages = {each["name"]: each["version"] for each in json.loads(listing.stdout)}
        return {
            "extra": extra,
            "seconds": seconds,
            "megabytes": megabytes(site),
            "packages": {name: packages[name] for name in packages if name not in ("pip", "setuptools", "saap")},
        }


def tables() -> dict[str, str]:
    cells = {cell["extra"]: cell for cell in read_cells(CELLS)}
    heads = ["extra", "for", "direct dependencies", "all packages", "MB", "seconds"]
    rows = []
    for extra, what in FOR.items():
        cell = cells.get(extra)
        numbers = [len(cell["packages"]), f"{cell['megabytes']:,.0f}", f"{cell['seconds']:.0f}"] if cell else ["-"] * 3
        rows.append([extra if extra == BASE else f"`{extra}`", what, len(direct(extra)), *numbers])
    return {"install": markdown(heads, rows)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--rows", nargs="+", choices=list(FOR), default=list(FOR))
    add_write_option(parser)
    args = parser.parse_args()
    if args.what == "run":
        for extra in args.rows:
            cell = {**provenance(), **installed(extra)}
            name = "base" if extra == BASE else extra
            (CELLS / f"{name}.json").write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
    show_tables(HERE, tables(), args.write)
    if args.write:
        show_tables(ROOT / "docs" / "install.md", tables(), write=True)


if __name__ == "__main__":
    main()

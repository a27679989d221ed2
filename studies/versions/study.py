"""The tests with the oldest and the newest versions of everything, and on every Python found here.

    python -m studies.versions.study run               # all rows, an hour or two; results in cells/versions.json
    python -m studies.versions.study run --rows lowest
    python -m studies.versions.study table [--write]

Rows: `lowest` installs every package at its lower bound of pyproject.toml on the oldest Python; `newest` the newest
that pip finds, transformers 5 included, on the newest Python; `board-3.10` to `board-3.13` install `saap[bench]` alone,
without torch, and run the tests that need no more. Environments lie under out/versions and may be removed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if sys.version_info < (3, 11):
    import tomli as tomllib
else:
    import tomllib

from studies.common import ROOT, add_write_option, markdown, parser_of, provenance, show_tables

HERE = Path(__file__).resolve().parent
PLACE, OUT = ROOT / "out" / "versions", HERE / "cells" / "versions.json"
BOARDS = ("3.10", "3.11", "3.12", "3.13")
TESTERS = ("pytest", "hypothesis", "hatchling", "packaging")
BUNDLES_OF_TESTS = ("onnx",)  # makes them; a board only runs them
MORE = "torch|transformers|tiny_model|tiny_family|real_model|export\\.(write|graph)|onnx_ir|sentencepiece|studies"
NEEDS_MORE = re.compile(rf"\b({MORE})\b")


def lowest() -> list[str]:
    """`name==bound` for every requirement of the project and of the extras that the tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ("bench", "prune", "export", "tasks")
    asked = project["dependencies"] + [r for extra in extras for r in project["optional-dependencies"][extra]]
    pins = {}
    for text in asked:
        found = re.match(r"([A-Za-z0-9_-]+)(?:\[[^]]*\])?>=([0-9.]+)", text)
        if found and found[1] != "saap":
            pins[found[1]] = f"{found[1]}=={found[2]}"
    return sorted(pins.values())


def light_tests() -> list[str]:
    """Test files that name nothing of torch, or of what only makes models."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(p.relative_to(ROOT)) for p in files if not NEEDS_MORE.search(p.read_text(encoding="utf-8"))]


def python_of(wanted: str) -> str | None:
    """An interpreter of that version, on the path or of pyenv."""
    kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"{wanted}.*/bin/python"))
    for found in filter(None, [shutil.which(f"python{wanted}"), *kept]):
        asked = [found, "-c", "import sys; print(sys.executable)"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode == 0:  # a shim of pyenv fails where that version is not chosen
            return done.stdout.strip()
    return None


def environment(name: str, python: str, packages: list[str]) -> Path:
    """A fresh virtual environment with them; its interpreter."""
    place = PLACE / name
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([python, "-m", "venv", place], check=True)
    inside = place / "bin" / "python"
    subprocess.run([inside, "-m", "pip", "install", "-q", "--upgrade", "pip"], check=True)
    subprocess.run([inside, "-m", "pip", "install", "-q", *packages], check=True, cwd=ROOT)
    return inside


def run_row(name: str) -> dict[str, object]:
    """Install and test one row; what it was made of and what pytest said last."""
    version = {"lowest": "3.10", "newest": "3.13"}.get(name) or name.removeprefix("board-")
    python = python_of(version)
    if python is None:
        return {"row": name, "said": f"no Python {version} here"}
    if name == "lowest":
        inside = environment(name, python, ["-e", ".[bench,prune,export,tasks]", *lowest(), *TESTERS])
    elif name == "newest":
        inside = environment(name, python, ["-e", ".[bench,prune,export,tasks]", "transformers>=5", *TESTERS])
    else:
        inside = environment(name, python, ["-e", ".[bench]", *TESTERS, *BUNDLES_OF_TESTS])
    tests = light_tests() if name.startswith("board") else ["tests"]
    began = time.monotonic()
    command = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not device", *tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    frozen = subprocess.run(
        [inside, "-m", "pip", "freeze", "--exclude-editable"], capture_output=True, text=True, check=True
    ).stdout
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    said = (done.stdout.strip().splitlines() or ["nothing"])[-1]
    seconds = round(time.monotonic() - began)
    return {"row": name, "python": version, "said": said, "failed": failed, "seconds": seconds,
            "packages": frozen.splitlines(), **provenance()}  # fmt: skip


def tables() -> dict[str, str]:
    """The table of the README."""
    named = ("torch", "transformers", "onnxruntime")
    lines = []
    for entry in json.loads(OUT.read_text()):
        pins = dict(line.split("==", 1) for line in entry.get("packages", []) if "==" in line)
        packages = ", ".join(f"{name} {pins[name].partition('+')[0]}" for name in named if name in pins)
        said = entry["said"].partition(" in ")[0]
        lines.append([entry["row"], entry.get("python", ""), packages, said, entry.get("date", "")])
    return {"versions": markdown(["row", "Python", "with", "pytest says", "on"], lines)}


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("what", nargs="?", default="run", choices=["run", "table"])
    parser.add_argument("--rows", default=",".join(["lowest", "newest", *(f"board-{v}" for v in BOARDS)]))
    add_write_option(parser)
    given = parser.parse_args(arguments)
    if given.what == "table":
        show_tables(HERE, tables(), given.write)
        return 0
    known = {entry["row"]: entry for entry in json.loads(OUT.read_text())} if OUT.is_file() else {}
    for name in given.rows.split(","):
        known[name] = run_row(name)
        OUT.write_text(json.dumps(list(known.values()), indent=1) + "\n", encoding="utf-8")
        print(f"| {name} | {known[name]['said']} |", flush=True)
    return int(any(known[name].get("failed") for name in given.rows.split(",")))


if __name__ == "__main__":
    sys.exit(main())

"""Feed damaged documents to every parser: nothing but a result or an error of one line, in bounded time and memory.

    python -m studies.fuzz.study run --runs 50000            # of each target, into cells/fuzz.json
    python -m studies.fuzz.study run --only "GGUF header" --runs 1000000
    python -m studies.fuzz.study table [--write]

Each target runs in a process of its own that may take 2 GB. With atheris (`pip install atheris`) three quarters of the
documents are those that it finds by coverage, from the seeds on; the rest, or all, are drawn by mutations.mutated.
A finding is written to out/fuzz/ and ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from studies.common import add_write_option, markdown, parser_of, provenance, show_tables
from studies.fuzz.mutations import mutated
from studies.fuzz.targets import RUN, Target, folder, is_told, targets

HERE = Path(__file__).resolve().parent
OUT, FOUND = HERE / "cells" / "fuzz.json", HERE.parents[1] / "out" / "fuzz"
MEMORY, SLOW_S = 2 << 30, 5.0


class FindingError(Exception):
    """A document that a parser does not handle."""


def once(target: Target, data: bytes) -> float:
    """Feed one document; seconds.

    Raises:
        FindingError: another error than one for a person, or too long.
    """
    began = time.monotonic()
    try:
        target.read(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if not is_told(error):
            raise FindingError(traceback.format_exc()) from None
        if "\n" in str(error):
            raise FindingError(f"more than one line: {error}") from None
    seconds = time.monotonic() - began
    if seconds > SLOW_S:
        raise FindingError(f"took {seconds:.1f} s")
    return seconds


def drawn(target: Target, runs: int, seed: int) -> dict[str, Any]:
    """Documents of our own mutator; what was found, the slowest and the peak of memory."""
    draw, slowest = random.Random(seed), 0.0
    for done in range(runs):
        data = mutated(draw.choice(target.seeds), draw, target.json)
        try:
            slowest = max(slowest, once(target, data))
        except FindingError as finding:
            return {"runs": done + 1, "finding": str(finding), "document": data.hex(), "slowest_s": slowest}
    return {"runs": runs, "finding": None, "slowest_s": slowest}


def child(name: str, runs: int, seed: int) -> None:
    """One target in this process."""
    with folder() as place:
        target = targets(place)[name]
        for data in target.seeds:
            once(target, data)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        found = drawn(target, runs, seed)
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found))


def guided(name: str, runs: int) -> None:
    """One target under atheris, which ends the process."""
    import atheris

    place = Path(tempfile.mkdtemp(prefix="saap-fuzz-", dir=RUN))  # atheris leaves by exit: who called removes it
    print(place, flush=True)
    with atheris.instrument_imports(include=["saap", "export", "bench", "devices"]):
        target = targets(place)[name]
    corpus = place / "corpus"
    corpus.mkdir()
    for number, data in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(data)
    FOUND.mkdir(parents=True, exist_ok=True)
    options = [f"-runs={runs}", "-max_len=8192", "-timeout=10", "-rss_limit_mb=2048", f"-artifact_prefix={FOUND}/"]
    atheris.Setup(["fuzz", *options, "-verbosity=0", str(corpus)], lambda data: once(target, data) and None)
    atheris.Fuzz()


def run_target(name: str, runs: int, seed: int) -> dict[str, Any]:
    """A target in processes of its own."""
    began = time.monotonic()
    call = [sys.executable, "-m", "studies.fuzz.study", "--only", name, "--seed", str(seed)]
    by_coverage = runs * 3 // 4 if _atheris() else 0
    entry: dict[str, Any] = {"target": name, "by_coverage": by_coverage, "runs": 0, "finding": None}
    if by_coverage:
        done = subprocess.run([*call, "--guided", str(by_coverage)], capture_output=True, text=True, check=False)
        shutil.rmtree(done.stdout.partition("\n")[0], ignore_errors=True)
        if done.returncode:
            entry["finding"] = done.stdout[-3000:] + done.stderr[-3000:]
    done = subprocess.run([*call, "--child", str(runs - by_coverage)], capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        found = {"runs": 0, "finding": done.stderr[-3000:] or f"exit {done.returncode}"}
    entry |= found | {"finding": entry["finding"] or found["finding"]}
    entry["runs"] += by_coverage
    return entry | {"seconds": round(time.monotonic() - began, 1)}


def _atheris() -> str | None:
    try:
        return version("atheris")
    except PackageNotFoundError:
        return None


def tables() -> dict[str, str]:
    """The table of the README."""
    found = json.loads(OUT.read_text())["targets"]
    lines = [
        [each["target"], f"{each['runs']:,}", f"{each['slowest_s']:.2f}", f"{each['peak_bytes'] / 1e6:.0f}",
         each["finding"] or "none"]
        for each in found
    ]  # fmt: skip
    total = f"{sum(each['runs'] for each in found):,}"
    slowest, peak = max(each["slowest_s"] for each in found), max(each["peak_bytes"] for each in found)
    lines.append([f"**all {len(found)}**", total, f"{slowest:.2f}", f"{peak / 1e6:.0f}", ""])
    return {"fuzz": markdown(["parser", "documents", "slowest, s", "peak, MB", "finding"], lines)}


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("what", nargs="?", default="run", choices=["run", "table"])
    parser.add_argument("--runs", type=int, default=10_000, help="documents for each target")
    parser.add_argument("--only", help="one target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--guided", type=int, help=argparse.SUPPRESS)
    add_write_option(parser)
    given = parser.parse_args(arguments)
    if given.what == "table":
        show_tables(HERE, tables(), given.write)
        return 0
    if given.child is not None:
        child(given.only, given.child, given.seed)
        return 0
    if given.guided is not None:
        guided(given.only, given.guided)
        return 0
    with folder() as place:
        names = [given.only] if given.only else list(targets(place))
    entries = []
    for name in names:
        entry = run_target(name, given.runs, given.seed)
        entries.append(entry)
        told = "none" if entry["finding"] is None else entry["finding"].strip().splitlines()[-1]
        print(
            f"| {name} | {entry['runs']} | {entry['seconds']} | {entry.get('slowest_s', 0):.2f} | {told} |", flush=True
        )
    findings = [entry for entry in entries if entry["finding"]]
    print(f"{sum(e['runs'] for e in entries)} documents over {len(entries)} parsers, {len(findings)} findings")
    for entry in findings:
        FOUND.mkdir(parents=True, exist_ok=True)
        (FOUND / f"{entry['target'].replace('/', '_')}.txt").write_text(
            f"{entry['finding']}\n\n{entry.get('document', '')}\n", encoding="utf-8"
        )
    if not given.only:
        about = {**provenance(), "seed": given.seed, "atheris": _atheris(), "targets": entries}
        OUT.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

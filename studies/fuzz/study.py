"""Feed damaged documents to every parser: nothing but a result or an error of one line, in bounded time and memory.

    python -m studies.fuzz.study run --runs 50000               # of each parser, into cells/fuzz.json
    python -m studies.fuzz.study run --products --runs 8000     # documents inside products, into cells/products.json
    python -m studies.fuzz.study run --only "GGUF header" --runs 1000000
    python -m studies.fuzz.study table [--write]

A document is one of mutations.mutated, by its number: whoever finds something can make it again. Documents are read in
a forked process that may take 2 GB more than it has, so that one that kills it is known. Of parsers, with atheris
(`pip install atheris`), three quarters are those that it finds by coverage, from the seeds on.
A finding is written to out/fuzz/ and ends with exit code 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from studies.common import ROOT, add_write_option, markdown, parser_of, provenance, show_tables
from studies.fuzz.mutations import mutated
from studies.fuzz.places import Places
from studies.fuzz.products import products
from studies.fuzz.round import round_table
from studies.fuzz.targets import RUN, Target, folder, is_for_people, targets

HERE = Path(__file__).resolve().parent
FINDINGS = HERE.parents[1] / "out" / "fuzz"
SETS = {"fuzz": targets, "products": products}  # by the name of their cells
MEMORY, SLOW_S, HANGS_S = 2 << 30, 5.0, 120
MUCH = 1_000_000_000  # bytes that one document may take
BATCH = 2000  # documents of one process
MOST = 20  # findings of a target, after which it is mended first


class FindingError(Exception):
    """A document that a parser does not handle. ``where`` tells one defect from another."""

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message)
        self.where = where


def once(target: Target, data: bytes) -> float:
    """Feed one document; seconds, by the clock or of the processor, whichever are fewer.

    Raises:
        FindingError: another error than one for a person, too long, or too much memory.
    """
    before, clock, processor = _memory("VmRSS"), time.monotonic(), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    Places.last = None
    try:
        target.read(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if not is_for_people(error):
            raise FindingError(traceback.format_exc(), _place_of(error)) from None
        if "\n" in str(error):
            raise FindingError(f"more than one line: {error}", _place_of(error)) from None
    seconds = min(time.monotonic() - clock, time.process_time() - processor)
    if seconds > SLOW_S:
        raise FindingError(f"took {seconds:.1f} s", "slow")
    if (took := _memory("VmHWM") - before) > MUCH:
        raise FindingError(f"took {took / 1e6:.0f} MB", "memory")
    return seconds


def _memory(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(match[1]) * 1024 if match else 0


def _place_of(error: BaseException) -> str:
    """The kind of an error and the innermost line of ours that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT))]
    ours = [f for f in frames if "studies" not in f.filename] or frames
    return f"{type(error).__name__} at {ours[-1].filename.removeprefix(f'{ROOT}/')}:{ours[-1].lineno}"


def document(target: Target, seed: int, number: int) -> bytes:
    """The damaged document of this number."""
    draw = random.Random(f"{target.name} {seed} {number}")
    if target.others and draw.random() < 0.02:
        return draw.choice(target.others)
    return mutated(draw.choice(target.seeds), draw, target.kind)


def drawn(target: Target, numbers: Iterable[int], seed: int, tell: Callable[[dict[str, Any]], None]) -> None:
    """Feed documents, and tell of each finding, and at the end of the slowest, of the memory that was added, and of the
    documents that each check refused.
    """
    Places.watch()
    refused = Counter[str]()
    slowest, before, peak = 0.0, _memory("VmRSS"), 0
    for number in numbers:
        data = document(target, seed, number)
        tell({"at": number})
        try:
            slowest = max(slowest, once(target, data))
        except FindingError as finding:
            tell({"finding": str(finding), "where": finding.where, "number": number})
        refused[Places.last or "none"] += 1
        peak = max(peak, _memory("VmHWM"))
    tell({"refused": refused})
    tell({"slowest_s": slowest, "added_bytes": peak - before, "peak_bytes": peak})


def watched(target: Target, runs: int, seed: int) -> dict[str, Any]:
    """Feed documents in forked processes, one after the other, and note which end theirs."""
    entry: dict[str, Any] = {"runs": 0, "slowest_s": 0.0, "added_bytes": 0, "peak_bytes": 0, "findings": []}
    findings, deaths, refused = dict[str, dict[str, Any]](), 0, Counter[str]()
    while entry["runs"] < runs and len(findings) + deaths < MOST:
        numbers = range(entry["runs"], min(runs, entry["runs"] + BATCH))
        at, records, ending = _forked(target, numbers, seed)
        entry["runs"] = at + 1
        if ending:
            deaths += 1
            frames = re.findall(rf'File "{ROOT}/(?!studies)(.+?)", line (\d+)', ending)
            where = f"{ending.partition(chr(10))[0]} at {':'.join(frames[0]) if frames else 'no line of ours'}"
            records.append({"finding": ending, "where": where, "number": at})
        for each in records:
            if "finding" in each:
                findings.setdefault(each["where"], each)
            elif "refused" in each:
                refused.update(each["refused"])
            else:
                entry |= {name: max(entry[name], value) for name, value in each.items()}
    return entry | {"findings": list(findings.values()), "refused": dict(refused.most_common())}


def _forked(target: Target, numbers: range, seed: int) -> tuple[int, list[dict[str, Any]], str | None]:
    """Return the last number, the records, and how the process ended if it failed."""
    mark, (reading, writing) = mmap.mmap(-1, 8), os.pipe()
    log = Path(tempfile.gettempdir(), f"saap-fuzz-{os.getpid()}.log")
    mark[:] = numbers.start.to_bytes(8, "little")
    pid = os.fork()
    if not pid:
        try:
            _child(target, numbers, seed, mark, writing, log)
        finally:
            os._exit(3)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        records = [json.loads(line) for line in pipe]
    _, status = os.waitpid(pid, 0)
    at, traces = int.from_bytes(mark[:], "little"), log.read_text(encoding="utf-8", errors="replace")
    log.unlink()
    code = os.waitstatus_to_exitcode(status)
    if not code:
        return at, records, None
    name = f"ended by {signal.Signals(-code).name}" if code < 0 else f"hung for {HANGS_S} s, or ended with {code}"
    return at, records, f"{name}\n{traces[:3000]}"


def _child(target: Target, numbers: range, seed: int, mark: mmap.mmap, writing: int, log: Path) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    used = _memory("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (used, used))
    with log.open("w") as traces, os.fdopen(writing, "w", encoding="utf-8") as pipe:
        faulthandler.enable(traces)

        def tell(what: dict[str, Any]) -> None:
            if "at" in what:
                mark[:] = what["at"].to_bytes(8, "little")
                faulthandler.dump_traceback_later(HANGS_S, exit=True, file=traces)
                return
            pipe.write(json.dumps(what) + "\n")
            pipe.flush()

        try:
            drawn(target, numbers, seed, tell)
        except Exception:
            traceback.print_exc(file=traces)
            raise
    os._exit(0)


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
    FINDINGS.mkdir(parents=True, exist_ok=True)
    options = [f"-runs={runs}", "-max_len=8192", "-timeout=10", "-rss_limit_mb=2048", f"-artifact_prefix={FINDINGS}/"]
    atheris.Setup(["fuzz", *options, "-verbosity=0", str(corpus)], lambda data: once(target, data) and None)
    atheris.Fuzz()


def run_target(which: str, target: Target, runs: int, seed: int) -> dict[str, Any]:
    """A target in processes of its own."""
    began = time.monotonic()
    by_coverage = runs * 3 // 4 if _atheris() and which == "fuzz" else 0
    findings = []
    if by_coverage:
        call = [sys.executable, "-m", "studies.fuzz.study", "--only", target.name, "--guided", str(by_coverage)]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        shutil.rmtree(done.stdout.partition("\n")[0], ignore_errors=True)
        if done.returncode:
            findings.append({"finding": done.stdout[-3000:] + done.stderr[-3000:], "where": "by coverage"})
    entry = watched(target, runs - by_coverage, seed)
    entry |= {"runs": entry["runs"] + by_coverage, "findings": findings + entry["findings"]}
    return {"target": target.name, "by_coverage": by_coverage, **entry, "seconds": round(time.monotonic() - began, 1)}


def _atheris() -> str | None:
    try:
        return version("atheris")
    except PackageNotFoundError:
        return None


def tables() -> dict[str, str]:
    """The tables of the README."""
    return {which: _table(entries) for which in SETS if (entries := _entries(which))} | {"round": round_table()}


def _cells(which: str) -> Path:
    return HERE / "cells" / f"{which}.json"


def _entries(which: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(_cells(which).read_text())["targets"] if _cells(which).is_file() else []
    return entries


def _table(entries: list[dict[str, Any]]) -> str:
    memory = "added_bytes" if all("added_bytes" in each for each in entries) else "peak_bytes"
    lines = [
        [each["target"], f"{each['runs']:,}", f"{each['slowest_s']:.2f}", f"{each[memory] / 1e6:.0f}",
         "; ".join(finding["where"] for finding in each.get("findings", [])) or each.get("finding") or "none"]
        for each in entries
    ]  # fmt: skip
    total = f"{sum(each['runs'] for each in entries):,}"
    slowest, peak = max(each["slowest_s"] for each in entries), max(each[memory] for each in entries)
    lines.append([f"**all {len(entries)}**", total, f"{slowest:.2f}", f"{peak / 1e6:.0f}", ""])
    heads = ["document" if memory == "added_bytes" else "parser", "documents", "slowest, s"]
    return markdown([*heads, "added, MB" if memory == "added_bytes" else "peak, MB", "finding"], lines)


def keep(which: str, entry: dict[str, Any]) -> None:
    """Put an entry into the cells, in the place of an older one of its target."""
    entry = {**entry, **provenance()}
    others = {each["target"]: each for each in _entries(which)} | {entry["target"]: entry}
    before = json.loads(_cells(which).read_text()) if _cells(which).is_file() else {}
    text = json.dumps({**before, "targets": list(others.values())}, indent=1)
    _cells(which).write_text(text + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("what", nargs="?", default="run", choices=["run", "table"])
    parser.add_argument("--products", action="store_true", help="documents inside whole products")
    parser.add_argument("--runs", type=int, default=10_000, help="documents for each target, times its share")
    parser.add_argument("--only", help="targets whose name begins so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guided", type=int, help=argparse.SUPPRESS)
    add_write_option(parser)
    args = parser.parse_args(arguments)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # a process that forks has one thread
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    which = "products" if args.products else "fuzz"
    if args.what == "table":
        show_tables(HERE, tables(), args.write)
        return 0
    if args.guided is not None:
        guided(args.only, args.guided)
        return 0
    with folder() as place:
        available = SETS[which](place)
        gc.collect()
        gc.freeze()  # what is imported by now stays, and need not be looked at after each document
        chosen = [target for name, target in available.items() if name.startswith(args.only or "")]
        return run(which, chosen, args.runs, args.seed)


def run(which: str, chosen: Sequence[Target], runs: int, seed: int) -> int:
    """Feed all targets, and keep what was found; the exit code."""
    findings = total = 0
    for target in chosen:
        entry = run_target(which, target, max(1, round(runs * target.share)), seed)
        keep(which, entry | {"seed": seed, "atheris": _atheris()})
        total, findings = total + entry["runs"], findings + len(entry["findings"])
        where = "; ".join(each["where"] for each in entry["findings"]) or "none"
        line = (target.name, entry["runs"], entry["seconds"], f"{entry.get('slowest_s', 0):.2f}", where)
        print(f"| {' | '.join(map(str, line))} |", flush=True)
        for number, finding in enumerate(entry["findings"]):
            FINDINGS.mkdir(parents=True, exist_ok=True)
            text = f"{finding['finding']}\n"
            if "number" in finding:
                text += f"\n{document(target, seed, finding['number'])[:200_000]!r}\n"
            (FINDINGS / f"{re.sub(r'[^a-zA-Z0-9.]+', '-', target.name)}-{number}.txt").write_text(
                text, encoding="utf-8"
            )
    print(f"{total} documents over {len(chosen)} targets, {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

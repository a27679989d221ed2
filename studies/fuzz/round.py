"""A hostile round: products of somebody who means harm, each given to commands that would read it.

    python -m studies.fuzz.round [--only "bundle: graph"]    # into cells/round.json

What is changed stands in tests/support/hostile.py. Each try is a command in a process of its own, in an empty working
directory. It must end with a result or one line, leave what it was given as it was, run nothing of it, show nothing of
the files outside, and stay within the bounds of time and memory below. What breaks one is printed.
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.common import ROOT, markdown, parser_of, provenance
from studies.fuzz.places import Places
from studies.fuzz.products import OLD, gguf_bytes, gguf_structure, products

CELLS = Path(__file__).resolve().parent / "cells" / "round.json"
SLOW_S, MUCH, HANGS_S = 5.0, 2 << 30, 120
ROOM = 12 << 30  # bytes of addresses that a try may take
TEXT = "\n".join(f"No dog ran home {n} at night." for n in range(300))
Change = Callable[[Path], object]
Command = Sequence[object]
SCORE = ("--text", "judge.txt", "--chunk", 32, "--max-chunks", 2)
GIVEN: dict[str, list[Command]] = {  # by kind of product: commands, in which X is the product
    "bundle": [
        ["generate", "X", "The river", "--max-tokens", 4, "--chat", "--sample"],
        ["export", "X", "--inspect"],
        ["eval", "X", *SCORE],
        ["bench", "X", "-p", 4, "-n", 2, "-r", 1, "-t", 1, "--no-cold"],
        ["devices", "check", "X", "--device", "raspberry-pi-5"],
    ],
    "model": [
        ["export", "X", "-o", "out", "--parity", "none"],
        ["eval", "X", *SCORE],
        ["prune", "X", "-o", "out", "--ratio", 0.2, "--calibration", "judge.txt", "--sequences", 8, "--length", 16],
        ["tune", "X", "-o", "out", "--data", "judge.txt"],
        ["run", "X", "-o", "out", "--ratio", 0.2],
        ["bench", "torch:X", "-p", 4, "-n", 2, "-r", 1, "-t", 1, "--no-cold"],
    ],
    "GGUF": [["export", "X", "-o", "out", "--parity", "none"], ["eval", "X", *SCORE]],
    "result.json": [["compare", "GOOD", "X", "--no-confirm"], ["report", "X", "-o", "page.html"]],
    "quality.json": [["compare", "GOOD", "X"], ["report", "X", "-o", "page.html"]],
    "cost.json": [["prune", "DENSE", "-o", "out", "--speedup", 1.2, "--costs", "X"]],
    "baseline": [["devices", "test", "BUNDLE", "--baselines", "X"]],
}


@dataclass(frozen=True)
class Try:
    """A change of a kind of product, and the command that is given it."""

    kind: str
    name: str
    make: Callable[[Path], None]
    command: Command

    @property
    def mechanism(self) -> str:
        """The kind and the first word of the change."""
        return f"{self.kind}: {re.split('-', self.name)[0]}"


def tries(place: Path) -> Iterator[Try]:
    """Each change with the first of the commands that take its product, and with one of the others, which go round."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import hostile

    products(place)  # the whole ones
    chat = json.loads((place / "bundle/tokenizer_config.json").read_text())
    chat["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (place / "bundle/tokenizer_config.json").write_text(json.dumps(chat))
    hostile.seal(place / "bundle")
    (place / "dense/LICENSE").write_text("Test licence\n")
    structure, data = gguf_structure(place / "model.gguf")

    def of(source: str, change: Change, finish: Change = lambda path: None) -> Callable[[Path], None]:
        def make(target: Path) -> None:
            whole = place / source
            shutil.copytree(whole, target) if whole.is_dir() else shutil.copy(whole, target)
            change(target)
            finish(target)

        return make

    def header(change: Callable[[Any], object]) -> Callable[[Path], None]:
        def make(target: Path) -> None:
            document = json.loads(structure)
            change(document)
            target.write_bytes(gguf_bytes(document, data))

        return make

    def in_folder(one: Callable[[Path], None], name: str) -> Callable[[Path], None]:
        def make(target: Path) -> None:
            target.mkdir()
            one(target / name)

        return make

    bundles = {**hostile.BUNDLES, **hostile.INSPECTED, **hostile.SCORED}
    made: list[tuple[str, str, Callable[[Path], None]]] = []
    made += [("bundle", name, of("bundle", change, hostile.seal)) for name, change in bundles.items()]
    made += [("model", name, of("dense", change)) for name, change in (hostile.MODELS | hostile.FOLLOWED).items()]
    made += [("GGUF", name, header(change)) for name, change in hostile.GGUFS.items()]
    for document, changes in hostile.DOCUMENTS.items():
        kind = "baseline" if "/" in document else document
        for name, change in changes.items():
            one = of(document, change)
            made.append((kind, name, one if kind == document else in_folder(one, Path(document).name)))
    for number, (kind, name, make) in enumerate(made):
        first, *others = GIVEN[kind]
        yield Try(kind, name, make, first)
        if others:
            yield Try(kind, name, make, others[number % len(others)])


def attempt(each: Try) -> dict[str, Any]:
    """Run a try in a forked process; what it did, and what is wrong with that."""
    with tempfile.TemporaryDirectory(prefix="saap-round-") as folder:
        here, given = Path(folder, "here"), Path(folder, "given")
        here.mkdir()
        given.mkdir()
        product = given / ("model.gguf" if each.kind == "GGUF" else each.kind)
        each.make(product)
        (here / "judge.txt").write_text(TEXT)
        before = _state(given)
        words = [{"X": product, "torch:X": f"torch:{product}", "GOOD": OLD / each.kind, "DENSE": OLD / "dense",
                  "BUNDLE": OLD / "bundle"}.get(str(word), word) for word in each.command]  # fmt: skip
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            _child(words, here, writing)
        os.close(writing)
        with os.fdopen(reading, encoding="utf-8") as pipe:
            text = pipe.read()
        _, status, used = os.wait4(pid, 0)
        entry = json.loads(text) if text else {"ending": os.waitstatus_to_exitcode(status)}
        entry |= {"MB": round(max(used.ru_maxrss, entry.get("children", 0)) / 1024)}
        return entry | {"wrong": _wrong(entry, here, _state(given) != before, words[0] == "run")}


def _child(words: Command, here: Path, writing: int) -> None:
    os.chdir(here)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    signal.alarm(HANGS_S)
    resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
    Places.watch()
    from saap.cli import main

    sys.argv, output, errors, code = ["saap", *map(str, words)], io.StringIO(), io.StringIO(), 0
    began, clock = time.process_time(), time.monotonic()
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            main.invoke()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException as error:
            errors.write(f"Traceback: {error!r}")
    entry = {
        "code": code, "place": Places.last if code else None, "errors": errors.getvalue()[-2000:],
        "shown": output.getvalue()[-2000:], "seconds": min(time.process_time() - began, time.monotonic() - clock),
        "children": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
    }  # fmt: skip
    os.write(writing, json.dumps(entry).encode())
    os._exit(0)


def _state(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def _wrong(entry: dict[str, Any], here: Path, changed: bool, resumes: bool) -> list[str]:
    """What no command may do."""
    said = entry.get("errors", "") + entry.get("shown", "")
    refusals = [line for line in said.splitlines() if line.startswith("saap: ")]
    outside = [Path(name).read_text() for name in ("/etc/passwd", "/etc/hostname")]
    files = [path for path in here.rglob("*") if path.is_file()]
    large = [path for path in files if path.stat().st_size > 64 << 20]  # nothing here makes one
    checks = {
        f"ended with {entry.get('ending')}": "ending" in entry,
        "traceback": "Traceback" in said,
        "no one line": entry.get("code") == 2 and len(refusals) != 1,
        "files are left": entry.get("code") == 2 and len(files) > 1 and not resumes,
        "a file of what was given is changed": changed,
        "ran code": (here / "owned").exists(),
        "shows a file from outside": any(
            secret in said or any(secret.encode() in file.read_bytes() for file in set(files) - set(large))
            for secret in outside if secret
        ),
        "made a large file": bool(large),
        "steers the terminal": "\x1b" in said,
        f"took {entry.get('seconds', 0):.1f} s": entry.get("seconds", 0) > SLOW_S and entry.get("code") == 2,
        f"took {entry['MB']} MB": entry["MB"] << 20 > MUCH,
    }  # fmt: skip
    return [name for name, true in checks.items() if true]


def round_table() -> str:
    """The mechanisms, and the line of ours that stops each."""
    entries = json.loads(CELLS.read_text())["tries"]
    rows = []
    for mechanism in dict.fromkeys(each["mechanism"] for each in entries):
        of = [each for each in entries if each["mechanism"] == mechanism]
        places = Counter(each["place"] or ("its worker" if each["code"] else "harmless there") for each in of)
        names = {each["name"] for each in of}
        stops = ", ".join(f"{place} ({count})" for place, count in places.most_common(3))
        stops += f" and {len(places) - 3} more" if len(places) > 3 else ""
        worst = max(each["seconds"] for each in of), max(each["MB"] for each in of)
        rows.append([mechanism, len(names), len(of), stops, f"{worst[0]:.1f}", worst[1]])
    rows.append([f"**all {len(rows)}**", sum(row[1] for row in rows), len(entries), "", "", ""])
    return markdown(["what is changed", "ways", "tries", "stopped at (tries)", "slowest, s", "peak, MB"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="", help="mechanisms whose name begins so")
    args = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that forks has one thread
    os.environ["SAAP_CACHE"] = tempfile.mkdtemp(prefix="saap-round-cache-")
    entries, bad = [], 0
    with tempfile.TemporaryDirectory(prefix="saap-round-") as folder:
        for each in tries(Path(folder)):
            if not each.mechanism.startswith(args.only):
                continue
            entry = attempt(each)
            if entry["wrong"]:
                bad += 1
                print(each.mechanism, each.name, each.command[0], entry, flush=True)
            kept = {name: entry.get(name) for name in ("code", "place", "MB", "wrong")}
            entries.append({"mechanism": each.mechanism, "name": each.name, "command": each.command[0], **kept,
                            "seconds": round(entry.get("seconds", 0), 2)})  # fmt: skip
    codes = dict(Counter(each["code"] for each in entries))
    print(f"{len(entries)} tries, {bad} of them wrong; exit codes: {codes}")
    if not args.only:
        CELLS.write_text(json.dumps({**provenance(), "tries": entries}, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

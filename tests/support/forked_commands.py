"""Commands, each in a fork of one process that has imported what they need: python forked_commands.py OUT CASES.

A case names the words of a command, where it runs, and what its streams are; what each of them said and its exit code
are in the file OUT.
"""

import gc
import json
import os
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.measure import run as measuring
from bench.measure.result import Bandwidth
from export.engine import huge_pages
from saap.cli.main import main

SECONDS = 60  # that a command may take
NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}


def stream(number: int, kind: str) -> None:
    """Make a stream of this process what ``kind`` says: closed, full, gone (its reader) or a file's path."""
    if kind == "closed":
        os.close(number)
        return
    if kind == "gone":
        reader, new = os.pipe()
        os.close(reader)
    elif kind == "full":
        new = os.open("/dev/full", os.O_WRONLY)
    else:
        new = os.open(kind, os.O_RDWR | os.O_CREAT, 0o600)
    os.dup2(new, number)
    os.close(new)


def begin(case: dict[str, Any], out: str, err: str) -> None:
    """What a shell and the interpreter do before a command begins."""
    kinds = {"stdin": "/dev/null", "stdout": out, "stderr": err, **case.get("streams", {})}
    os.chdir(case["place"])
    os.environ.update(case.get("env", {}))
    if case.get("folder_gone"):
        Path("gone").mkdir()
        os.chdir("gone")
        Path(case["place"], "gone").rmdir()
    for name, kind in kinds.items():
        mode = "r" if name == "stdin" else "w"
        stream(NUMBERS[name], kind)
        made = None if kind == "closed" else open(NUMBERS[name], mode, encoding=case.get("encoding"), closefd=False)  # noqa: SIM115
        setattr(sys, name, made)
        setattr(sys, f"__{name}__", made)
    sys.argv = ["saap", *case["words"]]


def ended() -> int:
    """The exit code of a command; of the interpreter's end only what tells of streams, since the rest takes seconds."""
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        for each in filter(None, (sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__)):
            each.flush()
    except OSError:
        return 120
    return code or 0


def run(case: dict[str, Any]) -> dict[str, Any]:
    out, err = (Path(f"{case['place']}.{name}") for name in ("out", "err"))
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        begin(case, str(out), str(err))
        os._exit(ended())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = {
        name: path.read_text(errors="replace") if path.is_file() else "" for name, path in (("out", out), ("err", err))
    }
    return {**said, "code": code}


def prepare() -> None:
    """Import what commands need, which forks share.

    A session would move all of that to huge pages, and a bench would probe the memory, in two processes.
    """
    for module in ("export.write", "saap.evaluate.evaluation", "saap.prune.pruning", "saap.tune.tuning"):
        import_module(module)
    huge_pages.collapse = lambda: 0
    measuring.probe_bandwidth = lambda cpus, cache: Bandwidth(len(cpus), 1, [])
    gc.freeze()


if __name__ == "__main__":
    prepare()
    answers = [run(case) for case in json.loads(Path(sys.argv[2]).read_text())]
    Path(sys.argv[1]).write_text(json.dumps(answers), encoding="utf-8")

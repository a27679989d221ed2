"""Runs on a board that is an sshd on this host, and what must not be left there."""

import dataclasses
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.sshd import Sshd, require_sshd
from support.tiny_graphs import tiny_bundle

from bench.measure.options import BenchOptions
from bench.measure.result import Result
from bench.remote.board import Say
from bench.remote.options import BoardOptions
from bench.remote.target import Target
from saap.base.progress import Progress

QUICK = BenchOptions(prompt=4, generate=6, threads=1, repetitions=2, cold=False)
ONCE = dataclasses.replace(QUICK, repetitions=1)
OWN_PACKAGES = BoardOptions(board_packages=True)
LONG = dataclasses.replace(QUICK, repetitions=6)
OPTIONS = ["-p", "4", "-n", "6", "-t", "1", "-r", "1", "--no-cold", "--board-packages"]
VENV = f"{Path(sys.executable).parent}:/usr/bin:/bin"  # this Python is the board's, so that nothing is downloaded


def two_bundles(folder: Path) -> list[str]:
    return [str(tiny_bundle(folder / "dense")), str(tiny_bundle(folder / "slim", seed=1))]


def running(folder: Path, monkeypatch: pytest.MonkeyPatch, path: str = VENV) -> Iterator[Sshd]:
    """A board that is up; afterwards nothing of ours may run on it."""
    require_sshd()
    server = Sshd(folder / "sshd", path)
    monkeypatch.setenv("PATH", f"{server.bin}:{os.environ['PATH']}")
    server.start()
    yield server
    server.stop()
    assert not left(server.cache), "processes are left on the board"


def left(cache: Path) -> list[list[str]]:
    """Processes of the agent's folder that run."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        where = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(cache) in part for part in where):
            found.append(process.info["cmdline"])
    return found


def remains(cache: Path) -> list[object]:
    """A lock, runs and processes that are there."""
    return [*cache.glob("lock.json"), *(cache / "runs").glob("*"), *left(cache)]


def one(
    url: str,
    specs: list[str],
    plan: BenchOptions = QUICK,
    *,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Result:
    """The result of a board, which uses the packages of this Python."""
    return Target(url, OWN_PACKAGES, say).bench(specs, plan, progress=progress)


def running_bench(bundle: str, url: str, cache: Path) -> subprocess.Popen[str]:
    """`saap bench --on` as a process that has begun to measure on the board and has long to go."""
    process = subprocess.Popen(
        [sys.executable, "-m", "saap.cli", "bench", bundle, "--on", url, *OPTIONS[:-4], "-r", "400", "--no-cold",
         "--board-packages"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    limit = time.monotonic() + 180
    while not list((cache / "runs").glob("*/beat")):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    return process


def script(path: Path, text: str) -> Path:
    """A program of sh."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path

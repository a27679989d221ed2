"""Processes of ours: how they end, what they tell, and signals meanwhile."""

import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from saap.base.child import ChildFailedError, call, until_done


def test_a_signal_that_another_thread_was_given_ends_a_wait():
    ended = threading.Event()

    def work():
        time.sleep(0.1)  # until the main thread waits
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        ended.wait(10)

    with ThreadPoolExecutor(1) as pool:
        future, began = pool.submit(work), time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            until_done([future])
        assert time.monotonic() - began < 5
        ended.set()


def test_work_that_is_done_or_failed_ends_a_wait():
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(time.sleep, 0.01), pool.submit(int, "no number")]
        until_done(futures)
    assert isinstance(futures[1].exception(), ValueError)


def test_child_reports_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saap.base.child.PACKAGES", tmp_path)
    (tmp_path / "talks.py").write_text("import json, sys; print(json.dumps({'got': json.load(sys.stdin)}))")
    (tmp_path / "dies.py").write_text("import os, sys; print('near the end', file=sys.stderr); os.kill(os.getpid(), 9)")
    (tmp_path / "mute.py").write_text("")
    (tmp_path / "sleeps.py").write_text(
        "import subprocess, sys, time, pathlib\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path('pid').write_text(str(p.pid)); time.sleep(60)\n"
    )
    assert call("talks", {"a": 1}, 20) == {"got": {"a": 1}}
    with pytest.raises(ChildFailedError, match="killed by SIGKILL: near the end"):
        call("dies", {}, 20)
    with pytest.raises(ChildFailedError, match="without an answer"):
        call("mute", {}, 20)
    with pytest.raises(ChildFailedError, match="no answer within 3 s"):
        call("sleeps", {}, 3)
    assert _ends((tmp_path / "pid").read_text(), within_s=5)


def _ends(pid: str, within_s: float) -> bool:
    """Whether a process that was killed is gone, or waits for its parent only."""
    for _ in range(int(within_s / 0.05)):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_an_interrupt_while_a_worker_starts_takes_it_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)
            signal.raise_signal(signal.SIGINT)

    (tmp_path / "sleeps.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr("saap.base.child.PACKAGES", tmp_path)
    monkeypatch.setattr("saap.base.child.subprocess.Popen", Interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        call("sleeps", {}, 20)
    assert started[0].poll() == -signal.SIGKILL
    assert signal.getsignal(signal.SIGINT) is before


def test_what_comes_before_the_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saap.base.child.PACKAGES", tmp_path)
    (tmp_path / "counts.py").write_text(
        "import json\nprint(json.dumps({'n': 1}))\nprint('noise')\nprint(json.dumps({'n': 2}))\n"
        "print(json.dumps({'n': 3}), end='')"
    )
    (tmp_path / "pours.py").write_text("while True: print('x' * 1000000)")
    (tmp_path / "explains.py").write_text("import sys; sys.exit('\\n'.join(f'line {n}' for n in range(30)))")
    told: list[dict[str, int]] = []
    assert call("counts", {}, 20, notify=told.append) == {"n": 3}
    assert told == [{"n": 1}, {"n": 2}]
    with pytest.raises(ChildFailedError, match="printed without end"):
        call("pours", {}, 20)
    with pytest.raises(ChildFailedError, match="exit 1: line 29") as caught:
        call("explains", {}, 20)
    assert caught.value.stderr == [f"line {n}" for n in range(18, 30)]

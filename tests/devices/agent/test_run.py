"""A supervised run on the board, whatever happens to it: followed, killed, left alone, rebooted."""

import contextlib
import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from support.agent_requests import OTHER, RUN, boot, request

from devices.agent import run as agent_run
from devices.agent.home import AgentError, Lock, started
from devices.agent.install import install
from devices.agent.run import end, fetch, follow, start, sweep
from devices.agent.supervisor import _end_with


@pytest.fixture
def begin(tmp_path):
    """Install and start a run of the given code; at the end it is ended."""
    asked = {}

    def start_run(job: str, **more: object) -> dict[str, object]:
        asked.update(request(tmp_path, job, **more))
        Lock(tmp_path).take(RUN, "me")
        install(tmp_path, asked, lambda: None)
        start(tmp_path, asked)
        return {**asked, "offset": 0}

    yield start_run
    end(tmp_path, asked or {"run": RUN, "root": "/"})


def told(folder: Path, asked: dict[str, object]) -> list[dict[str, object]]:
    return [document for document in follow(folder, asked) if "beat" not in document]


WRITES = """
import json, sys, pathlib
print('{"label": "bench", "done": 1, "total": 2}', flush=True)
print("not JSON", flush=True)
folder = pathlib.Path(sys.argv[1])
(folder / "result.json").write_text(json.dumps({"got": json.loads((folder / "job.json").read_text())}))
"""


def test_a_run_is_started_once_followed_from_any_byte_and_ended_twice(tmp_path, begin):
    asked = begin(WRITES)
    assert start(tmp_path, asked) == start(tmp_path, asked)  # made again after a cut, it changes nothing
    first, second, done = told(tmp_path, asked)
    assert json.loads(first["line"])["done"] == 1 and second["line"].strip() == "not JSON"
    assert done == {"done": {"code": 0}}
    assert told(tmp_path, {**asked, "offset": first["at"]}) == [second, done]
    found = fetch(tmp_path, asked)
    assert json.loads(found["result"]) == {"got": {"x": 1}}
    assert found["sha256"] == hashlib.sha256(found["result"].encode()).hexdigest()
    for _ in range(2):
        assert end(tmp_path, asked) == {"ended": True}
    assert not list((tmp_path / "runs").iterdir()) and not (tmp_path / "lock.json").exists()
    with pytest.raises(AgentError, match="the run is gone"):
        list(follow(tmp_path, asked))


def test_a_carriage_return_ends_no_line(tmp_path, begin):
    asked = begin("import sys; sys.stdout.buffer.write(b'10 %\\r100 %\\n{}\\n')")
    first, second, done = told(tmp_path, asked)
    assert (first, second) == ({"line": "10 %\r100 %", "at": 11}, {"line": "{}", "at": 14})
    assert told(tmp_path, {**asked, "offset": 11}) == [second, done]


def test_a_job_that_fails_tells_its_last_line(tmp_path, begin):
    asked = begin("import sys; print('first', file=sys.stderr); sys.exit('no such thing')")
    assert told(tmp_path, asked) == [{"done": {"code": 1, "error": "no such thing"}}]
    with pytest.raises(AgentError, match="left no result"):
        fetch(tmp_path, asked)


# A worker in a session of its own, as the bench starts them.
SPAWNS = """
import subprocess, sys, time, pathlib, os
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path(sys.argv[1], "pids").write_text(f"{child.pid} {os.getpid()}")
print('{}', flush=True)
time.sleep(600)
"""


def pids(folder: Path) -> list[int]:
    for _ in range(200):
        with contextlib.suppress(OSError, ValueError):
            if len(found := (folder / "runs" / RUN / "pids").read_text().split()) == 2:
                return [int(pid) for pid in found]
        time.sleep(0.05)
    raise AssertionError("the job did not start")


def gone(numbers: list[int], seconds: float = 15) -> bool:
    limit = time.monotonic() + seconds
    while any(started(pid) for pid in numbers) and time.monotonic() < limit:
        time.sleep(0.05)
    return not any(started(pid) for pid in numbers)


def test_a_supervisor_that_nobody_noted_is_ended(tmp_path, begin, monkeypatch):
    """Who started it was killed before it could write down which process that is."""
    monkeypatch.setattr(Lock, "process", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        begin(SPAWNS)
    numbers = pids(tmp_path)
    end(tmp_path, {"run": RUN, "root": "/"})
    assert gone(numbers) and not (tmp_path / "lock.json").exists()


def test_a_job_whose_supervisor_was_killed_at_its_start_does_not_begin():
    """The signal for a parent's death is asked for too late where it has died already."""
    child = os.fork()
    if not child:
        os._exit(7 if _end_with(os.getppid()) is None else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    child = os.fork()
    if not child:
        _end_with(os.getppid() + 1)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_killed_job_leaves_no_worker(tmp_path, begin):
    asked = begin(SPAWNS)
    worker, job = pids(tmp_path)
    os.kill(job, signal.SIGKILL)
    (_, done) = told(tmp_path, asked)
    assert "memory runs out" in done["done"]["error"] and done["done"]["code"] == -9
    assert gone([worker, job], 0.1)


def test_an_ended_run_leaves_no_worker(tmp_path, begin):
    asked = begin(SPAWNS)
    numbers = pids(tmp_path)
    end(tmp_path, asked)
    assert gone(numbers, 0.1) and not (tmp_path / "runs" / RUN).exists()


def test_a_supervisor_that_could_not_write_its_last_word_is_a_full_disk(tmp_path, begin, monkeypatch):
    asked = begin("import time; time.sleep(60)")
    os.kill(json.loads((tmp_path / "runs" / RUN / "process.json").read_text())["pid"], signal.SIGKILL)
    monkeypatch.setattr(agent_run, "free", lambda folder: 0)
    assert "the disk is full" in told(tmp_path, asked)[-1]["done"]["error"]


def test_a_killed_supervisor_is_noticed_and_its_job_ends(tmp_path, begin):
    asked = begin(
        SPAWNS.replace(
            "print('{}'", "import signal; signal.signal(15, lambda *_: (child.kill(), sys.exit(1)));print('{}'"
        )
    )
    numbers = pids(tmp_path)
    time.sleep(0.5)  # until the job listens to signals
    supervisor = json.loads((tmp_path / "runs" / RUN / "process.json").read_text())["pid"]
    os.kill(supervisor, signal.SIGKILL)
    assert told(tmp_path, asked)[-1] == {"done": {"error": "its process was killed there"}}
    assert gone(numbers)


def test_a_run_that_nobody_follows_ends_itself_and_leaves_nothing(tmp_path, begin):
    begin(SPAWNS, lease_s=1.0)
    numbers = pids(tmp_path)
    assert gone(numbers)
    for _ in range(100):
        if not (tmp_path / "lock.json").exists():
            break
        time.sleep(0.05)
    assert not (tmp_path / "lock.json").exists() and not (tmp_path / "runs" / RUN).exists()


def test_a_reboot_is_told(tmp_path, begin):
    root = boot(tmp_path / "root", "first")
    asked = begin(SPAWNS, root=root)
    numbers = pids(tmp_path)
    boot(tmp_path / "root", "second")
    assert told(tmp_path, asked) == [{"done": {"rebooted": True}}]
    end(tmp_path, asked)
    assert gone(numbers, 0.1)


def test_runs_of_others_are_swept_when_nobody_can_come_back(tmp_path):
    old, new = tmp_path / "runs" / RUN, tmp_path / "runs" / OTHER
    for place in (old, new):
        place.mkdir(parents=True)
    for jump in (-agent_run.LEASE_S - 5, agent_run.LEASE_S + 5):  # the board's clock may have gone back meanwhile
        old.mkdir(exist_ok=True)
        then = time.time() + jump
        os.utime(old, (then, then))
        sweep(tmp_path)
        assert not old.exists() and new.exists()


def test_a_start_that_comes_after_the_end_starts_nothing(tmp_path):
    """Its connection was cut, and the request to end overtook it."""
    asked = request(tmp_path, SPAWNS)
    Lock(tmp_path).take(RUN, "me")
    install(tmp_path, asked, lambda: None)
    end(tmp_path, asked)
    with pytest.raises(AgentError, match="another run has taken the board"):
        start(tmp_path, asked)
    assert not (tmp_path / "runs" / RUN).exists()


@pytest.mark.parametrize("run", ["../x", "", None, "0123"])
def test_what_is_no_run_names_no_folder(tmp_path, run):
    for ask in (end, fetch):
        with pytest.raises(AgentError, match="is no run"):
            ask(tmp_path, {"run": run, "root": "/"})


def test_a_run_whose_lock_was_taken_is_not_started(tmp_path):
    asked = request(tmp_path, WRITES)
    Lock(tmp_path).take(OTHER, "bob")
    with pytest.raises(AgentError, match="another run has taken the board"):
        start(tmp_path, asked)

"""The board's side by itself: its store, its lock, its installations, and a supervised run whatever happens to it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from devices import agent_files, agent_home, agent_install, agent_run
from devices.agent_files import Store, inside
from devices.agent_home import AgentError, Lock, started
from devices.agent_install import install, ready
from devices.agent_run import end, fetch, follow, start, sweep

DEVICES = Path(agent_home.__file__).parent
RUN, OTHER, KEY = "0123456789abcdef", "fedcba9876543210", "a1b2c3d4e5f60718"
DATA = bytes(range(256)) * 400
SHA = hashlib.sha256(DATA).hexdigest()


def stream(data: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(data))


def nothing(done: int = 0) -> None:
    pass


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def test_a_file_goes_on_where_it_was_cut(store):
    assert store.held(SHA) == 0
    with pytest.raises(AgentError, match="cut short") as caught:
        store.receive(SHA, len(DATA), 0, stream(DATA[:1000]), nothing)
    assert caught.value.again and store.held(SHA) == 1000
    with pytest.raises(AgentError, match="another offset"):
        store.receive(SHA, len(DATA), 500, stream(DATA[500:]), nothing)
    store.receive(SHA, len(DATA), 1000, stream(DATA[1000:]), nothing)
    assert store.held(SHA) is None and store.file(SHA).read_bytes() == DATA
    assert [path.name for path in store.path.iterdir()] == [SHA]


def test_other_bytes_than_were_promised_are_thrown_away(store):
    with pytest.raises(AgentError, match="it arrived damaged"):
        store.receive(SHA, len(DATA), 0, stream(DATA[:-1] + b"!"), nothing)
    assert store.held(SHA) == 0 and not list(store.path.iterdir())
    store.file(SHA).write_bytes(DATA[:-1] + b"!")  # rotted where it lay
    assert store.held(SHA) == 0 and not store.file(SHA).exists()


def test_no_more_is_taken_than_was_promised(store):
    store.receive(SHA, len(DATA), 0, stream(DATA + b"more"), nothing)
    assert store.file(SHA).read_bytes() == DATA


def test_a_file_that_is_still_being_written_is_left_alone(store):
    import fcntl

    with (store.path / f"{SHA}.part").open("ab") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        with pytest.raises(AgentError, match="still being written") as caught:
            store.receive(SHA, len(DATA), 0, stream(DATA), nothing)
    assert caught.value.again


@pytest.fixture
def small_disk(tmp_path):
    """One of a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here: a full disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_becomes_full(small_disk):
    store, data = Store(small_disk), bytes(3 << 20)
    with pytest.raises(AgentError, match=r"the disk is full: 3 MB are needed in .*: free some, or name another folder"):
        store.receive(hashlib.sha256(data).hexdigest(), len(data), 0, stream(data), nothing)
    assert not list(store.path.iterdir())
    assert agent_files.free(small_disk) > 900_000


def test_room_is_made_from_what_was_used_longest_ago(store, monkeypatch):
    monkeypatch.setattr(agent_files, "CACHE_BYTES", 250)
    names = [character * 64 for character in "abcd"]
    for age, name in enumerate(names):
        (store.path / name).write_bytes(b"x" * 100)
        os.utime(store.path / name, (1000 - age, 1000 - age))  # d is the oldest
    store.make_room([names[3]], 0)
    assert sorted(path.name[0] for path in store.path.iterdir()) == ["a", "d"]
    store.make_room([names[3]], 1 << 60)  # more than any disk has
    assert [path.name[0] for path in store.path.iterdir()] == ["d"]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", ".", "a\0b", None, 3])
def test_paths_that_leave_their_folder(store, tmp_path, name):
    with pytest.raises(AgentError, match="leaves the folder"):
        inside(name)
    store.receive(SHA, len(DATA), 0, stream(DATA), nothing)
    if isinstance(name, str):
        with pytest.raises(AgentError, match="leaves the folder"):
            store.lay_out(tmp_path / "run", {name: SHA})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("sha", ["", "../lock.json", "A" * 64, "a" * 63, None])
def test_what_is_no_hash_names_no_file(store, sha):
    with pytest.raises(AgentError, match="no sha256"):
        store.held(sha)


def test_bundles_are_laid_out_as_second_names(store, tmp_path):
    store.receive(SHA, len(DATA), 0, stream(DATA), nothing)
    store.lay_out(tmp_path / "run", {"model.onnx": SHA, "deep/er.bin": SHA})
    assert (tmp_path / "run/deep/er.bin").stat().st_ino == store.file(SHA).stat().st_ino
    with pytest.raises(AgentError, match="not there any more"):
        store.lay_out(tmp_path / "run", {"gone": "b" * 64})


def boot(root: Path, value: str) -> str:
    path = root / "proc/sys/kernel/random/boot_id"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value + "\n")
    return str(root)


def test_the_lock_is_of_one_run(tmp_path):
    lock = Lock(tmp_path)
    lock.take(RUN, "ann@desk")
    lock.take(RUN, "ann@desk")  # the same request, made again
    lock.process(RUN, os.getpid())
    with pytest.raises(AgentError, match=rf"ann@desk measures there since 0 s \(process {os.getpid()} there\): wait"):
        lock.take(OTHER, "bob@desk")
    lock.release(OTHER)
    assert lock.holds(RUN)
    lock.release(RUN)
    lock.take(OTHER, "bob@desk")
    assert lock.holds(OTHER)


def test_a_lock_without_a_process_holds_while_it_is_touched(tmp_path):
    lock = Lock(tmp_path)
    lock.take(RUN, "ann")
    old = time.time() - agent_home.STALE_S - 1
    os.utime(lock.path, (old, old))
    lock.process(RUN, os.getpid())  # touches it, and names a process that runs
    os.utime(lock.path, (old, old))
    with pytest.raises(AgentError, match="ann measures"):
        lock.take(OTHER, "bob")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock.process(RUN, child.pid)
    child.communicate(b"\n")
    with pytest.raises(AgentError, match="ann measures"):  # it may be fetching
        lock.take(OTHER, "bob")
    os.utime(lock.path, (old, old))
    lock.take(OTHER, "bob")
    assert lock.holds(OTHER)


def test_a_lock_does_not_outlive_a_boot(tmp_path):
    root = boot(tmp_path / "root", "first")
    Lock(tmp_path, root).take(RUN, "ann")
    boot(tmp_path / "root", "second")
    Lock(tmp_path, root).take(OTHER, "bob")
    assert Lock(tmp_path, root).holds(OTHER)


def test_a_process_is_known_by_its_start_too():
    mine = started(os.getpid())
    assert mine is not None and agent_home.alive(os.getpid(), mine)
    assert not agent_home.alive(os.getpid(), str(int(mine) - 1))
    zombie = subprocess.Popen(["true"])
    time.sleep(0.3)
    assert started(zombie.pid) is None
    zombie.wait()


def test_the_folder_is_where_the_users_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "there"))
    assert agent_home.home() == tmp_path / "there"
    monkeypatch.delenv("SAAP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert agent_home.home() == tmp_path / ".cache/saap"
    monkeypatch.setenv("SAAP_CACHE", "/proc/no")
    with pytest.raises(AgentError, match="/proc/no cannot be written"):
        agent_home.home()


def code(job: str) -> dict[str, str]:
    """The agent's real code with a measuring process of our own."""
    sources = {f"devices/{path.name}": path.read_text() for path in DEVICES.glob("agent*.py")}
    return {**sources, "devices/__init__.py": "", "bench/__init__.py": "", "bench/board_job.py": job}


def put(folder: Path, document: object) -> str:
    data = json.dumps(document).encode()
    sha = hashlib.sha256(data).hexdigest()
    Store(folder).receive(sha, len(data), 0, stream(data), nothing)
    return sha


def request(folder: Path, job: str, **more: object) -> dict[str, object]:
    return {
        "key": KEY, "code": put(folder, code(job)), "requirements": [], "wheels": None, "own": False, "root": "/",
        "run": RUN, "bundles": [], "job": {"x": 1}, "lease_s": 60.0, **more,
    }  # fmt: skip


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
    past = time.time() - agent_run.LEASE_S - 5
    os.utime(old, (past, past))
    sweep(tmp_path)
    assert not old.exists() and new.exists()


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


def test_installations(tmp_path):
    asked = request(tmp_path, WRITES)
    made = install(tmp_path, asked, lambda: None)
    assert made["python"] == sys.executable and "onnxruntime" in made["versions"]
    assert ready(tmp_path, KEY) == made
    (tmp_path / f"agent-{KEY}/ready.json").write_text('{"python": "/no/such/python"}')
    assert ready(tmp_path, KEY) is None  # the board's Python was upgraded
    assert install(tmp_path, asked, lambda: None) == made


def test_code_that_leaves_its_folder_is_refused_and_nothing_is_left(tmp_path):
    asked = {**request(tmp_path, WRITES), "code": put(tmp_path, {"../../x.py": "print(1)"})}
    with pytest.raises(AgentError, match="leaves the folder"):
        install(tmp_path, asked, lambda: None)
    assert not list(tmp_path.glob("agent-*")) and not list(tmp_path.rglob("x.py"))


def test_packages_that_are_not_there(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'onnxruntime'\" >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(agent_install.sys, "executable", str(python))
    with pytest.raises(AgentError, match=r"does not have what the bench needs: ModuleNotFoundError.*onnxruntime"):
        install(tmp_path, request(tmp_path, WRITES), lambda: None)
    python.write_text(
        "#!/bin/sh\necho 'The virtual environment was not created: ensurepip is not available.'\nexit 1\n"
    )
    with pytest.raises(AgentError, match="sudo apt install python3-venv"):
        install(tmp_path, {**request(tmp_path, WRITES), "own": True}, lambda: None)
    assert not list(tmp_path.glob("agent-*"))


def test_no_index_and_no_wheels(tmp_path):
    """A real pip in a real venv, which finds nothing in an empty folder."""
    asked = {
        **request(tmp_path, WRITES),
        "own": True,
        "requirements": ["onnxruntime"],
        "wheels": {"other.txt": put(tmp_path, {})},
    }
    with pytest.raises(AgentError, match=r"cannot be installed: push the right ones.*No matching distribution"):
        install(tmp_path, asked, lambda: None)
    assert not list(tmp_path.glob("agent-*"))


def test_an_installation_whose_connection_is_cut_ends(tmp_path, monkeypatch):
    beats = []

    def beat() -> None:
        beats.append(1)
        if len(beats) > 1:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        agent_install._run([sys.executable, "-c", "import time; time.sleep(60)"], beat)
    assert not [p for p in psutil.Process().children() if "time.sleep(60)" in p.cmdline()]


def test_old_installations_are_removed(tmp_path):
    for index, key in enumerate(("1" * 16, "2" * 16, "3" * 16)):
        place = tmp_path / f"agent-{key}"
        place.mkdir()
        os.utime(place, (index, index))
    install(tmp_path, request(tmp_path, WRITES), lambda: None)
    assert sorted(path.name for path in tmp_path.glob("agent-*")) == [f"agent-{'3' * 16}", f"agent-{KEY}"]

"""The board's store of files, its lock, and its installations."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from support.agent_requests import KEY, OTHER, RUN, boot, nothing, put, request, stream
from support.remote_runs import script

from devices.agent import files as agent_files
from devices.agent import home as agent_home
from devices.agent import install as agent_install
from devices.agent import main as agent
from devices.agent.files import Store, inside
from devices.agent.home import AgentError, Lock, started
from devices.agent.install import install, ready

DATA = bytes(range(256)) * 400
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def receive(store, data, offset=0):
    store.receive(SHA, len(DATA), offset, stream(data), nothing)


def test_a_file_goes_on_where_it_was_cut(store):
    assert store.received(SHA) == 0
    with pytest.raises(AgentError, match="cut short") as caught:
        receive(store, DATA[:1000])
    assert caught.value.again and store.received(SHA) == 1000
    with pytest.raises(AgentError, match="another offset"):
        receive(store, DATA[500:], 500)
    receive(store, DATA[1000:] + b"more", 1000)  # no more is taken than was promised
    assert store.received(SHA) is None and store.file(SHA).read_bytes() == DATA
    assert [path.name for path in store.path.iterdir()] == [SHA]


def test_other_bytes_than_were_promised_are_thrown_away(store):
    with pytest.raises(AgentError, match="it arrived damaged"):
        receive(store, DATA[:-1] + b"!")
    assert store.received(SHA) == 0 and not list(store.path.iterdir())
    store.file(SHA).write_bytes(DATA[:-1] + b"!")  # rotted where it lay
    assert store.received(SHA) == 0 and not store.file(SHA).exists()


def test_a_file_that_is_still_being_written_is_left_alone(store):
    with (store.path / f"{SHA}.part").open("ab") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        with pytest.raises(AgentError, match="still being written") as caught:
            receive(store, DATA)
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
    receive(store, DATA)
    if isinstance(name, str):
        with pytest.raises(AgentError, match="leaves the folder"):
            store.lay_out(tmp_path / "run", {name: SHA})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("sha", ["", "../lock.json", "A" * 64, "a" * 63, None])
def test_what_is_no_hash_names_no_file(store, sha):
    with pytest.raises(AgentError, match="no sha256"):
        store.received(sha)


def test_bundles_are_laid_out_as_second_names(store, tmp_path):
    receive(store, DATA)
    store.lay_out(tmp_path / "run", {"model.onnx": SHA, "deep/er.bin": SHA})
    assert (tmp_path / "run/deep/er.bin").stat().st_ino == store.file(SHA).stat().st_ino
    with pytest.raises(AgentError, match="not there any more"):
        store.lay_out(tmp_path / "run", {"gone": "b" * 64})


def test_bundles_are_copied_where_there_are_no_second_names(store, tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted", str(target))

    monkeypatch.setattr(os, "link", link)
    put(tmp_path, "x" * (3 << 20))
    (sha,) = [path.name for path in store.path.iterdir()]
    beats = []
    Store(tmp_path, lambda: beats.append(1)).lay_out(tmp_path / "run", {"a/model.onnx": sha})
    assert (tmp_path / "run/a/model.onnx").read_bytes() == store.file(sha).read_bytes()
    assert len(beats) > 2  # the lock is kept, and the other side hears of it


def test_a_sender_that_fell_silent_leaves_the_file_to_the_next(store, tmp_path):
    Lock(tmp_path).take(RUN, "me")
    line = {"do": "put", "root": "/", "run": RUN, "sha": SHA, "size": len(DATA), "offset": 0}
    with subprocess.Popen(
        [sys.executable, "-c", "from devices.agent import main as agent; agent.GONE_S = 1; agent.main()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "SAAP_CACHE": str(tmp_path)},
    ) as agent:  # fmt: skip
        agent.stdin.write(json.dumps(line).encode() + b"\n" + DATA[:50_000])
        agent.stdin.flush()
        assert agent.wait(30) == 0  # though nobody closed its standard input
        assert b'"again": true' in agent.stdout.read()
        agent.stdin.close()
    assert store.received(SHA) == 50_000
    receive(store, DATA[50_000:], 50_000)


def test_a_file_of_another_user_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path))

    def refused(folder, request, tell, beat):
        raise PermissionError(13, "Permission denied", str(tmp_path / "lock.guard"))

    monkeypatch.setitem(agent.REQUESTS, "hello", refused)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"do": "hello", "root": "/"}\n')))
    agent.main()
    assert f"{tmp_path}/lock.guard: Permission denied: give it to this user" in capsys.readouterr().out


@pytest.mark.parametrize("do", agent.KEEPING)
def test_who_lost_the_lock_works_no_more(tmp_path, monkeypatch, capsys, do):
    """Hashing, installing and laying out would disturb who measures now, whose lock is not kept fresh either."""
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path))
    monkeypatch.setitem(agent.REQUESTS, do, lambda *_: pytest.fail("it works"))
    Lock(tmp_path).take(OTHER, "bob")
    os.utime(tmp_path / "lock.json", (1000, 1000))
    line = json.dumps({"do": do, "root": "/", "run": RUN}) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line.encode())))
    agent.main()
    assert "another run has taken the board meanwhile: measure again" in capsys.readouterr().out
    assert (tmp_path / "lock.json").stat().st_mtime == 1000


def test_who_loses_the_lock_meanwhile_ends(tmp_path, monkeypatch):
    lock = Lock(tmp_path)
    lock.take(RUN, "me")
    monkeypatch.setattr(agent, "EVERY_S", -1.0)
    beat = agent._beat(lock, RUN, lambda told: None)
    beat(1)
    lock.release(RUN)
    lock.take(OTHER, "bob")
    with pytest.raises(AgentError, match="another run has taken the board"):
        beat(2)


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


def test_a_request_that_hears_late_of_its_cut_leaves_the_lock_to_the_one_made_again(lock, monkeypatch):
    mine = os.getpid()
    monkeypatch.setattr(agent_home.os, "getpid", lambda: mine + 1)
    lock.take(RUN, "ann")  # over another connection
    monkeypatch.setattr(agent_home.os, "getpid", lambda: mine)
    lock.untake(RUN)
    assert lock.holds(RUN)
    lock.take(RUN, "ann")
    lock.untake(RUN)
    assert not lock.path.exists()


@pytest.fixture
def lock(tmp_path):
    """Ann's."""
    held = Lock(tmp_path)
    held.take(RUN, "ann")
    return held


def aged(lock, seconds=-agent_home.STALE_S - 1):
    then = time.time() + seconds
    os.utime(lock.path, (then, then))


def is_free(lock):
    with contextlib.suppress(AgentError):
        lock.take(OTHER, "bob")
    return lock.holds(OTHER)


@pytest.mark.parametrize("jump", [-agent_home.STALE_S - 1, 10 * 365 * 86400.0])
def test_a_lock_that_nobody_holds_is_free_whichever_way_the_clock_jumped(lock, jump):
    assert not is_free(lock)
    aged(lock, jump)
    assert is_free(lock)


def test_a_lock_without_a_process_holds_while_it_is_touched(lock):
    aged(lock)
    lock.process(RUN, os.getpid())  # touches it, and names a process that runs
    aged(lock)
    assert not is_free(lock)
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    lock.process(RUN, child.pid)
    child.communicate(b"")
    assert not is_free(lock)  # it may be fetching
    aged(lock)
    assert is_free(lock)


def test_a_lock_does_not_outlive_a_boot(tmp_path):
    root = boot(tmp_path / "root", "first")
    Lock(tmp_path, root).take(RUN, "ann")
    boot(tmp_path / "root", "second")
    Lock(tmp_path, root).take(OTHER, "bob")
    assert Lock(tmp_path, root).holds(OTHER)


def test_a_process_is_known_by_its_start_too():
    mine = started(os.getpid())
    assert mine is not None and agent_home.alive({"pid": os.getpid(), "start": mine})
    assert not agent_home.alive({"pid": os.getpid(), "start": str(int(mine) - 1)})
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
    monkeypatch.chdir(tmp_path)
    for relative in ("here", "~/here"):  # the run is started in another folder
        monkeypatch.setenv("SAAP_CACHE", relative)
        assert agent_home.home() == tmp_path / "here"
    monkeypatch.setenv("SAAP_CACHE", "/proc/no")
    with pytest.raises(AgentError, match="/proc/no cannot be written"):
        agent_home.home()


def test_installations(tmp_path):
    asked = request(tmp_path, "")
    made = install(tmp_path, asked, lambda: None)
    assert made["python"] == sys.executable and "onnxruntime" in made["versions"]
    assert ready(tmp_path, KEY, lambda: None) == made
    (tmp_path / f"agent-{KEY}/ready.json").write_text('{"python": "/no/such/python"}')
    assert ready(tmp_path, KEY, lambda: None) is None  # the board's Python was upgraded
    assert install(tmp_path, asked, lambda: None) == made


def test_code_that_leaves_its_folder_is_refused_and_nothing_is_left(tmp_path):
    asked = {**request(tmp_path, ""), "code": put(tmp_path, {"../../x.py": "print(1)"})}
    with pytest.raises(AgentError, match="leaves the folder"):
        install(tmp_path, asked, lambda: None)
    assert not list(tmp_path.glob("agent-*")) and not list(tmp_path.rglob("x.py"))


def test_packages_that_are_not_there(tmp_path, monkeypatch):
    python = script(tmp_path / "python", "echo \"ModuleNotFoundError: No module named 'onnxruntime'\" >&2\nexit 1")
    monkeypatch.setattr(agent_install.sys, "executable", str(python))
    with pytest.raises(AgentError, match=r"does not have what the bench needs: ModuleNotFoundError.*onnxruntime"):
        install(tmp_path, request(tmp_path, ""), lambda: None)
    script(python, "echo 'The virtual environment was not created: no ensurepip.'\nexit 1")
    with pytest.raises(AgentError, match="sudo apt install python3-venv"):
        install(tmp_path, {**request(tmp_path, ""), "own": True}, lambda: None)
    assert not list(tmp_path.glob("agent-*"))


def test_no_index_and_no_wheels(tmp_path, monkeypatch):
    """A real pip, which finds nothing in an empty folder. The venv is none: that would take seconds."""
    here = script(tmp_path / "here", f'exec {sys.executable} "$@"')
    fake = script(tmp_path / "fake", f'mkdir -p "$3/bin" && ln -s {here} "$3/bin/python"')
    monkeypatch.setattr(agent_install.sys, "executable", str(fake))
    wheels = {"other.txt": put(tmp_path, {})}
    asked = {**request(tmp_path, ""), "own": True, "requirements": ["saap-no-such-package"], "wheels": wheels}
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
    install(tmp_path, request(tmp_path, ""), lambda: None)
    assert sorted(path.name for path in tmp_path.glob("agent-*")) == [f"agent-{'3' * 16}", f"agent-{KEY}"]

"""What a board's URL means, what OpenSSH and adb say, and a run over an adb that only pretends."""

import stat
import sys
from pathlib import Path

import pytest
from support.remote_runs import ONCE, one, script
from support.tiny_graphs import tiny_bundle

from devices.transport import Adb, BoardError, Local, LostError, Ssh, open_transport

CHANGED = """@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Host key for [board]:2222 has changed and you have requested strict checking.
Host key verification failed.
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder in PATH whose adb and ssh do nothing yet."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("adb", "ssh"):
        script(folder / name, "exit 1")
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin")
    return folder


@pytest.mark.parametrize(
    ("url", "end"),
    [
        ("ssh://pi@board", ["-l", "pi", "--", "board", "true"]),
        ("ssh://board:2222/", ["-p", "2222", "--", "board", "true"]),
        ("ssh://pi@[fe80::1%25eth0]:22", ["-l", "pi", "-p", "22", "--", "fe80::1%25eth0", "true"]),
        ("ssh://Pi@My-Board:22", ["-l", "Pi", "-p", "22", "--", "My-Board", "true"]),  # ssh's Host tells cases apart
        ("ssh://board@Board", ["-l", "board", "--", "Board", "true"]),
        ("adb://", ["adb", "shell", "-T", "true"]),
        ("adb://R58N123", ["adb", "-s", "R58N123", "shell", "-T", "true"]),
        ("adb://10.0.0.7:5555", ["adb", "-s", "10.0.0.7:5555", "shell", "-T", "true"]),
        ("local://", ["sh", "-c", "true"]),
    ],
)
def test_urls(programs, url, end):
    transport = open_transport(url)
    assert transport.argv("true")[-len(end) :] == end
    transport.close()


def test_host_keys_are_never_waved_through_and_nothing_is_asked(programs):
    transport = open_transport("ssh://board")
    argv = transport.argv("true")
    assert "StrictHostKeyChecking=yes" in argv and "BatchMode=yes" in argv
    assert not [part for part in argv if "UserKnownHostsFile" in part]
    (socket,) = [part for part in argv if part.startswith("ControlPath=")]
    folder = Path(socket.removeprefix("ControlPath=")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    transport.close()
    assert not folder.exists()


@pytest.mark.parametrize(
    "url",
    ["board", "pi@board", "ssh://", "ssh://-oProxyCommand=id", "ssh://-x@board", "ssh://pi@board/home", "ssh://b:99999",
     "ssh://a b", "ssh://a;b", "ssh://$(id)@b", "http://board", "adb://-s", "adb://a/b", "local://board", ""],
)  # fmt: skip
def test_what_names_no_board(programs, url):
    with pytest.raises(BoardError, match="names no board"):
        open_transport(url)


@pytest.mark.parametrize(
    ("url", "told"),
    [("ssh://pi:secret@board", "without path or password"), ("ssh://pi:secret@board:99999", "names no board")],
)
def test_a_password_is_refused_and_not_shown(programs, url, told):
    with pytest.raises(BoardError, match=told) as caught:
        open_transport(url)
    assert "secret" not in str(caught.value)


def test_programs_that_are_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BoardError, match="ssh is not installed here"):
        open_transport("ssh://board")
    with pytest.raises(BoardError, match="adb is not installed here"):
        open_transport("adb://")


@pytest.mark.parametrize(
    ("transport", "code", "stderr", "kind", "told"),
    [
        (Ssh("board", "pi", 2222), 255, CHANGED, BoardError, r"host key changed.*ssh-keygen -R '\[board\]:2222'"),
        (Ssh("board"), 255, "Host key verification failed.\r\n", BoardError, "host key is unknown"),
        (Ssh("board"), 255, "pi@board: Permission denied (publickey).", BoardError, "refuses your key"),
        (Ssh("board"), 255, "ssh: connect to host board port 22: No route to host", LostError, "No route to host"),
        (Ssh("board"), 255, "", LostError, "the connection ended"),
        (Ssh("board"), 1, "Traceback\nKeyError: 'x'", BoardError, "exit 1: KeyError"),
        (Ssh("board"), 1, "PermissionError: [Errno 13] Permission denied: '/x'", BoardError, "exit 1: PermissionError"),
        (Adb(), 1, "error: no devices/emulators found", LostError, "no such device"),
        (Adb("A"), 1, "error: device unauthorized.\nThis adb server's ...", BoardError, "confirm this computer's key"),
        (Adb(), 1, "adb: more than one device/emulator", BoardError, "give adb://SERIAL"),
        (Adb("A"), 1, "error: device 'A' not found", LostError, "no such device"),
        (Adb("A"), 255, "", LostError, "the connection ended"),
        (Adb("A"), 1, "error: closed", LostError, "error: closed"),
        (Adb("A"), 1, "Traceback\nImportError: library libz.so not found", BoardError, "exit 1: ImportError"),
        (Local(), 2, "oh\x1b[31m no", BoardError, r"exit 2: oh\?\[31m no"),
    ],
)
def test_failures(transport, code, stderr, kind, told):
    error = transport.failure(code, stderr)
    transport.close()
    assert type(error) is kind and error.exit_code == 2
    with pytest.raises(kind, match=told):
        raise error
    assert str(error).startswith(transport.name) and "\n" not in str(error)


def test_a_run_over_adb(programs, tmp_path, monkeypatch):
    """The fake runs here what a device would run, in a home of its own, and keeps how it was called."""
    home = tmp_path / "sdcard"
    home.mkdir()
    script(
        programs / "adb",
        f'printf "%s|" "$1" "$2" "$3" "$4" >>{tmp_path}/calls; echo >>{tmp_path}/calls\n'
        f'test "$1 $3 $4" = "-s shell -T" || exit 9\nHOME={home} exec sh -c "$5"',
    )
    monkeypatch.delenv("SAAP_CACHE", raising=False)
    bundle = tiny_bundle(tmp_path / "tiny")
    found = one("adb://R58N123", [str(bundle)], ONCE)
    assert len(found.measurements[0].samples) == 1 and found.settings["on"] == "adb://R58N123"
    assert set((tmp_path / "calls").read_text().split()) == {"-s|R58N123|shell|-T|"}
    assert not list((home / ".cache/saap/runs").iterdir()) and not (home / ".cache/saap/lock.json").exists()

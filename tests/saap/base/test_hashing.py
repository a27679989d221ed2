"""Files are hashed once, and again when they have changed."""

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from saap.base import hashing
from saap.base.hashing import VARIABLE, hashes_for_workers, known_sha256


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "_known", {})
    monkeypatch.setattr(hashing, "JUST_NOW_NS", -(10**12))  # a file of the moment is remembered, too
    (tmp_path / "file").write_bytes(b"content")
    return tmp_path / "file"


def test_a_file_is_read_once_until_it_changes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = hashing.sha256_file
    monkeypatch.setattr(hashing, "sha256_file", lambda path: reads.append(path) or real(path))
    assert known_sha256(file) == known_sha256(file) == sha256(b"content").hexdigest()
    assert len(reads) == 1
    status = file.stat()
    file.write_bytes(b"Content")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size and file.stat().st_mtime_ns == status.st_mtime_ns
    assert known_sha256(file) == sha256(b"Content").hexdigest()
    assert len(reads) == 2


def test_a_file_of_this_moment_is_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "JUST_NOW_NS", 10**12)
    known_sha256(file)
    assert hashing._known == {}


def test_a_worker_reads_what_its_parent_has_not_hashed(file: Path) -> None:
    known_sha256(file)
    (variables,) = hashes_for_workers().items()
    assert variables[0] == VARIABLE
    code = (
        "import sys; from pathlib import Path; from saap.base import hashing\n"
        "hashing.sha256_file = lambda path: 'read'\n"
        "print(*(hashing.known_sha256(Path(name)) for name in sys.argv[1:]))"
    )
    other = file.with_name("other")
    other.write_bytes(b"content")
    command = [sys.executable, "-c", code, str(file), str(other)]
    done = subprocess.run(
        command, env={**os.environ, **hashes_for_workers()}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [sha256(b"content").hexdigest(), "read"]


def test_a_large_file_is_known_to_the_next_process_for_a_day(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "LARGE", 7)
    reads = []
    real = hashing.sha256_file
    monkeypatch.setattr(hashing, "sha256_file", lambda path: reads.append(path) or real(path))
    now = hashing.time.time()
    for later_s, content, read in ((0, b"content", 1), (0, b"content", 1), (86_400, b"content", 2), (0, b"Content", 3)):
        if content != file.read_bytes():
            file.write_bytes(content)
        monkeypatch.setattr(hashing, "_known", {})  # as in another process
        monkeypatch.setattr(hashing.time, "time", lambda later_s=later_s: now + later_s)
        assert known_sha256(file) == sha256(content).hexdigest() and len(reads) == read

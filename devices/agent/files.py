"""The board's store of pushed files, each under its sha256, and bundles laid out from it. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import IO

from devices.agent.home import AgentError

CACHE_BYTES = 8 << 30  # the store is made no larger than this by what a run does not need
PIECE = 1 << 20
_SHA = re.compile(r"[0-9a-f]{64}")


class Store:
    """``files/`` of the agent's folder. An unfinished file is ``<sha256>.part``, and is gone on with.

    Args:
        beat: called while files are hashed or copied.
    """

    def __init__(self, folder: Path, beat: Callable[[], None] = lambda: None) -> None:
        self.path, self._beat = folder / "files", beat
        self.path.mkdir(exist_ok=True)

    def file(self, sha: str) -> Path:
        """Return the path of a whole file. Raises AgentError: ``sha`` is not a sha256, and might be a path."""
        if not isinstance(sha, str) or not _SHA.fullmatch(sha):
            raise AgentError(f"{sha!r} is no sha256: the two sides are not of one version")
        return self.path / sha

    def received(self, sha: str) -> int | None:
        """Bytes of an unfinished file, or None where the whole is here; one that is damaged is thrown away."""
        whole, part = self.file(sha), self._part(sha)
        if whole.is_file():
            if self._sha256(whole) == sha:
                os.utime(whole)
                return None
            whole.unlink()
        return part.stat().st_size if part.is_file() else 0

    def receive(self, sha: str, size: int, offset: int, source: BufferedReader, tell: Callable[[int], None]) -> None:
        """Go on with a file from ``offset``; it becomes whole when its hash is right.

        Raises AgentError: no space, another offset than what is here, cut short, or other bytes than were promised.
        """
        whole, part = self.file(sha), self._part(sha)
        done = offset
        try:
            with part.open("ab") as file:
                _alone(file)
                if offset != part.stat().st_size:
                    raise AgentError("another offset than what is there", again=True)
                while done < size and (piece := source.read1(min(PIECE, size - done))):
                    file.write(piece)
                    done += len(piece)
                    tell(done)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            part.unlink(missing_ok=True)
            raise AgentError(full(self.path, size)) from None
        if done < size:
            raise AgentError("cut short", again=True)
        if self._sha256(part) != sha:
            part.unlink()
            raise AgentError("it arrived damaged: other bytes than were sent")
        part.replace(whole)

    def make_room(self, keep: Iterable[str], needed: int) -> int:
        """Throw away what was used longest ago until the store is within its bound and ``needed`` bytes are free.

        Returns:
            bytes that are free then.
        """
        kept = set(keep)
        files = sorted((f for f in self.path.iterdir() if f.name[:64] not in kept), key=lambda f: f.stat().st_mtime)
        total = sum(file.stat().st_size for file in self.path.iterdir())
        for file in files:
            if total <= CACHE_BYTES and free(self.path) >= needed:
                break
            total -= file.stat().st_size
            file.unlink()
        return free(self.path)

    def lay_out(self, target: Path, files: dict[str, str]) -> None:
        """Put files (relative path -> sha256) below ``target``: as second names of the stored ones, else as copies.

        Raises AgentError: a path that leaves ``target``, or a file that is not here.
        """
        for name, sha in files.items():
            place = target / inside(name)
            place.parent.mkdir(parents=True, exist_ok=True)
            if not self.file(sha).is_file():
                raise AgentError(f"{name} is not there any more: measure again")
            try:
                os.link(self.file(sha), place)
            except OSError:  # a file system without hard links, or Android, which forbids them
                self._copy(self.file(sha), place)

    def _copy(self, source: Path, target: Path) -> None:
        with source.open("rb") as file, target.open("wb") as copy:
            while piece := file.read(PIECE):
                copy.write(piece)
                self._beat()

    def _sha256(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                self._beat()
        return digest.hexdigest()

    def _part(self, sha: str) -> Path:
        file = self.file(sha)
        return file.with_name(file.name + ".part")


def inside(name: object) -> Path:
    """Check that a relative path stays below. Raises AgentError: it is absolute, climbs, or is no path."""
    path = PurePosixPath(name) if isinstance(name, str) and name and "\0" not in name else PurePosixPath("/")
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise AgentError(f"{name!r} leaves the folder that it belongs to")
    return Path(path)


def free(folder: Path) -> int:
    """Bytes that this user may still write there."""
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


def full(folder: Path, needed: int = 0) -> str:
    """Say why something does not fit, in one line; ``needed`` bytes, where that is known."""
    left = 0
    with contextlib.suppress(OSError):
        left = free(folder)
    need = f"{needed / 1e6:.0f} MB are needed in {folder} and " if needed else f"in {folder} "
    return (
        f"the disk is full: {need}{left / 1e6:.0f} MB are free: free some, or name another folder there in SAAP_CACHE"
    )


def _alone(file: IO[bytes]) -> None:
    """Lock the file: a request whose connection was cut may still be writing what had arrived."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AgentError("it is still being written", again=True) from None

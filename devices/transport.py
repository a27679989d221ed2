"""Ways to run a command on a board: OpenSSH or adb as a process of its own, or a process here.

A transport only says how to start one fixed command and what its failures mean; what goes to the board travels on
standard input, so nothing that a person typed becomes part of a shell's line. ssh reads the user's own configuration
(jump hosts, agents, keys) and checks host keys strictly: an unknown or changed key is refused, never accepted here.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from saap.base.errors import UserError

FORMS = "ssh://user@host[:port], adb://[serial], labgrid://PLACE or local://"
# A name that cannot be taken for an option and holds nothing that ssh would expand.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:%-]*")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@\\-]*")
CONNECT_S = 10
MOST_SOCKET = 50  # characters of the folder; a socket's path may have about 100, and ssh adds 57


class BoardError(UserError):
    """A board that cannot be used; one line that names it and says what to do."""


class LostError(BoardError):
    """The connection is gone, and may come back."""


class Transport:
    """A way to one board."""

    name: str  # as a person wrote it

    def argv(self, command: str) -> list[str]:
        """Return the process that runs ``command``, a fixed line, by a shell on the board."""
        raise NotImplementedError

    def failure(self, code: int, stderr: str) -> BoardError:
        """Explain an end with an exit code above 0 and without an answer."""
        raise NotImplementedError

    def drop(self) -> None:
        """Forget a shared connection that may be dead."""

    def close(self) -> None:
        """Leave no process and no file here."""


class Local(Transport):
    """This host, by the same protocol as a board."""

    def __init__(self) -> None:
        self.name = "local://"

    def argv(self, command: str) -> list[str]:
        return ["sh", "-c", command]

    def failure(self, code: int, stderr: str) -> BoardError:
        return _crashed(self.name, code, stderr)  # there is no connection that could be lost


class Ssh(Transport):
    """A board by OpenSSH; all commands share one connection.

    Args:
        host, user, port: None leaves them to the user's ssh configuration.
        options: more of ssh's own options, such as ``("-i", key)``; from a program, never from a board.
    """

    def __init__(
        self, host: str, user: str | None = None, port: int | None = None, options: Sequence[str] = ()
    ) -> None:
        self.host, self.user, self.port = host, user, port
        shown = f"[{host}]" if ":" in host else host
        self.name = f"ssh://{f'{user}@' if user else ''}{shown}{f':{port}' if port else ''}"
        self._options = list(options)
        self._sockets: Path | None = None

    def argv(self, command: str) -> list[str]:
        return [*self._ssh(), "--", self.host, command]

    def _ssh(self) -> list[str]:
        if self._sockets is None:
            self._sockets = Path(tempfile.mkdtemp(prefix="saap-ssh-"))
        settings = [
            "BatchMode=yes", "StrictHostKeyChecking=yes", "ClearAllForwardings=yes", "RemoteCommand=none",
            "ServerAliveInterval=5", "ServerAliveCountMax=3", f"ConnectTimeout={CONNECT_S}",
        ]  # fmt: skip
        if len(str(self._sockets)) <= MOST_SOCKET:
            settings += ["ControlMaster=auto", f"ControlPath={self._sockets}/%C", "ControlPersist=60"]
        who = [*(["-l", self.user] if self.user else []), *(["-p", str(self.port)] if self.port else [])]
        return ["ssh", "-T", *(part for setting in settings for part in ("-o", setting)), *who, *self._options]

    def failure(self, code: int, stderr: str) -> BoardError:
        """Explain by OpenSSH's words; 255 is its own failure, any other code the command's."""
        if code != 255:  # a file that the agent may not write there has its "Permission denied", too
            return _crashed(self.name, code, stderr)
        known = f"[{self.host}]:{self.port}" if self.port and self.port != 22 else self.host
        if "REMOTE HOST IDENTIFICATION HAS CHANGED" in stderr:
            return BoardError(
                f"{self.name}: its host key changed: it was installed anew, or somebody is in between; if you know "
                f"why, `ssh-keygen -R '{known}'`, then connect once with ssh and check the new key"
            )
        if "Host key verification failed" in stderr or "host key is known for" in stderr:
            return BoardError(f"{self.name}: its host key is unknown: connect once with ssh and check the key")
        if "Permission denied" in stderr or "Too many authentication failures" in stderr:
            return BoardError(f"{self.name}: it refuses your key: `ssh-copy-id` it there (no password is asked for)")
        if not stderr.strip():  # what a client of a shared connection says when that is cut
            return LostError(f"{self.name}: the connection ended")
        return LostError(f"{self.name}: no connection: {last_line(stderr)}: is it on, and is the address right?")

    def drop(self) -> None:
        if self._sockets is not None and any(self._sockets.glob("*")):
            self._control("exit")
            for socket in self._sockets.glob("*"):
                socket.unlink(missing_ok=True)

    def close(self) -> None:
        self.drop()
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
            self._sockets = None

    def _control(self, what: str) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                [*self._ssh(), "-O", what, "--", self.host], stdin=subprocess.DEVNULL, capture_output=True,
                timeout=CONNECT_S, check=False,
            )  # fmt: skip


class Adb(Transport):
    """An Android device by ``adb shell``, which passes standard input and exit codes since Android 7.

    Connections are kept by adb's own server.

    Args:
        serial: None where there is one device only.
    """

    def __init__(self, serial: str | None = None) -> None:
        self.serial = serial
        self.name = f"adb://{serial or ''}"

    def argv(self, command: str) -> list[str]:
        return ["adb", *(["-s", self.serial] if self.serial else []), "shell", "-T", command]

    def failure(self, code: int, stderr: str) -> BoardError:
        """Explain by adb's words, whose own lines begin with its name or ``error:``; others are the agent's."""
        own = any(line.startswith(("adb: ", "error: ")) for line in stderr.splitlines())
        if stderr.strip() and not own:
            return _crashed(self.name, code, stderr)
        if "unauthorized" in stderr:
            return BoardError(
                f"{self.name}: it does not allow debugging yet: confirm this computer's key on its screen"
            )
        if "more than one device" in stderr:
            return BoardError(f"{self.name}: several devices are attached: give adb://SERIAL, see `adb devices`")
        if not own:  # what adb tells of a cable that was pulled
            return LostError(f"{self.name}: the connection ended")
        return LostError(f"{self.name}: no such device: {last_line(stderr)}: see `adb devices`")


def open_transport(url: str, options: Sequence[str] = ()) -> Transport:
    """Open the transport that ``url`` names, which is not of a farm; nothing is connected yet.

    Args:
        options: as those of :class:`Ssh`.

    Raises:
        BoardError: no such form, a name that no host has, or the program is not installed here.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise BoardError(f"{_shown(url)!r} names no board: give {FORMS}") from None
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.password is not None:
        raise BoardError(f"{_shown(url)!r} names no board: give {FORMS}, without path or password")
    if parts.scheme == "local" and not parts.netloc:
        return Local()
    if parts.scheme == "adb" and (not parts.netloc or _HOST.fullmatch(parts.netloc)):
        _needs("adb", "Android's platform-tools")
        return Adb(parts.netloc or None)
    host, user = _as_written(parts.hostname, parts.netloc), parts.username
    if parts.scheme == "ssh" and host and _HOST.fullmatch(host) and (user is None or _USER.fullmatch(user)):
        _needs("ssh", "OpenSSH's client")
        return Ssh(host, user, port, options)
    raise BoardError(f"{url!r} names no board: give {FORMS}")


def last_line(text: str) -> str:
    """Return the last line of a program's output, in printable characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(lines[-1])[:300] if lines else "it said nothing"


def printable(text: object) -> str:
    """One line without control characters: the text comes from another machine."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))[:1000]


def _crashed(name: str, code: int, stderr: str) -> BoardError:
    return BoardError(f"{name}: the agent ended with exit {code}: {last_line(stderr)}")


def _as_written(host: str | None, netloc: str) -> str | None:
    """Return the host in the user's letters: ``Host Board`` of an ssh configuration does not match ``board``."""
    at = netloc.lower().rfind(host) if host else -1
    return host if host is None or at < 0 else netloc[at : at + len(host)]


def _needs(program: str, what: str) -> None:
    if shutil.which(program) is None:
        raise BoardError(f"{program} is not installed here: install {what}")


def _shown(url: str) -> str:
    """Without its password, which must not be in a message."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:...@", url)

"""A real sshd on 127.0.0.1 at a free port, with throwaway keys: what a board is to `saap bench --on`.

The board has a PATH and a home of its own (sshd's SetEnv), and here is a wrapper of ssh that reads only the test's own
configuration, so that neither the developer's keys nor known hosts are read or written.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def require_sshd() -> str:
    """Its path; skips where it is not installed."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("no sshd: install openssh-server to test `saap bench --on`")
    return SSHD


class Sshd:
    """The server; ``url`` is for ``--on``."""

    def __init__(self, folder: Path, path: str) -> None:
        self.folder, self.path = folder, path
        self.home = folder / "home"  # also keeps the developer's own login scripts out
        self.cache = self.home / ".cache/saap"
        self.port = _free_port()
        self.environment = {"PATH": path, "HOME": str(self.home)}
        self.home.mkdir(parents=True)
        for name in ("host", "user"):
            keygen(folder / name)
        (folder / "authorized").write_text((folder / "user.pub").read_text())
        (folder / "authorized").chmod(0o600)
        self._process: subprocess.Popen[bytes] | None = None
        self.known = folder / "known_hosts"
        self.trust()
        self._client()

    @property
    def url(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"

    def trust(self) -> None:
        """What connecting once by hand and checking the key does."""
        kind, key, *_ = (self.folder / "host.pub").read_text().split()
        self.known.write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    def start(self) -> Sshd:
        config = self.folder / "sshd_config"
        pairs = " ".join(f'"{name}={value}"' for name, value in self.environment.items())
        lines = (
            f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {self.folder}/host",
            f"AuthorizedKeysFile {self.folder}/authorized", f"PidFile {self.folder}/pid", "StrictModes no",
            "UsePAM no", "PasswordAuthentication no", "PermitRootLogin prohibit-password", f"SetEnv {pairs}",
            "MaxStartups 100",
        )  # fmt: skip
        config.write_text("\n".join(lines) + "\n")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # privilege separation of an sshd that root starts
        log = (self.folder / "sshd.log").open("ab")
        self._process = subprocess.Popen([require_sshd(), "-D", "-e", "-f", str(config)], stdout=log, stderr=log)
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.05)
        raise AssertionError((self.folder / "sshd.log").read_text())

    def cut(self) -> int:
        """End every connection, not the server; how many processes there were."""
        assert self._process is not None
        children = psutil.Process(self._process.pid).children(recursive=True)
        mine = [child for child in children if _name(child).startswith("sshd")]
        for child in mine:
            with suppress(psutil.NoSuchProcess):  # one may end by itself, as the client did
                child.kill()
        return len(mine)

    def stop(self) -> None:
        if self._process is not None:
            self.cut()
            self._process.terminate()
            self._process.wait()
            self._process = None

    def _client(self) -> None:
        config = self.folder / "ssh_config"
        config.write_text(
            f"IdentityFile {self.folder}/user\nIdentitiesOnly yes\nIdentityAgent none\n"
            f"UserKnownHostsFile {self.known}\nGlobalKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )
        self.bin = self.folder / "bin"
        self.bin.mkdir()
        ssh = shutil.which("ssh")
        script = self.bin / "ssh"
        script.write_text(f'#!/bin/sh\necho x >>{self.folder}/calls\nexec {ssh} -F {config} "$@"\n')
        script.chmod(0o755)


def keygen(path: Path) -> None:
    """A new key in place of the one that is there."""
    path.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

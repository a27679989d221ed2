"""A real labgrid coordinator and exporters on 127.0.0.1, whose only board is the sshd of the other tests.

Places: `pi` (network, alias `raspberry`), `dark` (power only), `two` (two networks) and `behind` (reached by a jump
over its exporter).
"""

import getpass
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.remote_runs import VENV
from support.sshd import Sshd, require_sshd

BEGIN_S = 30.0
PLACES = {"pi": "lab", "dark": "lab", "two": "lab", "behind": "closed"}  # with their exporters


def require_labgrid() -> None:
    """Skips where it is not installed."""
    pytest.importorskip("labgrid", reason="labgrid is not installed: pip install 'saap[labgrid]' to test labgrid://")


class Farm:
    """The farm; ``sshd`` is its board."""

    def __init__(self, folder: Path) -> None:
        require_labgrid()
        require_sshd()
        self.folder = folder
        self.sshd = Sshd(folder / "sshd", VENV)
        self._processes: list[subprocess.Popen[str]] = []
        self.address = ""

    def start(self) -> None:
        self.sshd.start()
        (self.folder / "places.yaml").write_text(json.dumps({name: _place(name) for name in PLACES}))
        self.address = self._begin("coordinator", r"listening on (.+)", "-l", "127.0.0.1:0")
        self._export("lab")
        self._export("closed", "--isolated")

    def acquire(self, place: str = "pi", user: str | None = None) -> None:
        self.client("-p", place, "acquire", user=user)

    def release(self, place: str = "pi", user: str | None = None) -> None:
        self.client("-p", place, "release", user=user)

    def client(self, *arguments: str, user: str | None = None) -> str:
        """Run `labgrid-client` as a user, and return its output."""
        done = subprocess.run(
            [sys.executable, "-m", "labgrid.remote.client", "-x", self.address, *arguments],
            env={**os.environ, **({"LG_USERNAME": user} if user else {})}, cwd=self.folder, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.sshd.stop()

    def _export(self, name: str, *options: str) -> None:
        board = {"address": "127.0.0.1", "username": getpass.getuser(), "port": self.sshd.port}
        groups = {
            "lab": {
                "pi": {"NetworkService": board},
                "dark": {"NetworkPowerPort": {"model": "rest", "host": "http://127.0.0.1/{index}", "index": 1}},
                "two": {label: {"cls": "NetworkService", **board} for label in ("one", "other")},
            },
            "closed": {"behind": {"NetworkService": board}},
        }
        (self.folder / f"{name}.yaml").write_text(json.dumps(groups[name], indent=2))  # which is YAML, too
        options = ("-c", self.address, "-n", name, "--hostname", "127.0.0.1", *options, f"{self.folder}/{name}.yaml")
        self._begin("exporter", r"(Exporter ready)", *options)

    def _begin(self, kind: str, ready: str, *options: str) -> str:
        log = self.folder / f"{kind}{len(self._processes)}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", f"labgrid.remote.{kind}", *options],
                stdout=out, stderr=out, text=True, cwd=self.folder,
            )  # fmt: skip
        self._processes.append(process)
        end = time.monotonic() + BEGIN_S
        while time.monotonic() < end and process.poll() is None:
            if line := re.search(ready, log.read_text()):
                return line[1]
            time.sleep(0.05)
        raise AssertionError(f"labgrid's {kind} did not begin:\n{log.read_text()}")


def _place(name: str) -> dict[str, object]:
    """A place as the coordinator stores it."""
    match = {"exporter": PLACES[name], "group": name, "cls": "*", "name": None, "rename": None}
    return {"matches": [match], "aliases": ["raspberry"] if name == "pi" else []}

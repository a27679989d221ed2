"""A real labgrid coordinator and exporter on 127.0.0.1, whose only board is the sshd of the other tests.

Its power is a relay behind HTTP, as labgrid's driver `rest` expects one; switching it starts and stops that sshd, so
power is really switched. Places: `pi` (network and power, tags board=pi, rack=a), `dark` (power only), `two` (two
networks), `gone` (matches nothing) and `behind` (reached by a jump over its exporter).
"""

from __future__ import annotations

import getpass
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.remote_runs import VENV
from support.sshd import Sshd, require_sshd

from bench.remote.labgrid_session import _pb2, ask

BEGIN_S = 30.0


def require_labgrid() -> None:
    """Skips where it is not installed."""
    pytest.importorskip("labgrid", reason="labgrid is not installed: pip install 'saap[labgrid]' to test labgrid://")


class Farm:
    """The farm; ``sshd`` is its board, ``switched`` what was done to its power."""

    def __init__(self, folder: Path) -> None:
        require_labgrid()
        require_sshd()
        self.folder = folder
        self.sshd = Sshd(folder / "sshd", VENV)
        self.switched: list[str] = []
        self.on = False
        self.relay = _relay(self)
        self._processes: list[subprocess.Popen[str]] = []
        self.address, self.log = "", folder

    def start(self) -> None:
        self.log, self.address = self._begin("coordinator", r"listening on (.+)", "-l", "127.0.0.1:0")
        self._export("lab")
        self._export("closed", "--isolated")
        ask(self.address, self._places)

    def acquire(self, user: str | None = None) -> None:
        self._as(user, "AcquirePlace", _pb2().AcquirePlaceRequest(placename="pi"))

    def release(self, user: str | None = None) -> None:
        self._as(user, "ReleasePlace", _pb2().ReleasePlaceRequest(placename="pi"))

    def reserve(self, user: str) -> str:
        """The reservation's token."""
        named = _pb2().Reservation.Filter(filter={"name": "pi"})
        made = self._as(user, "CreateReservation", _pb2().CreateReservationRequest(filters={"main": named}, prio=0.0))
        return str(made.reservation.token)

    def cancel(self, token: str) -> None:
        self._as(None, "CancelReservation", _pb2().CancelReservationRequest(token=token))

    def _as(self, user: str | None, call: str, request: object) -> Any:
        """As `labgrid-client` of that user asks it."""

        async def act(session: Any) -> Any:
            return await getattr(session.stub, call)(request)

        with mock.patch.dict(os.environ, {"LG_USERNAME": user} if user else {}):
            return ask(self.address, act)

    def power(self, on: bool) -> None:
        """Without a switch."""
        if on and not self.on:
            self.sshd.start()
        if self.on and not on:
            self.sshd.stop()
        self.on = on

    def holder(self, place: str) -> str | None:
        """Who has acquired a place."""
        return self._state()[0][place]

    def is_free(self) -> bool:
        """No place is acquired, and no reservation is left."""
        holders, reservations = self._state()
        return not any(holders.values()) and not reservations

    def clear(self) -> None:
        """So that one test that fails does not make the next one wait."""

        async def clear(session: Any) -> None:
            told = await session.stub.GetReservations(_pb2().GetReservationsRequest())
            for reservation in told.reservations:
                await session.stub.CancelReservation(_pb2().CancelReservationRequest(token=reservation.token))
            for place in session.places.values():
                if place.acquired:
                    await session.stub.ReleasePlace(_pb2().ReleasePlaceRequest(placename=place.name))

        ask(self.address, clear)

    def acquired(self) -> int:
        """How often a place was acquired until now."""
        return self.log.read_text().count("place acquired by")

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.relay.shutdown()
        self.relay.server_close()
        self.power(False)

    def _state(self) -> tuple[dict[str, str | None], int]:
        async def state(session: Any) -> tuple[dict[str, str | None], int]:
            told = await session.stub.GetReservations(_pb2().GetReservationsRequest())
            return {name: place.acquired for name, place in session.places.items()}, len(told.reservations)

        return ask(self.address, state)

    async def _places(self, session: Any) -> None:
        stub, pb2 = session.stub, _pb2()
        for name in ("pi", "dark", "two", "gone", "behind"):
            await stub.AddPlace(pb2.AddPlaceRequest(name=name))
            exporter = "closed" if name == "behind" else "lab"
            await stub.AddPlaceMatch(pb2.AddPlaceMatchRequest(placename=name, pattern=f"{exporter}/{name}/*"))
        await stub.SetPlaceTags(pb2.SetPlaceTagsRequest(placename="pi", tags={"board": "pi", "rack": "a"}))
        await stub.AddPlaceAlias(pb2.AddPlaceAliasRequest(placename="pi", alias="raspberry"))

    def _export(self, name: str, *options: str) -> None:
        board = {"address": "127.0.0.1", "username": getpass.getuser(), "port": self.sshd.port}
        relay = {
            "model": "rest",
            "host": f"http://127.0.0.1:{self.relay.server_address[1]}/relay/{{index}}",
            "index": 1,
        }
        several = {label: {"cls": "NetworkService", **board} for label in ("one", "other")}
        groups = {
            "lab": {
                "pi": {"NetworkService": board, "NetworkPowerPort": relay},
                "dark": {"NetworkPowerPort": relay},
                "two": several,
            },
            "closed": {"behind": {"NetworkService": board}},
        }
        (self.folder / f"{name}.yaml").write_text(json.dumps(groups[name], indent=2))  # which is YAML, too
        options = ("-c", self.address, "-n", name, "--hostname", "127.0.0.1", *options, f"{self.folder}/{name}.yaml")
        self._begin("exporter", r"(Exporter ready)", *options)

    def _begin(self, kind: str, ready: str, *options: str) -> tuple[Path, str]:
        log = self.folder / f"{kind}{len(self._processes)}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", f"labgrid.remote.{kind}", *options],
                stdout=out, stderr=out, text=True, cwd=self.folder,
            )  # fmt: skip
        self._processes.append(process)
        end = time.monotonic() + BEGIN_S
        while time.monotonic() < end and process.poll() is None:
            if found := re.search(ready, log.read_text()):
                return log, found[1]
            time.sleep(0.05)
        raise AssertionError(f"labgrid's {kind} did not begin:\n{log.read_text()}")


def _relay(farm: Farm) -> ThreadingHTTPServer:
    """`GET` tells the state, `PUT` switches: labgrid/driver/power/rest.py."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(b"1" if farm.on else b"0")

        def do_PUT(self) -> None:
            on = self.rfile.read(int(self.headers["Content-Length"])) == b"1"
            farm.switched.append("on" if on else "off")
            farm.power(on)
            self._answer(b"")

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server

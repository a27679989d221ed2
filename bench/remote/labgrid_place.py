"""``--on labgrid://PLACE``: a board of a labgrid farm, taken for a run and given back.

labgrid queues, acquires and switches power. Only the connection is ours: labgrid's SSHDriver accepts every host key, so
the address of the place's NetworkService goes to our own ssh, which checks them.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from bench.remote import labgrid_session as farm
from bench.remote.board import Board, Say, Stopped
from devices.transport import BoardError, LostError, Transport, last_line, open_transport
from saap.base.child import until_done

SCHEME = "labgrid://"
FORMS = "labgrid://PLACE[@HOST:PORT], or 'labgrid://[@HOST:PORT]?TAG=VALUE' for any place with that tag"
POLL_S = 1.0
POLL_TRIES = 3  # a reservation that is not asked for ends after a minute
SAY_S = 60.0  # between two lines that it still waits
BOOT_S = 300.0
POWER_S = 60.0  # of one command to a switch
RELEASE_WAITS_S = (1.0, 3.0, 0.0)  # after a try
CONFIGURATION = ("LG_ENV", "LG_STATE", "LG_INITIAL_STATE", "STATE")
_PROXY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*(:\d+)?")

T = TypeVar("T")


class PlaceTransport(Transport):
    """Our ssh under the name of the place; what fails also says which address that is."""

    def __init__(self, name: str, ssh: Transport) -> None:
        self.name, self._ssh = name, ssh

    def argv(self, command: str) -> list[str]:
        return self._ssh.argv(command)

    def failure(self, code: int, stderr: str) -> BoardError:
        error = self._ssh.failure(code, stderr)
        return type(error)(f"{self.name} at {error}")

    def drop(self) -> None:
        self._ssh.drop()

    def close(self) -> None:
        self._ssh.close()


class LabgridPlace:
    """What a URL names: a place, or tags of which labgrid chooses one.

    Raises BoardError: no such form, or labgrid is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            parts = urlsplit(url)
            pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except ValueError:
            raise BoardError(f"{url!r} names no place: give {FORMS}") from None
        place, at, coordinator = parts.netloc.rpartition("@") if "@" in parts.netloc else (parts.netloc, "", "")
        self._place = unquote(place)  # of any letters; a reservation may get one that has a slash
        self._filters = dict(pairs)
        wrong = parts.path not in ("", "/") or parts.fragment or (at and not coordinator)
        if wrong or len(pairs) != len(self._filters) or not all(map(all, pairs)) or bool(self._place) == bool(pairs):
            raise BoardError(f"{url!r} names no place: give {FORMS}")
        self._at = at + coordinator
        self._address = coordinator or os.environ.get("LG_COORDINATOR") or farm.DEFAULT
        farm.client()

    @contextlib.contextmanager
    def held(self, stop: threading.Event, say: Say) -> Iterator[Transport]:
        """The way to the board, while it is ours.

        Args:
            stop: set by whoever wants no more; then ``Stopped`` is raised.
            say: told what a person should know, a line each.

        Raises:
            BoardError: naming the URL and what to do.
        """
        taken = farm.Taken()
        with contextlib.ExitStack() as ends:  # in their order, whatever happens: power, connection, place
            ends.callback(_uncut, partial(self._give_back, taken, say), stop)
            found = _uncut(partial(self._acquire, taken, stop, say), stop)
            transport = PlaceTransport(f"{SCHEME}{quote(found.place, safe='')}{self._at}", self._ssh(found))
            ends.callback(transport.close)
            if len(found.switches) > 1:
                names = ", ".join(sorted(found.switches))
                say(f"{self.url}: {found.place} has several power resources ({names}): none of them is switched")
            elif found.switches:
                switch = Switch(self._address, found.place, found.switches[0])
                ends.callback(_uncut, partial(self._switch_off, switch, transport, say), stop)
                _uncut(partial(self._switch_on, switch, transport, stop, say), stop)
            yield transport

    def _acquire(self, taken: farm.Taken, stop: threading.Event, say: Say) -> farm.Found:
        name = self._place or self._queue(taken, stop, say)
        found = self._ask(partial(farm.acquire, name=name, at=self._at, taken=taken))
        say(f"{self.url}: {found.place} is acquired" + ("" if taken.place else " by you already, and stays so"))
        return found

    def _queue(self, taken: farm.Taken, stop: threading.Event, say: Say) -> str:
        """Wait until labgrid allocates a place, however long its other users take."""
        holders = self._ask(partial(farm.reserve, filters=self._filters, taken=taken), answer_s=farm.QUICK_S)
        begin, said = time.monotonic(), -SAY_S
        while (place := self._allocated(str(taken.token), stop)) is None:
            waited = time.monotonic() - begin
            if waited - said >= SAY_S:
                said = waited
                say(f"{self.url}: waiting for {waited:.0f} s, of {holders} when it began; Ctrl-C gives up")
            if stop.wait(POLL_S):
                raise Stopped
        return place

    def _allocated(self, token: str, stop: threading.Event) -> str | None:
        """Ask more than once: a lost answer must not cost a place in the queue."""
        for tries_left in reversed(range(POLL_TRIES)):
            try:
                return self._ask(partial(farm.allocated, token=token), listen=False, answer_s=farm.QUICK_S)
            except farm.LostFarmError:
                if not tries_left:
                    raise
            if stop.wait(POLL_S):
                raise Stopped
        return None

    def _ssh(self, found: farm.Found) -> Transport:
        """Our ssh to the place's only NetworkService."""
        if not found.services:
            raise BoardError(
                f"{self.url}: {found.place} has no NetworkService, which says where its ssh is: export one (address, "
                "username, port), or add a match for it to the place"
            )
        if len(found.services) > 1:
            raise BoardError(
                f"{self.url}: {found.place} has several NetworkServices ({', '.join(sorted(found.services))}): leave "
                "it a match of one, or acquire it yourself and give ssh://user@host:port"
            )
        (service,) = found.services.values()
        address, extra = service.address, service.extra or {}
        if "%" in address:
            raise BoardError(
                f"{self.url}: {address} is reached by an interface of its exporter, which needs labgrid-bound-connect: "
                "acquire the place yourself and give ssh://, with a ProxyCommand in your ssh configuration"
            )
        proxy = str(extra.get("proxy") or "") if extra.get("proxy_required") else os.environ.get("LG_PROXY")
        if proxy and not _PROXY.fullmatch(proxy):
            raise BoardError(f"{self.url}: its proxy {proxy!r} is no host: see the exporter's configuration")
        host = f"[{address}]" if ":" in address else address
        return open_transport(f"ssh://{service.username}@{host}:{service.port}", ["-J", proxy] if proxy else [])

    def _switch_on(self, switch: Switch, transport: Transport, stop: threading.Event, say: Say) -> None:
        """Switch it on if it is off, and wait until it answers."""
        if switch.is_on():
            return
        switch.turn("on")
        stays = "" if switch.switched else " (whether it was on its switch does not tell, so it stays on)"
        say(f"{self.url}: {switch.place} is switched on{stays}; waiting until it answers")
        board, begin = Board(transport, stop), time.monotonic()
        while True:
            try:
                board.ask("hello")
                return
            except LostError as error:
                transport.drop()
                if time.monotonic() - begin > BOOT_S:
                    raise BoardError(f"{error}; it was switched on {BOOT_S:.0f} s ago") from None
            if stop.wait(POLL_S):
                raise Stopped

    def _switch_off(self, switch: Switch, transport: Transport, say: Say) -> None:
        """Leave the power as it was found, after syncing the board's disk."""
        if not switch.switched:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            _run(transport.argv("sync"))
        try:
            switch.turn("off")
        except BoardError as error:
            say(f"{self.url}: it stays switched on: {error}")

    def _give_back(self, taken: farm.Taken, say: Say) -> None:
        """Release the place. A failure is reported and not raised, so that no result is lost for it."""
        place = taken.place
        if place is None and taken.token is None:
            return
        for wait_s in RELEASE_WAITS_S:
            try:
                answer_s = farm.ANSWER_S if taken.place else farm.QUICK_S
                other = self._ask(partial(farm.give_back, taken=taken), answer_s=answer_s)
            except BoardError as error:
                why = str(error)
                time.sleep(wait_s)
                continue
            if other is not None:
                say(f"{self.url}: {place} was released before its time, and is of {other} now: do not trust the result")
            return
        what = f"{place} could not be released, `labgrid-client -p {place} release` does" if place else "no reservation"
        say(f"{what}: {why}")

    def _ask(self, question: farm.Question[T], listen: bool = True, answer_s: float = farm.ANSWER_S) -> T:
        try:
            return farm.ask(self._address, question, listen, answer_s)
        except BoardError as error:
            raise type(error)(f"{self.url}: {error}") from None


@dataclass
class Switch:
    """The power of a place, by `labgrid-client power`, which knows the driver of each kind of switch.

    In a process of its own: its drivers print, block, and share one manager of places.
    """

    address: str  # of the coordinator
    place: str
    name: str
    switched: bool = False  # it was off, and was switched on here

    def is_on(self) -> bool | None:
        """None where the switch does not tell."""
        code, said = self._power("get")
        state = said.rpartition(" is ")[2] if code == 0 else ""
        self.switched = state == "off"
        return {"on": True, "off": False}.get(state)

    def turn(self, action: str) -> None:
        """Switch it ``on`` or ``off``. Raises BoardError: it did not work."""
        code, said = self._power(action)
        if code:
            self.switched = False
            raise BoardError(f"`labgrid-client -p {self.place} power {action}` failed: {said}: see to {self.name}")

    def _power(self, action: str) -> tuple[int, str]:
        which = ["-x", self.address, f"--place={self.place}", "power", action, f"--name={self.name}"]
        try:
            # The labgrid of this Python, whatever PATH has; in a folder that holds no other package of its name.
            done = _run([sys.executable, "-m", "labgrid.remote.client", *which], cwd="/", env=_without_configuration())
        except subprocess.TimeoutExpired:
            return 1, f"no answer within {POWER_S:.0f} s"
        return done.returncode, last_line(done.stdout if done.returncode == 0 else done.stderr)


def is_place(url: str) -> bool:
    return url.startswith(SCHEME.rstrip("/"))


def _run(
    argv: Sequence[str], cwd: str | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=POWER_S, check=False,
        start_new_session=True,  # an interrupt from the keyboard must not stop what gives a board back
    )  # fmt: skip


def _without_configuration() -> dict[str, str]:
    """Our environment without labgrid's own settings, which may name other places or an initial state."""
    return {name: value for name, value in os.environ.items() if name not in CONFIGURATION}


def _uncut(work: Callable[[], T], stop: threading.Event) -> T:
    """Run in a thread of its own, so that an interrupt does not cut a request to the farm in two."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            until_done([future])
        except KeyboardInterrupt:
            stop.set()
            raise
        return future.result()

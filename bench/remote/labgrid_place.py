"""``--on labgrid://PLACE``: the board of a place in a labgrid farm, which its user has acquired.

Queueing, tags, acquiring and power are labgrid-client's. Two things are ours. The coordinator is asked for the address
of the place's ssh in a process of its own, because labgrid replaces a process's exception hook and gRPC keeps polling
an event loop that has ended. And our own ssh connects, because labgrid's SSHDriver accepts every host key.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

import msgspec

from devices.transport import BoardError, Transport, open_transport, printable
from saap.base.child import ChildFailedError, call, job_and_tell
from saap.base.wording import installing

if TYPE_CHECKING:
    from labgrid.remote.client import ClientSession
    from labgrid.remote.common import Place

SCHEME, FORM = "labgrid://", "labgrid://PLACE[@HOST:PORT]"
PORT = 20408
DEFAULT = f"127.0.0.1:{PORT}"  # as labgrid-client
CONNECT_S = 15.0
ANSWER_S = 60.0
MOST_NAMES = 10
_PROXY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*(:\d+)?")


class Question(msgspec.Struct):
    """A place, and the coordinator that knows it."""

    address: str  # HOST[:PORT]
    place: str  # its name or an alias


class Service(msgspec.Struct):
    """A NetworkService: the address of a place's ssh."""

    place: str  # its name, where an alias was asked for
    address: str
    username: str
    port: int = 22
    extra: dict[str, object] | None = None


class PlaceTransport(Transport):
    """Our ssh under the name of the place; its errors name the place and the address."""

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


def is_place(url: str) -> bool:
    return url.startswith(SCHEME.rstrip("/"))


def open_place(url: str) -> Transport:
    """Open a transport to the board of a place; nothing is connected yet.

    Raises BoardError: the URL names no place, labgrid is not installed, no coordinator answers, or the place is not
    acquired by this user on this host or has no ssh.
    """
    place, coordinator = _parts(url)
    address = coordinator or os.environ.get("LG_COORDINATOR") or DEFAULT
    try:
        answer = call("bench.remote.labgrid_place", {"address": address, "place": place}, ANSWER_S)
    except ChildFailedError as error:
        raise BoardError(f"{url}: the labgrid coordinator at {address} could not be asked: {error}") from None
    if "error" in answer:
        raise BoardError(f"{url}: {answer['error']}")
    service = msgspec.convert(answer, Service, strict=False)
    name = SCHEME + quote(service.place, safe="") + (f"@{coordinator}" if coordinator else "")
    return PlaceTransport(name, _ssh(url, service))


def _parts(url: str) -> tuple[str, str]:
    """Split a URL into the place and, where it names one, the coordinator."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise BoardError(f"{url!r} names no place: give {FORM}") from None
    if parts.query:
        raise BoardError(
            f"{url!r} has tags, for which labgrid-client queues: `labgrid-client reserve --wait TAG=VALUE`, then "
            f"`labgrid-client acquire`, then give {FORM}"
        )
    place, at, coordinator = parts.netloc.rpartition("@") if "@" in parts.netloc else (parts.netloc, "", "")
    if parts.path not in ("", "/") or parts.fragment or not place or bool(at) != bool(coordinator):
        raise BoardError(f"{url!r} names no place: give {FORM}")
    return unquote(place), coordinator


def _ssh(url: str, service: Service) -> Transport:
    address, extra = service.address, service.extra or {}
    if "%" in address:
        raise BoardError(
            f"{url}: {address} is reached by an interface of its exporter, which needs labgrid-bound-connect: "
            "give ssh:// instead, with a ProxyCommand in your ssh configuration"
        )
    proxy = str(extra.get("proxy") or "") if extra.get("proxy_required") else os.environ.get("LG_PROXY")
    if proxy and not _PROXY.fullmatch(proxy):
        raise BoardError(f"{url}: its proxy {proxy!r} is no host: see the exporter's configuration")
    host = f"[{address}]" if ":" in address else address
    return open_transport(f"ssh://{service.username}@{host}:{service.port}", ["-J", proxy] if proxy else [])


async def service_of(question: Question) -> Service:
    """Ask the coordinator. Raises BoardError: one line without the URL, for a person."""
    try:
        from labgrid.remote.client import ClientSession, Error
        from labgrid.util.proxy import proxymanager  # heeds LG_PROXY
    except ImportError as error:
        raise BoardError(
            f"labgrid:// needs labgrid, which cannot be imported here ({error}): pip install {installing('labgrid')}"
        ) from None
    log = logging.Handler(logging.ERROR)
    lines: list[str] = []
    log.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(log)
    target = proxymanager.get_grpc_address(question.address, default_port=PORT)
    session = ClientSession(target, asyncio.get_running_loop())
    try:
        try:
            await asyncio.wait_for(session.start(), CONNECT_S)
        except (asyncio.TimeoutError, ConnectionError, Error):
            why = f" ({printable(lines[0])})" if lines else ""
            raise BoardError(
                f"no labgrid coordinator answers at {question.address}{why}: set LG_COORDINATOR=HOST:PORT, or give "
                "labgrid://PLACE@HOST:PORT"
            ) from None
        return _service(session, _place(session, question.place))
    except Error as error:  # such as an exporter that is gone
        raise BoardError(f"{printable(' '.join(map(str, error.args)))}: see `labgrid-client resources`") from None
    finally:
        with contextlib.suppress(Exception):  # the answer is complete
            await session.stop()
            await session.close()


def _place(session: ClientSession, name: str) -> Place:
    """Return the place of a full name or alias. Part of a name, which labgrid-client takes, could be another board."""
    if name in session.places:
        return session.places[name]
    for place in session.places.values():
        if any(alias in (name, f"{session.getuser()}:{name}") for alias in place.aliases):
            return place
    raise BoardError(f"no place or alias is called {name!r}; places are {_some(sorted(session.places))}")


def _service(session: ClientSession, place: Place) -> Service:
    """Return the only NetworkService of a place that this user acquired on this host, or was allowed to use."""
    acquire = f"`labgrid-client -p {place.name} acquire`"
    if not place.acquired:
        raise BoardError(f"{place.name} is not acquired: {acquire} first (`labgrid-client reserve` queues for it)")
    if f"{session.gethostname()}/{session.getuser()}" not in {place.acquired, *place.allowed}:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(place.changed))
        raise BoardError(
            f"{place.name} is acquired by {printable(place.acquired)} (last change {since}): wait until it is free, "
            f"then {acquire}"
        )
    resources = session.get_target_resources(place)
    services = {label: resource for (label, kind), resource in resources.items() if kind == "NetworkService"}
    if not services:
        raise BoardError(
            f"{place.name} has no NetworkService, the address of its ssh: export one (address, username, port), or add "
            "a match for it to the place"
        )
    if len(services) > 1:
        raise BoardError(
            f"{place.name} has several NetworkServices ({_some(sorted(services))}): leave it a match of one, or give "
            "ssh://user@host:port"
        )
    (service,) = services.values()
    return msgspec.convert({**service.params, "place": place.name}, Service, strict=False)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return printable(", ".join(names[:MOST_NAMES]) + rest) if names else "none"


def main() -> None:
    """Answer one question, as a child of :func:`open_place`."""
    question, tell = job_and_tell(Question)
    try:
        tell(msgspec.to_builtins(asyncio.run(service_of(question))))
    except BoardError as error:
        tell({"error": str(error)})


if __name__ == "__main__":
    main()

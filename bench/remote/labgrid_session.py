"""What is asked of a labgrid coordinator: which places there are, one of them for a while, and then to have it back.

This speaks through labgrid's own ``ClientSession`` and not through the ``labgrid-client`` command: what the session
gives are objects of labgrid's protocol, which clients and coordinators of several releases share, while the command
prints for people, and leaves out what a resource says of its proxy. Every conversation is short: a place stays acquired
when its client disconnects, so no connection has to outlive a run.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import msgspec

from devices.transport import BoardError, printable

if TYPE_CHECKING:
    from labgrid.remote.client import ClientSession
    from labgrid.remote.common import Place

DEFAULT = "127.0.0.1:20408"  # as labgrid-client
PORT = 20408
CONNECT_S = 15.0
ANSWER_S = 60.0  # of places: a coordinator asks the exporter of every resource in turn
QUICK_S = 15.0  # of reservations, which it keeps itself
MOST_NAMES = 10
# What `labgrid-client power` takes for a switch, but for GPIOs, which may as well choose what a board boots from.
POWER = frozenset(
    f"{kind}PowerPort" for kind in ("Network", "NetworkUSB", "NetworkSiSPM", "NetworkYKUSH", "Tasmota")
) | {"PDUDaemonPort"}  # fmt: skip
_ONE = threading.Lock()  # one conversation at a time: what labgrid logs meanwhile is of it

T = TypeVar("T")
Question = Callable[["ClientSession"], Awaitable[T]]


class LostFarmError(BoardError):
    """The coordinator did not answer."""


@dataclass
class Taken:
    """What was taken for a run, written down before it is taken, so that an error leaves nothing behind."""

    place: str | None = None  # acquired by this run; None for one that its user had acquired, which is left so
    token: str | None = None  # of a reservation


class Service(msgspec.Struct):
    """A NetworkService: where a place's ssh is."""

    address: str
    username: str
    port: int = 22
    extra: dict[str, object] | None = None


@dataclass(frozen=True)
class Found:
    """A place that may be used: its name and its resources."""

    place: str
    services: dict[str, Service] = field(default_factory=dict)  # by name
    switches: list[str] = field(default_factory=list)


def client() -> ModuleType:
    """labgrid's client. Raises BoardError: it is not installed."""
    hook = sys.excepthook
    try:
        from labgrid.remote import client as found
    except ImportError as error:
        raise BoardError(
            f"labgrid:// needs labgrid, which cannot be imported here ({error}): pip install 'saap[labgrid]'"
        ) from None
    finally:
        sys.excepthook = hook  # which labgrid replaces
    return found  # type: ignore[no-any-return]


def ask(address: str, question: Question[T], listen: bool = True, answer_s: float = ANSWER_S) -> T:
    """One conversation with the coordinator.

    Args:
        address: ``HOST[:PORT]``.
        question: gets a ``ClientSession``.
        listen: read all places and resources first.
        answer_s: after which there is none.

    Raises:
        LostFarmError: it cannot be reached.
        BoardError: it refuses, in its own words.
    """
    labgrid, lines = client(), list[str]()
    import grpc  # labgrid needs it

    try:
        with _ONE, _quiet(lines):
            return _in_the_loop(_talk(labgrid, address, question, listen, answer_s))
    except (asyncio.TimeoutError, ConnectionError, grpc.aio.AioRpcError) as error:
        if isinstance(error, grpc.aio.AioRpcError) and error.code() != grpc.StatusCode.UNAVAILABLE:
            raise BoardError(printable(error.details())) from None
        why = f" ({printable(lines[0])})" if lines else ""
        raise LostFarmError(
            f"no labgrid coordinator answers at {address}{why}: set LG_COORDINATOR=HOST:PORT, or give "
            "labgrid://PLACE@HOST:PORT"
        ) from None
    except labgrid.Error as error:
        raise BoardError(printable(" ".join(map(str, error.args)))) from None


async def reserve(session: ClientSession, filters: Mapping[str, str], taken: Taken) -> str:
    """Queue for a place with these tags; who holds the ones that there are."""
    fitting = [
        place for place in session.places.values() if filters.items() <= {**place.tags, "name": place.name}.items()
    ]
    if not fitting:
        tags = sorted({f"{key}={value}" for place in session.places.values() for key, value in place.tags.items()})
        raise BoardError(f"no place has these tags; tags are {_some(tags)}: see `labgrid-client places -v`")
    pb2 = _pb2()
    request = pb2.CreateReservationRequest(filters={"main": pb2.Reservation.Filter(filter=filters)}, prio=0.0)
    taken.token = (await session.stub.CreateReservation(request)).reservation.token
    return ", ".join(f"{p.name} ({_holder(p)})" for p in fitting[:MOST_NAMES])


async def allocated(session: ClientSession, token: str) -> str | None:
    """The place that a reservation got; None while it waits. Asking keeps it alive."""
    from labgrid.remote.common import Reservation, ReservationState

    answer = await session.stub.PollReservation(_pb2().PollReservationRequest(token=token))
    reservation = Reservation.from_pb2(answer.reservation)
    if reservation.state is ReservationState.waiting:
        return None
    if reservation.state in (ReservationState.allocated, ReservationState.acquired):
        return str(reservation.allocations["main"][0])
    raise BoardError(f"the reservation is {reservation.state.name}: run the same command again")


async def acquire(session: ClientSession, name: str, at: str, taken: Taken) -> Found:
    """Acquire a place, unless its user has; what it consists of.

    Args:
        at: ``@HOST:PORT`` of the URL, for a message.

    Raises:
        BoardError: no such place, or it is somebody else's.
    """
    import grpc

    place = _named(session, name)
    me = _me(session)
    queue = f"queue for it with 'labgrid://{at}?name={place.name}'"
    if place.acquired and place.acquired != me and me not in place.allowed:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(place.changed))
        raise BoardError(
            f"{place.name} is acquired by {printable(place.acquired)} (last change {since}): wait until it is free, "
            f"or {queue}"
        )
    if not place.acquired:
        try:
            session.check_matches(place)
        except client().UserError as error:
            why = printable(" ".join(error.args))
            raise BoardError(f"{why}: is its exporter running? See `labgrid-client -p {place.name} show`") from None
        taken.place = place.name  # before it is so: an answer may be lost
        try:
            await session.stub.AcquirePlace(_pb2().AcquirePlaceRequest(placename=place.name))
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.PERMISSION_DENIED):
                raise
            taken.place = None
            why = printable(error.details())
            raise BoardError(f"{why}: see `labgrid-client -p {place.name} show` for who has it, or {queue}") from None
        await session.sync_with_coordinator()
    found = Found(place.name)
    for (label, kind), resource in session.get_target_resources(place).items():
        if kind == "NetworkService":
            found.services[label] = msgspec.convert(dict(resource.params), Service, strict=False)
        elif kind in POWER:
            found.switches.append(label)
    return found


async def give_back(session: ClientSession, taken: Taken) -> str | None:
    """Release the place and cancel the reservation; who has had the place meanwhile, where somebody took it away."""
    other = None
    if taken.place is not None:
        place, me = session.places.get(taken.place), _me(session)
        if place is not None and place.acquired == me:
            await session.stub.ReleasePlace(_pb2().ReleasePlaceRequest(placename=place.name, fromuser=me))
        else:
            other = printable(place.acquired) if place is not None and place.acquired else "nobody"
        taken.place = None
    if taken.token is not None:
        import grpc

        with contextlib.suppress(grpc.aio.AioRpcError):  # it also ends by itself, a minute after it was last asked for
            await session.stub.CancelReservation(_pb2().CancelReservationRequest(token=taken.token))
        taken.token = None
    return other


def _in_the_loop(conversation: Coroutine[object, object, T]) -> T:
    """Run it to its end, or to that of its clean-up where this thread is interrupted."""
    running = asyncio.run_coroutine_threadsafe(conversation, _loop())
    try:
        return running.result()
    finally:
        running.cancel()  # nothing, where it has ended


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The one loop of all conversations, for the life of the process and in a thread of its own.

    gRPC's poller goes on calling a loop that it has met, also after that has ended.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="labgrid", daemon=True)
    thread.start()

    def stop() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(1.0)

    atexit.register(stop)
    return loop


async def _talk(labgrid: ModuleType, address: str, question: Question[T], listen: bool, answer_s: float) -> T:
    from labgrid.util.proxy import proxymanager  # heeds LG_PROXY

    target = proxymanager.get_grpc_address(address, default_port=PORT)
    session = labgrid.ClientSession(target, asyncio.get_running_loop())
    await _connect_alone(session, target)
    try:
        if listen:
            try:
                await asyncio.wait_for(session.start(), CONNECT_S)
            except labgrid.ServerError:  # later ones have other reasons
                raise ConnectionError from None
        return await asyncio.wait_for(question(session), answer_s)
    finally:
        if listen:
            await session.stop()
        await session.close()


async def _connect_alone(session: ClientSession, target: str) -> None:
    """Give a session a connection of its own.

    gRPC lets channels of one process share a connection, and the coordinator knows its clients by connection: a
    conversation that begins before the coordinator has noticed the end of the one before would be refused.
    """
    import grpc
    from labgrid.remote.generated.labgrid_coordinator_pb2_grpc import CoordinatorStub

    await session.channel.close()
    options = {
        "grpc.use_local_subchannel_pool": 1,
        "grpc.keepalive_time_ms": 7500,  # this and the rest as labgrid's client has them
        "grpc.keepalive_timeout_ms": 10000,
        "grpc.http2.ping_timeout_ms": 10000,
        "grpc.http2.max_pings_without_data": 0,
    }
    session.channel = grpc.aio.insecure_channel(target, options=tuple(options.items()))
    session.stub = CoordinatorStub(session.channel)


@contextlib.contextmanager
def _quiet(lines: list[str]) -> Iterator[None]:
    """Keep what labgrid logs; without a handler the root logger would make one that prints, and leave it there."""
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _named(session: ClientSession, name: str) -> Place:
    """By its whole name or alias. labgrid-client also takes a part of one, by which a wrong board could be measured."""
    if name in session.places:
        return session.places[name]
    for place in session.places.values():
        if any(alias in (name, f"{session.getuser()}:{name}") for alias in place.aliases):
            return place
    raise BoardError(f"no place or alias is called {name!r}; places are {_some(sorted(session.places))}")


def _holder(place: Place) -> str:
    if place.acquired:
        return f"acquired by {printable(place.acquired)}"
    return "reserved" if place.reservation else "free"


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return printable(", ".join(names[:MOST_NAMES]) + rest) if names else "none"


def _me(session: ClientSession) -> str:
    return f"{session.gethostname()}/{session.getuser()}"  # LG_HOSTNAME and LG_USERNAME go first


def _pb2() -> ModuleType:
    return import_module("labgrid.remote.generated.labgrid_coordinator_pb2")

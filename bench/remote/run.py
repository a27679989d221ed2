"""A run on boards, whatever is measured there: sent by hash, detached, followed, fetched, and nothing left.

Only what is needed goes to a board (``bench.remote.files``), and the run there is detached from the connection
(``devices.agent.run``). Several boards run at the same time, as they share nothing.

A run that a killed computer left on a board ends itself after a quarter of an hour, and keeps its board busy until
then. So a run is noted here while it lasts, and ended when the same computer measures that board again.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import psutil

from bench.remote.board import Board, Reply, Say
from bench.remote.files import RESERVE_BYTES, Shipment
from bench.remote.labgrid_place import LabgridPlace, is_place
from devices.transport import BoardError, Transport, open_transport, printable
from saap.base.child import until_done
from saap.base.files import cache_directory, parse_json, write_text
from saap.base.progress import Label, Progress

CLOCK_S = 300.0  # by which a board's clock may be off before it is said
LEASE_S = 900.0  # a run that nobody follows for so long ends itself

T = TypeVar("T")


@dataclass(frozen=True)
class Task(Generic[T]):
    """What boards should do.

    ``read`` makes the answer from the board's name and the document that was written there; an invalid one raises
    TypeError, KeyError, AttributeError or ValueError.
    """

    job: Mapping[str, object]  # what bench.remote.job is told beside the places of the bundles
    positions: int | None  # of each bundle's cache, for what memory is needed; None: the measuring process sees to it
    read: Callable[[str, object], T]


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What one board gave: a result or the reason why there is none."""

    url: str
    result: T | None = None
    error: BoardError | None = None

    def value(self) -> T:
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


def routes_to(urls: Sequence[str]) -> list[Route]:
    """How the boards are reached. Raises BoardError: a URL that names no board, or one board twice."""
    routes = [route_to(url) for url in urls]
    if len({route.name for route in routes}) != len(routes):  # ssh://board/ is ssh://board
        raise BoardError("a board is named twice: name each once")
    return routes


def run_on_all(
    routes: Sequence[Route], shipment: Shipment, task: Task[T], progress: Progress | None = None, say: Say | None = None
) -> list[Answer[T]]:
    """Run on every board, all at once; one answer per board, in their order.

    An interrupt cleans the boards up before it goes on. ``progress`` and ``say`` are called from several threads, one
    at a time.
    """
    stop, shown = threading.Event(), _Shown(len(routes), progress, say)
    with ThreadPoolExecutor(len(routes)) as pool:
        futures = [pool.submit(_answer, route, shipment, task, stop, shown) for route in routes]
        try:
            until_done(futures)
        except BaseException:
            stop.set()
            raise
    return [future.result() for future in futures]


def run_on(board: Board, shipment: Shipment, task: Task[T], progress: Progress | None = None) -> T:
    """Run on one board; it is left clean whatever happens. Raises BoardError: naming the board and what to do."""
    told = progress or (lambda label, done, total: None)
    _preflight(board, shipment, task.positions)
    with noted_run(board) as run:
        board.run = run
        try:
            there = board.insist("take", more=lambda: _take(run, shipment))
            _push(board, shipment, there["missing"], told)
            if not there["installed"]:
                names = [name.partition(">")[0] for name in shipment.requirements]
                told(f"install, {', '.join(names)}", 0, 0)
                board.insist("install", more=shipment.install)
            board.insist("start", more=lambda: _start(run, shipment, task))
            done = _follow(board, run, told)
            _check_end(board, done)
            return _fetched(board, board.insist("fetch", more=lambda: {"run": run}), task)
        except KeyError as error:
            raise board.garbage(f"an answer without {error}") from None
        finally:
            board.clean(run)


def own_version() -> dict[str, str]:
    """The version of saap here, whose code ran there."""
    try:
        return {"saap": metadata.version("saap")}
    except metadata.PackageNotFoundError:
        return {}


def _answer(route: Route, shipment: Shipment, task: Task[T], stop: threading.Event, shown: _Shown) -> Answer[T]:
    try:
        with route.held(stop, shown.say) as transport:
            board = Board(transport, stop, shown.say)
            return Answer(route.name, result=run_on(board, shipment, task, shown.of(route.name)))
    except BoardError as error:
        return Answer(route.name, error=error)
    finally:
        shown.ended(route.name)


def _preflight(board: Board, shipment: Shipment, positions: int | None) -> None:
    """Check Python, memory and clock; lock, disk and packages are checked by the requests that need them."""
    facts = board.ask("hello")
    try:
        left = msgspec.convert(facts["available_bytes"], int | None)
        off = msgspec.convert(facts["time"], float) - time.time()
    except (KeyError, ValueError):
        raise board.garbage("no facts") from None
    if left is not None and positions is not None:
        for packed in shipment.packed:
            needed = packed.memory_needed(positions)
            if needed > left:
                raise BoardError(
                    f"{board.name}: {packed.spec} needs about {needed / 1e6:.0f} MB there and {left / 1e6:.0f} MB are "
                    "available: stop other programs, ask for fewer tokens, or export with fewer --bits"
                )
    if abs(off) > CLOCK_S:
        board.say(f"{board.name}: its clock is off by {abs(off):.0f} s: times in the result are the board's")


def _take(run: str, shipment: Shipment) -> Reply:
    owner = f"{_user()}@{socket.gethostname()}"
    return {
        "run": run, "owner": owner, "files": shipment.sizes, "key": shipment.key, "reserve": RESERVE_BYTES,
        "agent_bytes": shipment.agent_bytes,
    }  # fmt: skip


def _push(board: Board, shipment: Shipment, missing: object, told: Progress) -> None:
    sizes = shipment.sizes
    if not isinstance(missing, dict) or any(sha not in sizes for sha in missing):
        raise board.garbage("files that were not asked for")
    if not all(isinstance(there, int) and 0 <= there <= sizes[sha] for sha, there in missing.items()):
        raise board.garbage("other sizes than files have")
    total, sent = sum(sizes[sha] - there for sha, there in missing.items()) / 1e6, 0.0
    for sha, there in missing.items():

        def pushed(at: int, before: float = sent - there / 1e6) -> None:
            told("push (MB)", before + at / 1e6, total)

        board.push(sha, shipment.sources[sha], there, pushed)
        sent += (sizes[sha] - there) / 1e6
    if missing:
        told("push (MB)", total, total)


def _start(run: str, shipment: Shipment, task: Task[T]) -> Reply:
    places = [f"{index}/{packed.place}" for index, packed in enumerate(shipment.packed)]
    return {
        "run": run,
        "key": shipment.key,
        "bundles": [{"name": packed.name, "files": packed.files} for packed in shipment.packed],
        "job": {**task.job, "specs": places},
        "lease_s": LEASE_S,
    }


def _follow(board: Board, run: str, told: Progress) -> Reply:
    """Follow the run to its end, over as many connections as it takes."""
    offset, refused = 0, ""

    def hear(document: Reply) -> None:
        nonlocal offset, refused
        match document:
            case {"line": str(text), "at": int(offset)}:
                with contextlib.suppress(ValueError):  # a library printed something there
                    match parse_json(text):
                        case {"refused": why}:
                            refused = printable(why)
                        case {"label": label, "done": float() | int() as done, "total": float() | int() as total}:
                            told(printable(label), float(done), float(total))

    done = board.insist("follow", told=hear, more=lambda: {"run": run, "offset": offset})
    return {**done, "refused": refused} if refused else done


def _check_end(board: Board, done: Reply) -> None:
    if done.get("rebooted"):
        raise BoardError(
            f"{board.name}: it rebooted in the middle of the run, which is INVALID: see to its power and cooling, "
            "and measure again"
        )
    if done.get("refused"):
        raise BoardError(f"{board.name}: {done['refused']}")
    if done.get("error") or done.get("code") != 0:
        raise BoardError(f"{board.name}: the run failed: {printable(done.get('error', 'no reason'))}")


def _fetched(board: Board, fetched: Reply, task: Task[T]) -> T:
    """The complete document of what was asked for."""
    try:
        text = str(fetched["result"])
        if hashlib.sha256(text.encode()).hexdigest() != fetched["sha256"]:
            raise ValueError("another hash")
        return task.read(board.name, parse_json(text))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise board.garbage(f"a result with {error}") from None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "somebody"


class _Shown:
    """Progress of several boards as one: each counts one, and the label names the one that moved."""

    def __init__(self, boards: int, progress: Progress | None, say: Say | None) -> None:
        self._boards, self._progress, self._say = boards, progress, say
        self._lock, self._done = threading.Lock(), dict[str, float]()

    def of(self, url: str) -> Progress:
        def report(label: str, done: float, total: float) -> None:
            with self._lock:
                if self._progress is None:
                    return
                what, _, rest = label.partition(", ")
                if self._boards == 1:
                    self._progress(f"{what}, {url}: {rest}" if rest else f"{what}, {url}", done, total)
                    return
                if what.startswith("bench "):
                    self._done[url] = done / total if total else 0.0
                told = f"boards (boards), {url}: {Label.of(label).shown}"
                self._progress(told, sum(self._done.values()), self._boards)

        return report

    def ended(self, url: str) -> None:
        with self._lock:
            self._done[url] = 1.0
            if self._progress is not None and self._boards > 1:
                self._progress(f"boards (boards), {url}: ended", sum(self._done.values()), self._boards)

    def say(self, text: str) -> None:
        with self._lock:
            if self._say is not None:
                self._say(text)


class _Note(msgspec.Struct):
    """The process here that a run on a board is of."""

    pid: int
    started: float  # seconds since the epoch


@contextlib.contextmanager
def noted_run(board: Board) -> Iterator[str]:
    """The id of a new run, noted as this process's until the block ends; what was left on the board is ended first."""
    for old in left(board.name):
        board.clean(old)
    run = secrets.token_hex(8)
    note = _folder(board.name) / f"{run}.json"
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a wait at most
        write_text(note, msgspec.json.encode(_Note(os.getpid(), psutil.Process().create_time())).decode())
    try:
        yield run
    finally:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)


def left(board: str) -> list[str]:
    """Runs that ended processes of this computer left on a board; this call forgets them."""
    runs = []
    for note in sorted(_folder(board).glob("*.json")):
        try:
            about = msgspec.json.decode(note.read_bytes(), type=_Note)
            if psutil.Process(about.pid).create_time() == about.started:
                continue
            runs.append(note.stem)
        except psutil.NoSuchProcess:
            runs.append(note.stem)
        except psutil.Error:
            continue
        except (OSError, ValueError, OverflowError):
            pass  # a damaged note names no run that could be trusted
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)
    return runs


def _folder(board: str) -> Path:
    return cache_directory() / "boards" / hashlib.sha256(board.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Route:
    """How a board is reached: ``held`` gives the transport and, at its end, the board back."""

    name: str
    held: Callable[[threading.Event, Say], contextlib.AbstractContextManager[Transport]]


def route_to(url: str) -> Route:
    """The route to the board of a URL; nothing is connected or acquired yet.

    Raises BoardError: it names no board, or what it needs here is not installed.
    """
    if is_place(url):
        return Route(url, LabgridPlace(url).held)
    transport = open_transport(url)
    return Route(transport.name, lambda stop, say: contextlib.closing(transport))


@contextlib.contextmanager
def kept(url: str, say: Say | None = None) -> Iterator[str]:
    """The URL of one board for several runs: a place of a farm stays acquired, the same one, until the end."""
    route = route_to(url)
    if not is_place(url):
        yield url
        return
    with route.held(threading.Event(), say or (lambda text: None)) as transport:
        yield transport.name

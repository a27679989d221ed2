"""A run on a board, whatever is measured there: sent by hash, detached, followed, fetched, and nothing left.

Only what is needed goes to the board (``bench.remote.files``), and the run there is detached from the connection
(``devices.agent.run``).

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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import psutil

from bench.remote.board import Board, Reply, Say
from bench.remote.files import RESERVE_BYTES, Shipment
from bench.remote.labgrid_place import is_place, open_place
from devices.transport import BoardError, Transport, open_transport, printable
from saap.base.child import until_done
from saap.base.files import cache_directory, parse_json, write_text
from saap.base.progress import Progress

CLOCK_S = 300.0  # by which a board's clock may be off before it is said
LEASE_S = 900.0  # a run that nobody follows for so long ends itself

T = TypeVar("T")


@dataclass(frozen=True)
class Task(Generic[T]):
    """The work of a board.

    ``read`` makes the answer from the board's name and the document that was written there; an invalid one raises
    TypeError, KeyError, AttributeError or ValueError.
    """

    job: Mapping[str, object]  # what bench.remote.job is told beside the places of the bundles
    positions: int | None  # of each bundle's cache, for what memory is needed; None: the measuring process sees to it
    read: Callable[[str, object], T]


def open_board(url: str) -> Transport:
    """Open a transport to the board of a URL; nothing is connected yet.

    Raises BoardError: it names no board, what it needs here is not installed, or the place of a farm is not acquired.
    """
    return open_place(url) if is_place(url) else open_transport(url)


def run_at(url: str, shipment: Shipment, task: Task[T], progress: Progress | None = None, say: Say | None = None) -> T:
    """Run on the board of a URL. ``progress`` and ``say`` are called from another thread.

    An interrupt cleans the board up before it goes on. Raises BoardError: naming the board and what to do.
    """
    stop = threading.Event()
    with closing(open_board(url)) as transport, ThreadPoolExecutor(1) as pool:
        board = Board(transport, stop, say)
        future = pool.submit(run_on, board, shipment, task, progress)
        try:
            until_done([future])
        except BaseException:
            stop.set()
            raise
        return future.result()


def run_on(board: Board, shipment: Shipment, task: Task[T], progress: Progress | None = None) -> T:
    """Run on one board; it is left clean whatever happens. Raises BoardError: naming the board and what to do."""
    report = progress or (lambda label, done, total: None)
    _preflight(board, shipment, task.positions)
    with noted_run(board) as run:
        board.run = run
        try:
            there = board.insist("take", more=lambda: _take(run, shipment))
            _push(board, shipment, there["missing"], report)
            if not there["installed"]:
                names = [name.partition(">")[0] for name in shipment.requirements]
                report(f"install, {', '.join(names)}", 0, 0)
                board.insist("install", more=shipment.install)
            board.insist("start", more=lambda: _start(run, shipment, task))
            done = _follow(board, run, report)
            _check_end(board, done)
            return _fetched(board, board.insist("fetch", more=lambda: {"run": run}), task)
        except KeyError as error:
            raise board.garbage(f"an answer without {error}") from None
        finally:
            board.clean(run)


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
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = "somebody"
    owner = f"{user}@{socket.gethostname()}"
    return {
        "run": run, "owner": owner, "files": shipment.sizes, "key": shipment.key, "reserve": RESERVE_BYTES,
        "agent_bytes": shipment.agent_bytes,
    }  # fmt: skip


def _push(board: Board, shipment: Shipment, missing: object, report: Progress) -> None:
    sizes = shipment.sizes
    if not isinstance(missing, dict) or any(sha not in sizes for sha in missing):
        raise board.garbage("files that were not asked for")
    if not all(isinstance(there, int) and 0 <= there <= sizes[sha] for sha, there in missing.items()):
        raise board.garbage("other sizes than files have")
    total, sent = sum(sizes[sha] - there for sha, there in missing.items()) / 1e6, 0.0
    for sha, there in missing.items():

        def pushed(at: int, before: float = sent - there / 1e6) -> None:
            report("push (MB)", before + at / 1e6, total)

        board.push(sha, shipment.sources[sha], there, pushed)
        sent += (sizes[sha] - there) / 1e6
    if missing:
        report("push (MB)", total, total)


def _start(run: str, shipment: Shipment, task: Task[T]) -> Reply:
    places = [f"{index}/{packed.place}" for index, packed in enumerate(shipment.packed)]
    return {
        "run": run,
        "key": shipment.key,
        "bundles": [{"name": packed.name, "files": packed.files} for packed in shipment.packed],
        "job": {**task.job, "specs": places},
        "lease_s": LEASE_S,
    }


def _follow(board: Board, run: str, report: Progress) -> Reply:
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
                            report(printable(label), float(done), float(total))

    done = board.insist("follow", notify=hear, more=lambda: {"run": run, "offset": offset})
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
    """Return the complete document of a task."""
    try:
        text = str(fetched["result"])
        if hashlib.sha256(text.encode()).hexdigest() != fetched["sha256"]:
            raise ValueError("another hash")
        return task.read(board.name, parse_json(text))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise board.garbage(f"a result with {error}") from None


class _Note(msgspec.Struct):
    """The process here that a run on a board is of."""

    pid: int
    started: float  # seconds since the epoch


@contextlib.contextmanager
def noted_run(board: Board) -> Iterator[str]:
    """Note a new run as this process's until the block ends, and yield its id; first end what was left on the board."""
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
    """Return runs that ended processes of this computer left on a board, and forget them."""
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

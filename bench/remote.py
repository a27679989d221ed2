"""``saap bench --on``: the bench, run on boards by itself, and its results brought here.

On the board the same :func:`bench.run.bench` starts the same workers, so a result has the same form and its numbers the
same meaning; only what is needed goes there (``bench.remote_files``), and the run is detached from the connection
(``devices.agent_run``). Several boards are measured at the same time, as they share nothing.
"""

from __future__ import annotations

import getpass
import hashlib
import socket
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.plan import Plan
from bench.remote_board import Board, Say
from bench.remote_files import RESERVE_BYTES, Shipment, memory_needed, pack
from bench.remote_left import noted_run
from bench.result import Measurement, Result
from bench.rounds import Progress
from bench.signals import until_done
from bench.store import result_from_dict
from bench.ways import Way, way_to
from devices.transport import BoardError, printable
from devices.whole_files import parse_json

HERE_ONLY = ("root", "launch")  # of a plan: they mean this host
CLOCK_S = 300.0  # by which a board's clock may be off before it is said
LEASE_S = 900.0  # a run that nobody follows for so long ends itself


@dataclass(frozen=True)
class Answer:
    """What one board gave: a result or the reason why there is none."""

    url: str
    result: Result | None = None
    error: BoardError | None = None


def bench_on(
    urls: Sequence[str],
    specs: Sequence[str],
    plan: Plan | None = None,
    *,
    wheels: Path | None = None,
    own: bool = True,
    progress: Progress | None = None,
    say: Say | None = None,
) -> list[Answer]:
    """Measure the specs on every board, all boards at once.

    Args:
        urls: ``ssh://user@host[:port]``, ``adb://[serial]``, ``labgrid://PLACE`` or ``local://``.
        specs: bundles and ``prepacked:`` bundles, as paths here.
        wheels: a folder of wheels for boards that reach no package index.
        own: install into a venv of its own there; False: use the packages of the board's Python.
        progress, say: called from several threads, one at a time.

    Returns:
        one answer per board, in their order. An interrupt cleans the boards up before it goes on.

    Raises:
        BoardError, PeerError, BundleError, DecoderError: the user's input, before a board is asked.
    """
    plan = plan or Plan()
    plan.check()
    stop, shown = threading.Event(), _Shown(len(urls), progress, say)
    ways = [way_to(url) for url in urls]
    if len({way.name for way in ways}) != len(ways):  # ssh://board/ is ssh://board
        raise BoardError("a board is named twice: name each once")
    shipment = pack(specs, plan, wheels, own)
    with ThreadPoolExecutor(len(ways)) as pool:
        futures = [pool.submit(_answer, way, shipment, plan, stop, shown) for way in ways]
        try:
            until_done(futures)
        except BaseException:
            stop.set()
            raise
    return [future.result() for future in futures]


def measure_on(board: Board, shipment: Shipment, plan: Plan, progress: Progress | None = None) -> Result:
    """Measure on one board; it is left clean whatever happens.

    Raises:
        BoardError: naming the board and what to do.
    """
    told = progress or (lambda label, done, total: None)
    _preflight(board, shipment, plan)
    with noted_run(board) as run:
        try:
            there = board.insist("take", more=lambda: _take(run, shipment))
            _push(board, shipment, there["missing"], told)
            if not there["installed"]:
                told("install, numpy and onnxruntime", 0, 1)
                board.insist("install", more=shipment.install)
            board.insist("start", more=lambda: _start(run, shipment, plan))
            done = _follow(board, run, told)
            _check_end(board, done)
            return _result(board, board.insist("fetch", more=lambda: {"run": run}), shipment)
        except KeyError as error:
            raise board.garbage(f"an answer without {error}") from None
        finally:
            board.clean(run)


def _answer(way: Way, shipment: Shipment, plan: Plan, stop: threading.Event, shown: _Shown) -> Answer:
    try:
        with way.held(stop, shown.say) as transport:
            board = Board(transport, stop, shown.say)
            return Answer(way.name, result=measure_on(board, shipment, plan, shown.of(way.name)))
    except BoardError as error:
        return Answer(way.name, error=error)
    finally:
        shown.ended(way.name)


def _preflight(board: Board, shipment: Shipment, plan: Plan) -> None:
    """Python, memory and clock; the lock, disk and packages are looked at in the requests that need them."""
    facts = board.ask("hello")
    try:
        left, off = facts["available_bytes"], float(facts["time"]) - time.time()
        left = None if left is None else int(left)
    except (KeyError, TypeError, ValueError):
        raise board.garbage("no facts") from None
    positions = max(setting.positions for setting in plan.settings())
    for packed in shipment.packed:
        needed = memory_needed(packed.manifest, positions)
        if left is not None and needed > left:
            raise BoardError(
                f"{board.name}: {packed.spec} needs about {needed / 1e6:.0f} MB there and {left / 1e6:.0f} MB are "
                "available: stop other programs, ask for fewer tokens, or export with fewer --bits"
            )
    if abs(off) > CLOCK_S:
        board.say(f"{board.name}: its clock is off by {abs(off):.0f} s: times in the result are the board's")


def _take(run: str, shipment: Shipment) -> dict[str, Any]:
    owner = f"{_user()}@{socket.gethostname()}"
    return {
        "run": run, "owner": owner, "files": shipment.sizes, "key": shipment.key, "reserve": RESERVE_BYTES,
        "agent_bytes": shipment.agent_bytes,
    }  # fmt: skip


def _push(board: Board, shipment: Shipment, missing: dict[str, int], told: Progress) -> None:
    sizes = shipment.sizes
    if not isinstance(missing, dict) or any(sha not in sizes for sha in missing):
        raise board.garbage("files that were not asked for")
    if not all(isinstance(there, int) and 0 <= there <= sizes[sha] for sha, there in missing.items()):
        raise board.garbage("other sizes than files have")
    total, sent = sum(sizes[sha] - there for sha, there in missing.items()) / 1e6, 0.0
    for sha, there in missing.items():
        begin = sent - there / 1e6
        board.push(sha, shipment.sources[sha], there, lambda at, begin=begin: told("push, MB", begin + at / 1e6, total))  # type: ignore[misc]
        sent += (sizes[sha] - there) / 1e6
    if missing:
        told("push, MB", total, total)


def _start(run: str, shipment: Shipment, plan: Plan) -> dict[str, Any]:
    kept = {name: value for name, value in asdict(plan).items() if name not in HERE_ONLY}
    places = [[packed.prefix, f"{index}/{packed.name}"] for index, packed in enumerate(shipment.packed)]
    return {
        "run": run,
        "key": shipment.key,
        "bundles": [{"name": packed.name, "files": packed.files} for packed in shipment.packed],
        "job": {"plan": kept, "specs": places, "names": None},
        "lease_s": LEASE_S,
    }


def _follow(board: Board, run: str, told: Progress) -> dict[str, Any]:
    """Until the run has ended, over as many connections as it takes."""
    offset, refused = 0, ""

    def hear(document: dict[str, Any]) -> None:
        nonlocal offset, refused
        if "line" not in document:
            return
        try:
            offset = int(document["at"])
            line = parse_json(document["line"])
            if "refused" in line:
                refused = printable(line["refused"])
            elif "label" in line:
                told(printable(line["label"]), float(line["done"]), float(line["total"]))
        except (KeyError, TypeError, ValueError, RecursionError):
            return  # a library printed something there

    done = board.insist("follow", told=hear, more=lambda: {"run": run, "offset": offset})
    return {**done, "refused": refused} if refused else done


def _check_end(board: Board, done: dict[str, Any]) -> None:
    if done.get("rebooted"):
        raise BoardError(
            f"{board.name}: it rebooted in the middle of the run, which is INVALID: see to its power and cooling, "
            "and measure again"
        )
    if done.get("refused"):
        raise BoardError(f"{board.name}: {done['refused']}")
    if done.get("error") or done.get("code") != 0:
        raise BoardError(f"{board.name}: the run failed: {printable(done.get('error', 'no reason'))}")


def _result(board: Board, fetched: dict[str, Any], shipment: Shipment) -> Result:
    """Whole, of what was asked for, and with this side's names for it."""
    try:
        text = str(fetched["result"])
        if hashlib.sha256(text.encode()).hexdigest() != fetched["sha256"]:
            raise ValueError("another hash")
        result = result_from_dict(parse_json(text))
        packed = shipment.packed
        rounds, left = divmod(len(result.measurements), len(packed))
        if left or not rounds:
            raise ValueError("measurements are missing")
        measured = [_readable(m, p.spec) for m, p in zip(result.measurements, packed * rounds, strict=True)]
        if any(m.bundle_hash != p.manifest.content_hash for m, p in zip(measured, packed * rounds, strict=True)):
            raise ValueError("another bundle")
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise board.garbage(f"a result with {error}") from None
    return replace(
        result,
        measurements=measured,
        command=list(sys.argv),
        versions={**_version(), **result.versions},
        settings={**result.settings, "on": board.name},
    )


def _readable(m: Measurement, spec: str) -> Measurement:
    """Its texts are printed here, and come from another machine: a worker there may have coloured its last lines."""
    return replace(
        m, spec=spec, name=printable(m.name), reasons=[*map(printable, m.reasons)], stderr=[*map(printable, m.stderr)]
    )


def _version() -> dict[str, str]:
    """Ours: the code that ran there is this one."""
    try:
        return {"saap": metadata.version("saap")}
    except metadata.PackageNotFoundError:
        return {}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "somebody"


class _Shown:
    """Progress of several boards as one: each is worth one, and the label tells of whichever moved."""

    def __init__(self, boards: int, progress: Progress | None, say: Say | None) -> None:
        self._boards, self._progress, self._say = boards, progress, say
        self._lock, self._done = threading.Lock(), dict[str, float]()

    def of(self, url: str) -> Progress:
        """What one board calls."""

        def told(label: str, done: float, total: float) -> None:
            with self._lock:
                if self._progress is None:
                    return
                what, _, rest = label.partition(", ")
                if self._boards == 1:
                    self._progress(f"{what}, {url}: {rest}" if rest else f"{what}, {url}", done, total)
                    return
                if what == "bench":
                    self._done[url] = done / total if total else 0.0
                self._progress(f"boards, {url}: {label}", sum(self._done.values()), self._boards)

        return told

    def ended(self, url: str) -> None:
        """A board is done, whether it measured or not."""
        with self._lock:
            self._done[url] = 1.0
            if self._progress is not None and self._boards > 1:
                self._progress(f"boards, {url}: ended", sum(self._done.values()), self._boards)

    def say(self, text: str) -> None:
        """A line that stays."""
        with self._lock:
            if self._say is not None:
                self._say(text)

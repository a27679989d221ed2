"""One board's agent as seen from here: requests over a transport, tried again where a connection was lost."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO

from devices.agent.main import MARK
from devices.transport import BoardError, LostError, Transport, last_line, printable
from saap.base.child import read_lines, signals_wait
from saap.base.files import parse_json

SILENCE_S = 30.0  # the agent beats every second or two
PATIENCE_S = 600.0  # without any contact
LONGEST_WAIT_S = 30.0  # between two tries
POLL_S = 0.5
PIECE = 1 << 18  # bytes of a file that are sent at once
MOST_LINE = 256 << 20
MOST_NOISE = 1000  # lines of a login script
NO_PYTHON = "saap-no-python"
_AGENT = ("home", "files", "install", "run", "main")  # each after what it imports

# Both lines are fixed: whatever differs goes over standard input. No quote of either kind, backslash or dollar in it.
_LOADER = (
    "import json, sys, types; b = sys.stdin.buffer; "
    "[exec(t, sys.modules.setdefault(n, types.ModuleType(n)).__dict__)"
    " for n, t in json.loads(b.read(int(b.readline()))).items()]"
)
_FIND = (
    'PATH="$PATH:$HOME/.local/bin"; export PATH; f=; '
    "for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do "
    'v=$("$p" -c "import sys; print(*sys.version_info[:3], sep=chr(46)); sys.exit(sys.version_info < (3, 10))"'
    f' 2>/dev/null </dev/null) && exec "$p" -I -B -c "{_LOADER}"; '
    f'f="$f $v"; done; echo "{NO_PYTHON}$f"'
)
COMMAND = f"exec sh -c {shlex.quote(_FIND)}"  # the user's own shell there may be none of sh's kind

Reply = dict[str, object]
Tell = Callable[[Reply], None]
Say = Callable[[str], None]


class Stopped(Exception):  # noqa: N818  it is no error
    """The user here interrupted."""


class Board:
    """Asks the agent of one board.

    Args:
        transport: the way there, which whoever opened it closes.
        stop: set by whoever wants no more.
        say: told what a person should know, a line each.
        root: of /proc on the board, for tests of its reboot.
        patience_s: without any contact, before it is given up.
        silence_s: without a word on an open connection, before that counts as lost.
    """

    def __init__(
        self,
        transport: Transport,
        stop: threading.Event | None = None,
        say: Say | None = None,
        root: str = "/",
        patience_s: float = PATIENCE_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.transport, self.name, self._root, self._silence_s = transport, transport.name, root, silence_s
        self._stop, self.say, self.patience_s = stop or threading.Event(), say or (lambda text: None), patience_s
        self._contact = time.monotonic()
        self.run: str | None = None  # for which everything is asked from now on

    def ask(
        self, do: str, payload: Iterable[bytes] = (), notify: Tell | None = None, more: Reply | None = None
    ) -> Reply:
        """One request, tried once.

        Raises:
            LostError: the connection failed or fell silent.
            BoardError: the board refuses, has no Python, or something else than the agent answers.
            Stopped: from here.
        """
        request = {"do": do, "root": self._root, **({"run": self.run} if self.run else {}), **(more or {})}
        sources = json.dumps(_sources()).encode()
        header = f"{len(sources)}\n".encode() + sources + json.dumps(request).encode() + b"\n"
        with tempfile.TemporaryFile() as err:
            process: subprocess.Popen[bytes] | None = None
            try:
                with signals_wait():
                    process = subprocess.Popen(
                        self.transport.argv(COMMAND), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err,
                        start_new_session=True,  # an interrupt from the keyboard must not cut what cleans up
                    )  # fmt: skip
                threading.Thread(target=feed, args=(process.stdin, chain([header], payload)), daemon=True).start()
                return self._answer(process, notify, err)
            finally:
                if process is not None:
                    _end(process)

    def _answer(self, process: subprocess.Popen[bytes], notify: Tell | None, err: IO[bytes]) -> Reply:
        noise: list[str] = []
        try:
            for raw in self._lines(process):
                line = raw.decode("utf-8", "replace")
                if line.startswith(NO_PYTHON):
                    versions = [v for v in line.removeprefix(NO_PYTHON).split() if re.fullmatch(r"[\d.]+", v)]
                    there = f"its Python is {max(versions)}" if versions else "it has no Python"
                    raise BoardError(
                        f"{self.name}: {there}, and 3.10 or newer is needed: install one as python3.X in PATH or "
                        "~/.local/bin there"
                    )
                if not line.startswith(MARK):
                    noise.append(line[:200])  # of a login script, perhaps; the agent's lines are marked
                    if len(noise) > MOST_NOISE:
                        raise self.garbage(noise[0])
                    continue
                text = line.removeprefix(MARK)
                try:
                    document = parse_json(text)
                except ValueError:
                    document = None
                if not isinstance(document, dict):
                    raise self.garbage(text)
                if "error" in document:
                    kind = LostError if document.get("again") else BoardError
                    raise kind(f"{self.name}: {printable(document['error'])}")
                if "answer" in document:
                    if not isinstance(document["answer"], dict):
                        raise self.garbage(line)
                    return dict(document["answer"])
                if notify is not None:
                    notify(document)
        except TimeoutError:
            raise LostError(f"{self.name}: silent for {self._silence_s:.0f} s") from None
        code = process.wait()
        err.seek(0)
        stderr = err.read().decode(errors="replace")
        if code == 0:
            raise self.garbage(noise[0] if noise else "nothing")
        if code < 0:
            raise LostError(f"{self.name}: the connection was killed on this side")
        raise self.transport.failure(code, stderr if stderr.strip() else "\n".join(noise))

    def garbage(self, what: str) -> BoardError:
        return BoardError(
            f"{self.name}: something else than the agent answers there ({last_line(what)[:80]}): "
            "see what `ssh HOST true` prints, and whether both sides have the same saap"
        )

    def _lines(self, process: subprocess.Popen[bytes]) -> Iterator[bytes]:
        def patience(silent_s: float) -> float:
            if self._stop.is_set():
                raise Stopped
            if silent_s > self._silence_s:
                raise TimeoutError
            return POLL_S

        def heard() -> None:
            self._contact = time.monotonic()

        assert process.stdout is not None
        try:
            yield from read_lines(process.stdout, patience, MOST_LINE, heard)
        except OverflowError as error:
            raise self.garbage(str(error)) from None

    def insist(self, do: str, notify: Tell | None = None, more: Callable[[], Reply] = dict) -> Reply:
        """Repeat a request, which may be made twice, until it is answered.

        Args:
            more: the rest of the request, asked for anew at every try.

        Raises:
            BoardError: the board refuses, or there was no contact for ``patience_s``.
            Stopped: from here.
        """
        wait_s = 1.0
        while True:
            try:
                return self.ask(do, notify=notify, more=more())
            except LostError as error:
                wait_s = self._wait(error, wait_s)

    def _wait(self, error: LostError, seconds: float) -> float:
        """Wait before another try; returns how long to wait before the next."""
        self.transport.drop()
        if time.monotonic() - self._contact > self.patience_s:
            raise BoardError(
                f"{error}: no contact for {self.patience_s:.0f} s; a run that goes on there ends itself within 15 min"
            ) from None
        self.say(f"{error}; trying again")
        if self._stop.wait(seconds):
            raise Stopped
        return min(2 * seconds, LONGEST_WAIT_S)

    def push(self, sha: str, source: Path | bytes, there: int, notify: Callable[[int], None] | None = None) -> None:
        """Send a file's rest from byte ``there`` on, and go on where it was cut.

        Raises BoardError: as ``insist``, and where the file cannot be read here to its end.
        """
        size, broken = size_of(source), list[str]()

        def heard(document: Reply) -> None:
            if notify and isinstance(at := document.get("at"), int):
                notify(at)

        wait_s = 1.0
        while True:
            try:
                rest = whole(pieces(source, there), size - there, broken)
                self.ask("put", rest, heard, {"sha": sha, "size": size, "offset": there})
                return
            except LostError as error:
                if broken:  # another try would read no more
                    raise BoardError(f"{self.name}: {source!s} cannot be sent: {broken[0]}: measure again") from None
                wait_s = self._wait(error, wait_s)
            received = self.insist("held", more=lambda: {"sha": sha})["held"]
            if received is None:
                return
            if not isinstance(received, int) or not 0 <= received <= size:
                raise self.garbage(f"{received} bytes of a file of {size}")
            there = received

    def clean(self, run: str) -> None:
        """End a run and free the board, also after an interrupt; says so if it cannot be reached."""
        stop, patience = self._stop, self.patience_s
        self._stop, self.patience_s, self._contact = threading.Event(), min(patience, 30.0), time.monotonic()
        try:
            self.insist("end", more=lambda: {"run": run})
        except BoardError as error:
            self.say(f"could not be cleaned up now, a run there ends itself within 15 min: {error}")
        finally:
            self._stop, self.patience_s = stop, patience


def _sources() -> dict[str, str]:
    folder = Path(__file__).resolve().parents[2] / "devices" / "agent"
    sources = {f"devices.agent.{name}": (folder / f"{name}.py").read_text(encoding="utf-8") for name in _AGENT}
    return {**sources, "answer": "from devices.agent.main import main\nmain()\n"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for it, as it ends by itself after an answer; kill it otherwise."""
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def pieces(source: Path | bytes, offset: int) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source[offset:]
        return
    with source.open("rb") as file:
        file.seek(offset)
        while piece := file.read(PIECE):
            yield piece


def size_of(source: Path | bytes) -> int:
    """Its bytes. Raises BoardError: the file is gone."""
    if isinstance(source, bytes):
        return len(source)
    try:
        return source.stat().st_size
    except OSError as error:
        raise BoardError(f"{source} cannot be read ({error.strerror}): measure again") from None


def whole(some: Iterable[bytes], size: int, broken: list[str]) -> Iterator[bytes]:
    """Yield the pieces; if they end early, the reason is added to ``broken``."""
    try:
        for piece in some:
            yield piece
            size -= len(piece)
    except OSError as error:
        broken.append(error.strerror or str(error))
    else:
        if size > 0:
            broken.append("it became shorter meanwhile")


def feed(stdin: IO[bytes], some: Iterable[bytes]) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever reads has ended, which its answer tells
        try:
            for piece in some:
                stdin.write(piece)
        finally:
            stdin.close()  # also after a mistake of ours: else it waits for more

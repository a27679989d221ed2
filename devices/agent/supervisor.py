"""The process beside the measuring one on the board: ``python -m devices.agent.supervisor FOLDER RUN``, stdlib only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from devices.agent.home import Lock, below, kill, modified, read_json, started, write_json
from devices.agent.run import BEAT_S, END_S, LEASE_S, run_folder

JOB = "bench.remote.job"
MOST_STDERR = 1 << 16  # bytes of its end that are looked at
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of linux/prctl.h


class Supervisor:
    """Stays small beside the measuring process, and outlives it whatever happens to it."""

    def __init__(self, folder: Path, run: str) -> None:
        self.place, self.folder, self.run = run_folder(folder, run), folder, run
        request = read_json(self.place / "request.json")
        self.lock = Lock(folder, str(request.get("root", "/")))
        lease_s = request.get("lease_s")
        self._lease_s = lease_s if isinstance(lease_s, int | float) else LEASE_S
        self._stop = False
        self._job: subprocess.Popen[bytes] | None = None

    def main(self) -> None:
        """Run the measuring process to its end; nothing that it started is left."""
        signal.signal(signal.SIGTERM, self._end)
        pid = os.getpid()  # first of all: whoever started us may be gone, and then nobody else says how we are ended
        write_json(self.place / "process.json", {"pid": pid, "start": started(pid)})
        self.lock.process(self.run, pid)
        _prctl(_SUBREAPER, 1)  # orphans of a killed child become ours, and are ended
        with (self.place / "progress.jsonl").open("ab") as progress, (self.place / "stderr.txt").open("ab") as errors:
            self._job = job = subprocess.Popen(
                [sys.executable, "-m", JOB, str(self.place)], stdin=subprocess.DEVNULL, stdout=progress, stderr=errors,
                start_new_session=True, preexec_fn=lambda: _end_with(pid),
            )  # fmt: skip
        followed = self._watch(job)
        _end_children()
        if followed:
            write_json(self.place / "done.json", self._how(job.returncode))
        else:
            shutil.rmtree(self.place, ignore_errors=True)
            self.lock.release(self.run)

    def _watch(self, job: subprocess.Popen[bytes]) -> bool:
        lease, leased_at = 0.0, time.monotonic()
        while True:
            (self.place / "beat").touch()
            self.lock.touch(self.run)
            if (now := modified(self.place / "lease")) != lease:
                lease, leased_at = now, time.monotonic()
            followed = time.monotonic() - leased_at <= self._lease_s
            if self._stop or not followed:
                job.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    job.wait(END_S)
                if job.poll() is None:
                    job.kill()
                    job.wait()
                return followed
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(BEAT_S)
                return True

    def _how(self, code: int) -> dict[str, object]:
        if code == 0:
            return {"code": 0}
        with (self.place / "stderr.txt").open("rb") as errors:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - MOST_STDERR))
            lines = errors.read().decode("utf-8", "replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]
        killed = "killed there, as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return {"code": code, "error": killed or last or f"its process ended with {code}"}

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._stop = True
        if self._job is not None:
            self._job.terminate()


def _end_with(parent: int) -> None:
    """Let a child end when ``parent`` does, also when that was before we could ask for it."""
    _prctl(_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_children() -> None:
    """Kill what is left below us, until nothing is; see PR_SET_CHILD_SUBREAPER in prctl(2)."""
    for _ in range(100):
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        children = below(os.getpid())
        if not children:
            return
        for pid in children:
            kill(pid)
        time.sleep(0.05)


if __name__ == "__main__":
    Supervisor(Path(sys.argv[1]), sys.argv[2]).main()

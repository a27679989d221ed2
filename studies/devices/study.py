"""`saap bench --on` over a real sshd on this host against `saap bench` here, interleaved; one connection is cut.

    python -m studies.devices.study BUNDLE
    python -m studies.devices.study BUNDLE --pairs 6 --repetitions 6 -o pairs.jsonl

Prints each pair's ratio of the median times per token, the median of the ratios, the fields by which the results
differ, and what the cut run said and brought. Needs openssh-server, and a host with nothing else running.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.common import parser_of
from tests.support.sshd import Sshd  # the server that the tests use

CUT_AFTER_S = 4.0  # into the first round, which is in the middle of its repetitions


def fields(value: Any, path: str = "") -> set[str]:
    """Names of all fields; members of a list share one."""
    if isinstance(value, dict):
        return {path}.union(*(fields(inner, f"{path}.{name}") for name, inner in value.items()))
    if isinstance(value, list):
        return {path}.union(*(fields(inner, f"{path}[]") for inner in value))
    return {path}


def token_s(result: dict[str, Any]) -> list[float]:
    return [seconds for sample in result["measurements"][0]["samples"] for seconds in sample["token_s"]]


def run(command: list[str], path: Path, cut: Sshd | None = None) -> dict[str, Any]:
    """The result; with ``cut``, that server's connections end in the middle, and what was said is printed."""
    command = [sys.executable, "-m", "saap.cli", *command, "--json", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said, killed = [], 0
    for line in process.stdout:
        said.append(line.rstrip())
        if cut and not killed and "round 1" in line:
            time.sleep(CUT_AFTER_S)
            killed = cut.cut()
    if process.wait() not in (0, 1) or not path.is_file():
        raise SystemExit("\n".join(said))
    if cut:
        print(f"  cut: {killed} processes of sshd killed; it said:")
        print("\n".join(f"  | {line}" for line in said if "connect" in line.lower()))
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("-o", "--out", type=Path, help="both results of every pair, a pair a line")
    given = parser.parse_args(arguments)
    command = ["bench", str(given.bundle), "-t", "1", "-r", str(given.repetitions), "--no-cold"]
    with tempfile.TemporaryDirectory(prefix="saap-remote-") as place:
        server = Sshd(Path(place) / "sshd", f"{Path(sys.executable).parent}:/usr/bin:/bin")
        os.environ["PATH"] = f"{server.bin}:{os.environ['PATH']}"
        numbers = itertools.count()
        server.start()
        try:
            remote = [*command, "--on", server.url, "--board-packages"]
            run(remote, Path(place) / "pushed.json")  # so that no pair pays for the push
            ratios, differ = [], set()
            for pair in range(given.pairs):
                here = run(command, Path(place) / f"{next(numbers)}.json")
                cut = server if pair == given.pairs // 2 else None
                there = run(remote, Path(place) / f"{next(numbers)}.json", cut)
                ratios.append(statistics.median(token_s(there)) / statistics.median(token_s(here)))
                differ |= fields(here) ^ fields(there)
                kept = len(there["measurements"][0]["samples"])
                verdicts = [each["measurements"][0]["status"] for each in (here, there)]
                print(f"{pair + 1}: remote/local {ratios[-1]:.3f} {verdicts}, {kept} repetitions", flush=True)
                if given.out:
                    with given.out.open("a") as file:
                        file.write(json.dumps([here, there]) + "\n")
        finally:
            server.stop()
    print(f"median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print("fields of one side only:", ", ".join(sorted(differ)) or "none")


if __name__ == "__main__":
    main()

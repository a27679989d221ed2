"""``BUNDLE@fastest``: the engine of a bundle that decodes fastest on this device, measured once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from export.bundle.manifest import BundleManifest, read_manifest
from export.engine.table import EXTRAS, FASTEST, ONNXRUNTIME, PACKAGES, Placed, engines_in
from saap.base.cores import allowed_cores
from saap.base.errors import UserError
from saap.base.files import cache_directory, write_text
from saap.base.progress import Progress
from saap.cli.console import tell

if TYPE_CHECKING:
    from bench.runtimes.peers import Peer

TURNS_S = 24.0
MOST_OTHERS = 0.1  # of the cores' time, beside which an answer is worth keeping
PROMPT, GENERATE = 128, 64


def on_fastest(spec: str | Path, progress: Progress | None = None, *, own: bool = False) -> str:
    """The spec itself, or for ``BUNDLE@fastest`` the bundle with the engine that was found fastest here.

    ``own``: the engine has to be in this Python, not in one of its own.

    Raises UserError: no such bundle.
    """
    placed = Placed.of(spec)
    if placed.engine != FASTEST:
        return str(spec)
    manifest = read_manifest(placed.bundle)
    known = engines_in(manifest)
    here = [ONNXRUNTIME, *(engine for engine in known if engine in PACKAGES and is_here(engine, own=own))]
    for engine in known:
        if engine not in here:
            tell(f"  {engine} is not weighed, it is not installed: pip install {EXTRAS[engine]}", sys.stderr)
    if len(here) == 1:
        return f"{placed.bundle}@{here[0]}"
    kept = cache_directory() / "engines" / f"{key_of(manifest, here)}.json"
    with suppress(OSError, ValueError, KeyError):
        engine = json.loads(kept.read_text(encoding="utf-8"))["engine"]
        if engine in here:
            return f"{placed.bundle}@{engine}"
    others_took = time_of_others()
    seconds = measured(placed.bundle, here, progress)
    engine = min(seconds, key=lambda name: seconds[name])
    if (share := others_took()) > MOST_OTHERS:
        tell(f"  other processes took {share:.0%} of the cores meanwhile, so the answer is not kept", sys.stderr)
    else:
        write_text(kept, json.dumps({"engine": engine, "token_s": seconds}))
    others = ", ".join(f"{name} {1 / value:.1f}" for name, value in sorted(seconds.items(), key=lambda each: each[1]))
    tell(f"  {placed.bundle} decodes fastest in {engine} here (tokens per second: {others})", sys.stderr)
    return f"{placed.bundle}@{engine}"


def time_of_others() -> Callable[[], float]:
    """A function that says which share of the cores' time other processes have taken since.

    Threads that wait for one another by spinning lose far more than the others take: llama.cpp fell to a thirtieth of
    its speed beside one busy process.
    """
    import psutil

    def taken() -> tuple[float, float]:
        by_core = psutil.cpu_times(percpu=True)
        times = [by_core[core] for core in allowed_cores() if core < len(by_core)]
        busy = sum(t.user + t.system + getattr(t, "nice", 0.0) for t in times)
        ours = os.times()
        return busy - sum(ours[:4]), len(times) * time.monotonic()

    start = taken()

    def share() -> float:
        others, passed = (now - before for now, before in zip(taken(), start, strict=True))
        return max(0.0, others) / max(passed, 1.0)

    return share


def is_here(engine: str, *, own: bool) -> bool:
    """Whether this Python, or another one that we may use, has the engine."""
    from saap.base.child import absent
    from saap.base.interpreters import python_with

    if own:
        return not absent(PACKAGES[engine])
    try:
        python_with(PACKAGES[engine], engine, EXTRAS[engine])
    except UserError:
        return False
    return True


def key_of(manifest: BundleManifest, engines: list[str]) -> str:
    """Of the device, the bundle, the engines and ONNX Runtime's version: what the answer depends on."""
    from bench.measure.result import package_versions
    from devices.probe.host import probe

    about = [probe()["fingerprint"], manifest.content_hash, engines, package_versions().get("onnxruntime")]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def measured(bundle: Path, engines: list[str], progress: Progress | None) -> dict[str, float]:
    """Seconds of a token by engine, each with its own best settings, with all physical cores.

    Raises UserError: an engine that cannot run the bundle, or too little memory for all at once.
    """
    from statistics import median

    from bench.measure.bursts import take_turns
    from bench.measure.options import BenchOptions
    from bench.measure.pilots import at_their_best
    from bench.runtimes.peers import read_peers

    plan = BenchOptions(prompt=PROMPT, generate=GENERATE, ratio_time_s=TURNS_S)
    peers: list[Peer] = read_peers([f"{bundle}@{engine}" for engine in engines], plan.positions, engines)
    best, _ = at_their_best(peers, plan, progress)
    best = [peer for peer in best if peer.name in engines]
    (setting,) = plan.settings()
    turns = take_turns(best, setting, plan, progress)
    if not turns.loads:
        raise UserError(f"{bundle}@{FASTEST}: its engines cannot be compared here: {turns.failure}")
    return {name: median(median(load.token_s[place]) for load in turns.loads) for place, name in enumerate(turns.names)}

"""``BUNDLE@fastest``: the engine of a bundle that decodes fastest on this device, measured once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median

from devices.probe.host import probe
from export.bundle import Bundle
from export.bundle.manifest import BundleManifest, read_manifest
from export.engine.protocol import EngineOptions
from export.engine.table import FASTEST, ONNXRUNTIME, Row, engines_in, row_of
from export.engine.turns import Contender, random_tokens, take_turns
from export.engine.worker import Job
from saap.base.cgroup import available
from saap.base.cores import allowed_cores, choose_cores, physical_cores
from saap.base.errors import UserError
from saap.base.files import write_text
from saap.base.progress import Progress, note
from saap.base.store import Store

STORE = Store("engines", 1 << 20)  # some 100 bytes each
TURNS_S = 30.0
BUSY = 0.1  # of the cores' time, beside which an answer is not kept
PROMPT, GENERATE = 128, 64
RUNTIME_BYTES = 64 << 20


def fastest_engine(bundle: Path, progress: Progress | None = None, *, here: bool = False) -> str:
    """Find the engine that decodes a bundle fastest on this device.

    ``here``: the engine has to be in this Python, not in one of its own.

    Raises UserError: no such bundle, or its engines cannot be compared.
    """
    manifest = read_manifest(bundle)
    rows = [row for row in map(row_of, engines_in(manifest)) if _usable(row, here, progress)]
    if len(rows) == 1:
        return rows[0].name
    kept = STORE.folder / f"{_key(manifest, rows)}.json"
    known = STORE.read(kept, lambda data: str(json.loads(data)["engine"]))
    if known in [row.name for row in rows]:
        return known
    share_of_others = time_of_others()
    seconds = seconds_per_token(bundle, rows, progress)
    engine = min(seconds, key=lambda name: seconds[name])
    if (share := share_of_others()) > BUSY:
        note(progress, f"other processes took {share:.0%} of the cores meanwhile, so the answer is not kept")
    else:
        document = json.dumps({"engine": engine, "token_s": seconds})
        STORE.write(kept, lambda path: write_text(path, document))
    speeds = ", ".join(f"{name} {1 / value:.1f}" for name, value in sorted(seconds.items(), key=lambda each: each[1]))
    note(progress, f"{bundle} decodes fastest in {engine} here (tokens per second: {speeds})")
    return engine


def _usable(row: Row, here: bool, progress: Progress | None) -> bool:
    """Whether this Python, or another one that we may use, has the engine."""
    if row.name == ONNXRUNTIME:
        return True
    try:
        row.python(row.name)
    except UserError:
        usable = False
    else:
        usable = row.here() or not here
    if not usable:
        note(progress, f"{row.name} is not installed, so it takes no part: pip install {row.install}")
    return usable


def _key(manifest: BundleManifest, rows: Sequence[Row]) -> str:
    """Hash the device, the bundle, the engines and ONNX Runtime's version: what the answer depends on."""
    names = [row.name for row in rows]
    about = [probe()["fingerprint"], manifest.content_hash, names, metadata.version("onnxruntime")]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def seconds_per_token(bundle: Path, rows: Sequence[Row], progress: Progress | None) -> dict[str, float]:
    """Seconds of a token by engine, each with its own best settings, on all physical cores.

    Raises UserError: an engine that cannot run the bundle, or too little memory for all at once.
    """
    checked, threads = Bundle.open(bundle).check(), physical_cores()
    manifest = checked.manifest
    length = min(PROMPT + GENERATE, manifest.context_length)
    prompt = random_tokens(max(1, length - GENERATE), manifest.vocab_size, 0)
    contenders = []
    for row in rows:
        source = row.source(checked)
        for choice in row.choices or (None,):
            options = EngineOptions(threads, len(prompt) + GENERATE, choice=choice)
            job = Job(
                row.module, str(source.resolve()), options, cpus=choose_cores(threads), prompt=prompt, n_gen=GENERATE
            )
            contenders.append(Contender(row.name, job, row.python(row.name), row.process_environment(threads)))
    needed = len(contenders) * (sum(entry.bytes for entry in manifest.files.values()) + RUNTIME_BYTES)
    left = available(Path("/"))
    if left is not None and needed > left:
        raise UserError(
            f"{bundle}@{FASTEST}: its engines need about {needed / 1e6:.0f} MB at once, and {left / 1e6:.0f} MB are "
            "available: name one of them"
        )
    loads, failure = take_turns(contenders, TURNS_S, progress)
    if not loads:
        raise UserError(f"{bundle}@{FASTEST}: its engines cannot be compared here: {failure}")
    seconds: dict[str, float] = {}
    for place, contender in enumerate(contenders):
        token_s = median(median(load.token_s[place]) for load in loads)
        seconds[contender.name] = min(token_s, seconds.get(contender.name, token_s))
    return seconds


def time_of_others() -> Callable[[], float]:
    """Return a function that gives the share of the cores' time that other processes have taken since.

    Threads that wait for one another by spinning lose far more than the others take: llama.cpp fell to a thirtieth of
    its speed beside one busy process.
    """
    import psutil

    def read() -> tuple[float, float]:
        by_core = psutil.cpu_times(percpu=True)
        times = [by_core[core] for core in allowed_cores() if core < len(by_core)]
        busy = sum(t.user + t.system + getattr(t, "nice", 0.0) for t in times)
        ours = os.times()
        return busy - sum(ours[:4]), len(times) * time.monotonic()

    start = read()

    def share() -> float:
        others, passed = (now - before for now, before in zip(read(), start, strict=True))
        return max(0.0, others) / max(passed, 1.0)

    return share

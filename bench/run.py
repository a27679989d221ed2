"""Measure several specs against each other: interleaved repetitions, each in a fresh process.

Machines drift (temperature, neighbours, clocks), so A is never measured after B is done: every round runs each spec
once, and the order turns around from round to round. This process only starts others and stays small.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import numpy as np

from bench.child import ChildFailedError, call
from bench.cores import choose_cores, physical_cores
from bench.peers import Peer, PeerError, read_peers
from bench.result import INVALID, Bandwidth, Measurement, ModelFacts, Result, Sample
from bench.roofline import joined, probe_bandwidth
from bench.runtime import check_threads
from bench.validity import judge
from devices.probe import probe

Progress = Callable[[str, float, float], None]


def bench(
    specs: Sequence[str],
    *,
    prompt: int = 128,
    generate: int = 128,
    threads: int | None = None,
    repetitions: int = 5,
    warmup: int = 8,
    seed: int = 0,
    timeout_s: float = 600,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Measure every spec and say what may be believed.

    Args:
        specs: bundles as paths, other runtimes by their prefix (bench.peers).
        prompt: tokens of the one prefill call.
        generate: decode steps; end-of-text tokens do not end them.
        threads: of every spec; None is the number of physical cores.
        repetitions: fresh processes per spec, interleaved.
        warmup: steps before the measured pass of each process, kept apart.
        seed: of the prompt's tokens, the same for all specs and valid in all their vocabularies.
        timeout_s: limit of one process; a spec that exceeds it, or crashes, is INVALID and not tried again.
        names: one per spec.
        progress: called as (label, done, total) in repetitions.

    Raises:
        PeerError, BundleError, DecoderError, GgufHeaderError: the user's input, before anything is measured.
    """
    for label, value, least in (
        ("prompt", prompt, 1),
        ("generate", generate, 1),
        ("repetitions", repetitions, 1),
        ("warmup", warmup, 0),
    ):
        if value < least:
            raise PeerError(f"--{label} {value} cannot be measured: give {least} or more")
    if not timeout_s > 0:
        raise PeerError(f"a time limit of {timeout_s} s ends every measurement: give more than 0")
    threads = physical_cores() if threads is None else threads
    check_threads(threads)
    peers = read_peers(specs, prompt + generate, names)
    device = probe()
    cpus, cache = choose_cores(threads), device.get("last_level_cache_bytes")
    before = probe_bandwidth(cpus, cache)
    job = {
        "prompt": prompt_tokens(prompt, min(peer.vocab_size for peer in peers), seed),
        "n_gen": generate,
        "warmup": warmup,
        "threads": threads,
        "cpus": cpus,
    }
    outcomes = _interleave(peers, job, repetitions, timeout_s, progress)
    bandwidth = joined(before, probe_bandwidth(cpus, cache))
    result = Result(
        device=device,
        measurements=[_measurement(peer, outcome, job) for peer, outcome in zip(peers, outcomes, strict=True)],
        bandwidth=[bandwidth],
        command=list(sys.argv),
        versions=_versions(outcomes),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        settings={"seed": seed, "repetitions": repetitions, "warmup": warmup, "timeout_s": timeout_s},
    )
    return _judged(result, bandwidth)


def prompt_tokens(count: int, vocab_size: int, seed: int) -> list[int]:
    """``count`` token ids, uniform over the vocabulary, the same for the same arguments."""
    return [int(i) for i in np.random.default_rng(seed).integers(vocab_size, size=count)]


def schedule(count: int, repetitions: int) -> list[int]:
    """Indices of the specs in the order they run: each once per round, forwards and backwards in turn.

    With more than two specs the start also moves on, so that none is always in the middle.
    """
    order = []
    for repetition in range(repetitions):
        shift = repetition // 2 % count
        turn = [*range(shift, count), *range(shift)]
        order.extend(turn[::-1] if repetition % 2 else turn)
    return order


class _Outcome:
    """What the workers of one spec have answered so far."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.model: ModelFacts | None = None
        self.versions: dict[str, str] = {}
        self.failure: str | None = None


def _interleave(
    peers: Sequence[Peer], job: dict[str, Any], repetitions: int, timeout_s: float, progress: Progress | None
) -> list[_Outcome]:
    outcomes = [_Outcome() for _ in peers]
    order = schedule(len(peers), repetitions)
    for position, index in enumerate(order):
        peer, outcome = peers[index], outcomes[index]
        if progress:
            progress(f"bench, {peer.name}", position, len(order))
        if outcome.failure is None:
            _one(peer, outcome, {**job, "path": str(peer.path), "order": position}, timeout_s)
    if progress:
        progress("bench", len(order), len(order))
    return outcomes


def _one(peer: Peer, outcome: _Outcome, job: dict[str, Any], timeout_s: float) -> None:
    try:
        answer = call(peer.worker, job, timeout_s, peer.environment(job["threads"]), peer.python)
        outcome.samples.append(Sample(**answer["sample"]))
    except ChildFailedError as error:
        outcome.failure = str(error)
    else:
        if "model" in answer:
            outcome.model = ModelFacts(**answer["model"], vocab_size=peer.vocab_size)
        outcome.versions.update(answer.get("versions", {}))


def _measurement(peer: Peer, outcome: _Outcome, job: dict[str, Any]) -> Measurement:
    return Measurement(
        name=peer.name,
        spec=peer.spec,
        kind=peer.kind,
        bundle_hash=peer.bundle_hash,
        model=outcome.model or peer.model,
        n_prompt=len(job["prompt"]),
        n_gen=job["n_gen"],
        n_threads=job["threads"],
        affinity=job["cpus"],
        samples=outcome.samples,
        status=INVALID,  # until it is judged
        reasons=[outcome.failure] if outcome.failure else [],
        unknown=peer.unknown,
    )


def _judged(result: Result, bandwidth: Bandwidth) -> Result:
    judged = []
    for m in result.measurements:
        status, reasons = judge(m, result.ceiling_ts(m), bandwidth.last_level_cache_bytes)
        failed = bool(m.reasons)
        judged.append(replace(m, status=INVALID if failed else status, reasons=[*m.reasons, *reasons]))
    return replace(result, measurements=judged)


def _versions(outcomes: Sequence[_Outcome]) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("saap", "onnxruntime", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # a copied tree, or a build of ONNX Runtime under another name
    for outcome in outcomes:
        versions.update(outcome.versions)
    return versions

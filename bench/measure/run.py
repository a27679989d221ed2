"""Measure several specs against each other: interleaved repetitions, each in a fresh process.

Machines drift (temperature, neighbours, clocks), so A is never measured after B is done: every round runs each spec
once, and the order turns around from round to round. This process only starts others and stays small.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone

from bench.measure.answers import ask_all
from bench.measure.bursts import take_bursts
from bench.measure.options import BenchOptions
from bench.measure.pilots import at_their_best
from bench.measure.result import INVALID, Bandwidth, Bursts, Measurement, Result, command_line, package_versions
from bench.measure.roofline import joined, probe_bandwidth
from bench.measure.rounds import Outcome, Rounds
from bench.measure.validity import judge
from bench.power.energy import Recorder
from bench.runtimes.peers import Peer, check_memory, read_peers
from devices.probe.host import probe
from export.engine.protocol import check_threads
from saap.base.cores import choose_cores
from saap.base.progress import Progress, advance
from saap.base.writing import taking_turns

RECORDED = ("seed", "repetitions", "precision", "max_time_s", "ratio_time_s", "warmup", "timeout_s")


def measure(
    specs: Sequence[str],
    options: BenchOptions | None = None,
    *,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Measure every spec in every setting, and say what may be believed.

    Args:
        specs: bundles as paths, other runtimes by their prefix (``bench.runtimes.peers``).
        options: lengths, threads, repetitions, limits.
        names: one per spec.
        progress: called as (label, done, total) in worker processes.

    Raises:
        UserError: the user's input, before anything is measured.
    """
    options = options or BenchOptions()
    options.check()
    for threads in {setting.threads for setting in options.settings()}:
        check_threads(threads)
    peers = read_peers(specs, options.positions, names, options.provider, progress)
    if options.foreign_graph:
        peers = [replace(peer, foreign_graph=peer.kind == "onnx") for peer in peers]
    check_memory(peers, options.positions, options.root)
    with taking_turns(progress):
        return _measured(peers, options, progress)


def _measured(peers: list[Peer], options: BenchOptions, progress: Progress | None) -> Result:
    """Measure what was checked."""
    settings = options.settings()
    peers, pilots = at_their_best(peers, options, progress)
    device = probe()
    widths = sorted({setting.threads for setting in settings})
    before = _bandwidths(widths, device["last_level_cache_bytes"], progress)
    with Recorder(options.root) as recorder:
        rounds = Rounds(peers, options, recorder, progress)
        rounds.rest()
        if options.cold:
            rounds.load_cold()
        rounds.run()
    bursts = _turns(rounds, options, progress)
    after = _bandwidths(widths, device["last_level_cache_bytes"], progress)
    answers = ask_all(peers, options, widths[0], progress)
    outcomes = [outcome for group in rounds.outcomes.values() for outcome in group]
    result = Result(
        device={**device},
        measurements=[_measurement(outcome, options) for outcome in outcomes],
        bandwidth=[joined(a, b) for a, b in zip(before, after, strict=True)],
        command=command_line(),
        versions={
            "python": platform.python_version(),
            **package_versions(),
            **{name: version for outcome in outcomes for name, version in outcome.versions.items()},
        },
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        settings={
            **{name: getattr(options, name) for name in RECORDED},
            "power": recorder.facts(),
            **({"choice": options.choice} if options.choice is not None else {}),
            **({"pilots": [asdict(pilot) for pilot in pilots]} if pilots else {}),
            **answers,
        },
        bursts=bursts,
    )
    return _judged(result)


def _bandwidths(widths: Sequence[int], cache_bytes: int | None, progress: Progress | None) -> list[Bandwidth]:
    """Measure the memory's bandwidth at each of these thread counts."""
    bandwidths: list[Bandwidth] = []
    for threads in widths:
        advance(progress, "measuring memory bandwidth (probes)", len(bandwidths), len(widths))
        bandwidths.append(probe_bandwidth(choose_cores(threads), cache_bytes))
    advance(progress, "measuring memory bandwidth (probes)", len(widths), len(widths))
    return bandwidths


def _turns(rounds: Rounds, options: BenchOptions, progress: Progress | None) -> list[Bursts]:
    """Return the ratios of the peers that could be measured, setting by setting."""
    working = {setting: [o.peer for o in some if o.failure is None] for setting, some in rounds.outcomes.items()}
    several = {setting: peers for setting, peers in working.items() if len(peers) > 1 and options.turns_s}
    return [take_bursts(peers, setting, options, progress) for setting, peers in several.items()]


def _measurement(outcome: Outcome, options: BenchOptions) -> Measurement:
    peer, setting = outcome.peer, outcome.setting
    return Measurement(
        name=peer.name,
        spec=peer.spec,
        kind=peer.kind,
        bundle_hash=peer.bundle_hash,
        model=outcome.model or peer.model,
        n_prompt=setting.prompt,
        n_gen=setting.generate,
        n_threads=setting.threads,
        affinity=choose_cores(setting.threads),
        samples=outcome.samples,
        status=INVALID,  # until it is judged
        reasons=[outcome.failure] if outcome.failure else [],
        unknown={**peer.unknown, **outcome.unknown},
        n_depth=setting.depth,
        provider=options.provider,
        cold_load_s=outcome.cold_load_s,
        stderr=outcome.stderr,
        choice=peer.choice,
    )


def _judged(result: Result) -> Result:
    judged = []
    caches = {b.n_threads: b.last_level_cache_bytes for b in result.bandwidth}
    for m in result.measurements:
        status, reasons = judge(m, result.ceiling_ts(m), caches[m.n_threads])
        judged.append(replace(m, status=INVALID if m.reasons else status, reasons=[*m.reasons, *reasons]))
    return replace(result, measurements=judged)

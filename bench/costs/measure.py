"""Time probe stacks on this device: what the parts of a decoder layer cost, at every size.

A stack is a bundle in which every second layer takes another size than the model's (``export.graph.probe_stacks``).
Four stacks take their steps in turns in one process, so that what the machine does meanwhile hits all of them. Where
the weights come to lie in memory is worth some per cent too, and another matter in every process; so processes are
many, short, and mix the stacks anew. ``bench.costs.fit`` makes costs of their steps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import numpy as np
import psutil

from bench.costs.fit import CostProcess, MeasuredCosts, Stack, costs_from, read_stacks
from bench.costs.options import CostsOptions
from bench.costs.worker import CostsJob
from bench.judge.wording import threads as counted
from bench.measure.options import BenchOptions
from bench.measure.pilots import at_their_best
from bench.measure.result import INVALID, OK, Json, command_line, package_versions
from bench.measure.roofline import probe_bandwidth
from bench.measure.validity import waited
from bench.runtimes.peers import LLAMA_CPP, Peer, read_peers
from devices.probe.host import probe
from export.bundle.manifest import BundleManifest, read_manifest
from export.engine.protocol import check_threads
from export.engine.table import ONNXRUNTIME, row_of
from saap.base.child import ChildFailedError, call
from saap.base.cores import choose_cores, physical_cores
from saap.base.documents import Document
from saap.base.errors import UserError
from saap.base.files import write_text
from saap.base.options import check_values
from saap.base.progress import Progress
from saap.base.writing import taking_turns

SCHEMA = 1
KIND = "saap costs"
PILOT = 8  # tokens that choose a setting of another engine
TOGETHER = 4  # stacks in one process, the base among them
COPIES = 2.5  # memory of a session over the bytes of its weights: mapped, and packed


class CostsError(UserError):
    """The costs cannot be measured here; the message says why and what to do."""


@dataclass(frozen=True)
class CostModel:
    """The model and precision that costs hold for."""

    model_type: str
    hidden: int
    head_dim: int
    vocab: int
    bits: int
    block: int  # weights per scale; 0 at 32 bits
    head_bits: int | None  # of the output head
    kv_dtype: str


@dataclass(frozen=True)
class Costs:
    """``cost.json``: what the parts of a decoder layer take on a device, and the raw steps that say so."""

    created: str  # ISO 8601, UTC
    command: list[str]
    versions: dict[str, str]
    device: Json  # ``devices.probe.host.probe()`` as it was
    model: CostModel
    depth: int  # tokens in the cache
    stacks: list[Stack]  # the base first
    threads: list[MeasuredCosts]  # one per thread count
    on: str | None = None  # the board's address, None for this host
    engine: str = ONNXRUNTIME  # what was timed
    status: str = OK  # or INVALID
    reasons: list[str] = field(default_factory=list)  # for that
    kind: str = KIND
    schema: int = SCHEMA


def measure_costs(
    bundles: Sequence[Path], options: CostsOptions | None = None, *, progress: Progress | None = None
) -> Costs:
    """Time probe stacks.

    Args:
        bundles: the stacks, the base first, as ``export.graph.probe_stacks.write_probe_stacks`` returns them.
        progress: called as (label, done, total) in processes.

    Raises:
        UserError: an option out of range, more threads than cores, or an engine that is not installed.
        CostsError: too little memory, a depth beyond the context, or a worker that fails.
    """
    options = options or CostsOptions()
    check_values(options)
    threads = list(dict.fromkeys(options.threads or (physical_cores(),)))
    manifests = [read_manifest(path) for path in bundles]
    stacks = read_stacks(manifests)
    for count in threads:
        check_threads(count)
    check_depth(manifests[0], options.depth)
    groups = schedule(len(stacks), options.rounds, _stacks_together(manifests[0].weight_bytes_per_token))
    with taking_turns(progress):
        return _timed(bundles, stacks, groups, replace(options, threads=tuple(threads)), progress)


def _timed(
    bundles: Sequence[Path],
    stacks: list[Stack],
    groups: list[list[int]],
    options: CostsOptions,
    progress: Progress | None,
) -> Costs:
    """Time groups of stacks with each number of threads of the options."""
    threads = options.threads or ()
    device, tables, reasons = probe(), [], []
    report, of = progress or (lambda label, done, total: None), len(threads) * len(groups)
    peer = None
    if options.engine != ONNXRUNTIME:
        spec = f"{LLAMA_CPP}{bundles[0] / str(row_of(options.engine).file)}"
        (peer,) = read_peers([spec], options.depth + PILOT)
    for turn, count in enumerate(threads):
        cpus, processes = choose_cores(count), []
        choice = None
        if peer is not None:  # its own setting that is fastest in decode at this depth
            plan = BenchOptions(prompt=options.depth, generate=PILOT, threads=count)
            choice = at_their_best([peer], plan, progress)[0][0].choice
        for index, group in enumerate(groups):
            report(f"timing operators (processes), {counted(count)}", turn * len(groups) + index, of)
            paths = [str(bundles[i]) for i in group]
            job = CostsJob(paths, count, cpus, options.depth, options.seconds, options.engine, choice)
            processes.append(_process(job, group, options.timeout_s, peer))
        bandwidth = probe_bandwidth(cpus, device["last_level_cache_bytes"])
        tables.append(costs_from(stacks, processes, cpus, bandwidth))
        if reason := waited([process.wait_share() for process in processes]):
            reasons.append(f"{counted(count)}: {reason}")
    report("timing operators (processes)", of, of)
    return Costs(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command_line(),
        versions=package_versions(),
        device={**device},
        model=described(read_manifest(bundles[0])),
        depth=options.depth,
        stacks=stacks,
        threads=tables,
        engine=options.engine,
        status=INVALID if reasons else OK,
        reasons=reasons,
    )


def check_depth(base: BundleManifest, depth: int) -> None:
    """Refuse a depth that the model's cache does not have."""
    longest = base.context_length - PILOT
    if not 2 <= depth <= longest:
        raise CostsError(f"a depth of {depth} cannot be probed with this model: give 2 to {longest}")


def schedule(count: int, rounds: int, together: int) -> list[list[int]]:
    """Group the stacks that share a process: in every round each once, the base (0) in all, in a new random order."""
    random = np.random.default_rng(0)
    groups = []
    for _ in range(rounds):
        others = [int(i) + 1 for i in random.permutation(count - 1)]
        for start in range(0, max(1, len(others)), together - 1):
            group = [0, *others[start : start + together - 1]]
            groups.append([group[i] for i in random.permutation(len(group))])
    return groups


def _stacks_together(weight_bytes: int) -> int:
    needed, free = COPIES * weight_bytes, psutil.virtual_memory().available
    if 2 * needed > free:
        raise CostsError(
            f"timing this model takes {2 * needed / 1e6:.0f} MB of memory and {free / 1e6:.0f} MB are free: "
            "end other programs, or probe at fewer bits"
        )
    return max(2, min(TOGETHER, int(free / 2 // needed)))


def _process(job: CostsJob, group: list[int], timeout_s: float, peer: Peer | None) -> CostProcess:
    environment = None if peer is None else peer.environment(job.threads)
    python = sys.executable if peer is None else peer.python
    try:
        answer = call("bench.costs.worker", asdict(job), timeout_s, environment, python)
    except ChildFailedError as error:
        raise CostsError(f"the process that times the operators failed ({error}): try again") from None
    return msgspec.convert({"stacks": group, **answer}, CostProcess)


def described(manifest: BundleManifest) -> CostModel:
    return CostModel(
        model_type=manifest.model_type,
        hidden=manifest.hidden_size,
        head_dim=manifest.head_dim,
        vocab=manifest.vocab_size,
        bits=manifest.bits,
        block=manifest.block,
        head_bits=manifest.lineage.get("head_bits"),
        kv_dtype=manifest.kv_dtype,
    )


def write_costs(path: str | Path, costs: Costs) -> None:
    """Write the document in one line."""
    write_text(Path(path), COSTS.text(costs, indent=None) + "\n")


def _check(costs: Costs) -> None:
    if costs.kind != KIND:
        raise ValueError(f"{costs.kind!r} is no table of costs")


COSTS = Document(
    Costs,
    "costs",
    "measure it again with `saap devices costs MODEL`",
    version="schema",
    versions=(SCHEMA,),
    check=_check,
    error=CostsError,
    mark="threads",
)

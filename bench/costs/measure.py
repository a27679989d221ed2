"""Time probe stacks on this device: what the parts of a decoder layer cost, at every size.

A stack is a bundle in which every second layer takes another size than the model's (``export.graph.probe_stacks``).
Four
stacks take their steps in turns in one process, so that what the machine does meanwhile hits all of them. Where the
weights come to lie in memory is worth some per cent too, and another matter in every process; so processes are many,
short, and mix the stacks anew. ``bench.costs.fit`` makes costs of their steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.costs.fit import CostProcess, Stack, ThreadCosts, costs_from, read_stacks
from bench.costs.worker import TURN, CostsJob
from bench.measure.child import ChildFailedError, call
from bench.measure.cores import choose_cores
from bench.measure.result import command_line
from bench.measure.roofline import probe_bandwidth
from bench.runtimes.onnxruntime import check_threads
from devices.common.errors import UserError
from devices.common.files import with_checksum, write_text
from devices.common.progress import Progress
from devices.probe.host import probe
from export.bundle.manifest import BundleManifest, read_manifest

SCHEMA = 1
KIND = "saap costs"
DEPTH = 192  # positions in the cache: the middle of 128 tokens after a prompt of 128
ROUNDS = 8
SECONDS = 2.0  # of steps in one process
TOGETHER = 4  # stacks in one process, the base among them
COPIES = 2.5  # memory of a session over the bytes of its weights: mapped, and packed


class CostsError(UserError):
    """The costs cannot be measured here; the message says why and what to do."""


def measure_costs(
    bundles: Sequence[Path],
    threads: Sequence[int],
    *,
    depth: int = DEPTH,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    timeout_s: float = 600,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time probe stacks; the document that :func:`write_costs` writes.

    Args:
        bundles: the stacks, the base first, as ``export.graph.probe_stacks.write_probe_stacks`` returns them.
        threads: counts, each measured by itself.
        depth: positions in the cache at the first step of every turn.
        rounds: fresh processes that time each stack.
        seconds: that one process takes steps for, after loading.
        timeout_s: limit of one process.
        progress: called as (label, done, total) in processes.

    Raises:
        CostsError: no threads, too many, too little memory, a depth beyond the context, or a worker that fails.
        DecoderError: more threads than cores.
    """
    manifests = [read_manifest(path) for path in bundles]
    stacks = read_stacks(manifests)
    for count in threads:
        check_threads(count)
    check_depth(manifests[0], depth)
    together = _stacks_together(manifests[0].weight_bytes_per_token)
    groups = schedule(len(stacks), rounds, together)
    device: dict[str, Any] = {**probe()}
    tables = []
    for turn, count in enumerate(threads):
        cpus, processes = choose_cores(count), []
        for index, group in enumerate(groups):
            if progress:
                progress(f"timing operators, {count} threads", turn * len(groups) + index, len(threads) * len(groups))
            job = CostsJob([str(bundles[i]) for i in group], count, cpus, depth, seconds)
            processes.append(_process(job, group, timeout_s))
        bandwidth = probe_bandwidth(cpus, device.get("last_level_cache_bytes"))
        tables.append(costs_from(stacks, processes, cpus, bandwidth))
    if progress:
        progress("timing operators", len(threads) * len(groups), len(threads) * len(groups))
    return _document(manifests[0], stacks, device, depth, tables)


def check_depth(base: BundleManifest, depth: int) -> None:
    """Raise CostsError for a depth that the model's cache does not have."""
    longest = base.context_length - TURN
    if not 2 <= depth <= longest:
        raise CostsError(f"a depth of {depth} cannot be probed with this model: give 2 to {longest}")


def schedule(count: int, rounds: int, together: int) -> list[list[int]]:
    """Which stacks share a process: in every round each once, the base (0) in all, mixed anew, in a random order."""
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


def _process(job: CostsJob, group: list[int], timeout_s: float) -> CostProcess:
    try:
        answer = call("bench.costs.worker", asdict(job), timeout_s)
    except ChildFailedError as error:
        raise CostsError(f"the process that times the operators failed ({error}): try again") from None
    return CostProcess(group, answer["samples_ns"], answer["waited_ns"])


def _document(
    manifest: BundleManifest, stacks: list[Stack], device: dict[str, Any], depth: int, tables: list[ThreadCosts]
) -> dict[str, Any]:
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "versions": dict(_versions()),
        "device": device,
        "model": described(manifest),
        "depth": depth,
        "stacks": [asdict(stack) for stack in stacks],
        "threads": [asdict(table) for table in tables],
    }


def described(manifest: BundleManifest) -> dict[str, Any]:
    """Of which model and precision costs are."""
    return {
        "model_type": manifest.model_type,
        "hidden": manifest.hidden_size,
        "head_dim": manifest.head_dim,
        "vocab": manifest.vocab_size,
        "bits": manifest.bits,
        "block": manifest.block,
        "head_bits": manifest.lineage.get("head_bits"),
        "kv_dtype": manifest.kv_dtype,
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in ("saap", "onnxruntime", "numpy"):
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # a copied tree, or a build of ONNX Runtime under another name


def write_costs(path: str | Path, document: dict[str, Any]) -> None:
    """Write the document beside ``path`` and rename it into place."""
    write_text(Path(path), json.dumps(with_checksum(document), allow_nan=False) + "\n")

"""Costs of a layer's parts from the raw steps of probe stacks: the arithmetic, apart from the measuring.

With T(base) the step of the model itself and r = T(stack) / T(base), n of whose layers take another size,

    saved by one layer = T(base) * (1 - r) / n

and a whole block costs what leaving it out saves, so that constant + sum of all blocks = T(base). The logarithm of a
stack's step in a process, turn by turn against the others, is taken as stack + process (+ a share of those that loaded
first, whose memory is less well laid out), fitted over all processes with Huber's weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.measure.result import Bandwidth
from bench.measure.statistics import Floats, middle
from export.bundle.manifest import BundleManifest, LayerSizes
from saap.base.costs import AttentionCost, ConvCost, DeltaCost, FfnCost, FormCost, HeadCost, ThreadCosts

HUBER_TUNING, HUBER_ROUNDS = 1.345, 20
QUIET = 10  # percent
FINEST = 1e-4  # relative spread of steps, below which nothing is an outlier


@dataclass(frozen=True)
class Stack:
    """One probe stack: ``changed`` of its layers have the sizes ``option`` and not those of the base."""

    option: LayerSizes
    changed: int  # 0 in the base
    layers: int
    nodes: int  # of the graph as it was written
    weight_bytes: int  # read per step
    head_rows: int = 0  # tokens that its head predicts; 0: all
    part: str = ""  # attention, ffn or outside: what has other integers
    bits: int = 0  # of these
    group_size: int = 0  # weights per scale there
    share: float = 1.0  # of the part's weights that have them


@dataclass(frozen=True)
class CostProcess:
    """The raw steps of one worker: [stack][turn][step] in nanoseconds, and the part of each spent in the run queue."""

    stacks: list[int]
    samples_ns: list[list[list[int]]]
    waited_ns: list[list[list[int]]]

    def step_ms(self, stack: int) -> float:
        """Milliseconds of an undisturbed step on its core: the tenth percentile.

        With several threads a step waits for the one that lost its core to another program, which the main thread's
        run queue does not tell; steps that nothing hit are the fast ones.
        """
        return float(np.percentile(self._steps()[self.stacks.index(stack)], QUIET)) / 1e6

    def levels(self) -> list[float]:
        """Logarithm of each stack's step, against the others in the same turn: what slows a turn slows all of them."""
        turns = np.log(self._steps().min(-1))
        return [middle(row) for row in turns - turns.mean(0)]

    def wait_share(self) -> float:
        """Return the part of its time that the process was ready to run and had no core."""
        return float(np.sum(self.waited_ns) / np.sum(self.samples_ns))

    def _steps(self) -> Floats:
        """[stack, turn, step] in nanoseconds."""
        steps: Floats = np.array(self.samples_ns, float) - np.array(self.waited_ns, float)
        return steps


@dataclass(frozen=True, kw_only=True)
class MeasuredCosts(ThreadCosts):
    """The costs at one thread count, with what they were computed from."""

    affinity: list[int]
    step_ms: float  # of the base stack
    node_ms: float | None  # of one node of a graph as it is written, its arithmetic apart
    bandwidth: Bandwidth
    processes: list[CostProcess]


def read_stacks(manifests: Sequence[BundleManifest]) -> list[Stack]:
    """Return the change of each stack against the first."""
    base = manifests[0].layers
    stacks = []
    for manifest in manifests:
        changed = [own for own, whole in zip(manifest.layers, base, strict=True) if own != whole]
        option = changed[0] if changed else base[0]
        about, size = manifest.lineage, manifest.weight_bytes_per_token
        bits, group_size = about.get("form", (0, 0))
        counts = len(changed), len(base), int(about["nodes"]), size, int(about.get("head_rows", 0))
        form = str(about.get("part", "")), int(bits), int(group_size), float(about.get("share", 1.0))
        stacks.append(Stack(option, *counts, *form))
    return stacks


def costs_from(
    stacks: Sequence[Stack], processes: Sequence[CostProcess], cpus: list[int], bandwidth: Bandwidth
) -> MeasuredCosts:
    """Compute costs from the raw steps of probe stacks.

    Args:
        stacks: the base first; one of them without attention, one without FFN.
        processes: all with the base in them.
    """
    base = statistics.median(process.step_ms(0) for process in processes)
    full = stacks[0].option
    ratios = fit_ratios(processes, len(stacks))
    smaller = {stack.head_rows: base * (1 - ratios[i]) for i, stack in enumerate(stacks) if stack.head_rows}
    saved = {i: base * (1 - ratios[i]) / stack.changed for i, stack in enumerate(stacks) if stack.changed}
    no_attention = next(i for i in saved if not any(((of := stacks[i].option).query_heads, of.conv, of.delta)))
    no_ffn = next(i for i in saved if not stacks[i].option.ffn)
    attention, ffn = [AttentionCost(full.query_heads, full.kv_heads, saved[no_attention])], []
    ffn.append(FfnCost(full.ffn, saved[no_ffn]))
    conv, delta = [], []  # each in the place of an attention block
    for i in saved.keys() - {no_attention, no_ffn}:
        option = stacks[i].option
        if option.conv:
            conv.append(ConvCost(option.conv, saved[no_attention] - saved[i]))
        elif option.delta:
            delta.append(DeltaCost(option.delta, saved[no_attention] - saved[i]))
        elif option.ffn == full.ffn:
            attention.append(AttentionCost(option.query_heads, option.kv_heads, saved[no_attention] - saved[i]))
        else:
            ffn.append(FfnCost(option.ffn, saved[no_ffn] - saved[i]))
    constant = base - stacks[0].layers * (saved[no_attention] + saved[no_ffn])
    whole = {"attention": saved[no_attention], "ffn": saved[no_ffn], "outside": constant}
    formed: dict[tuple[int, int], dict[str, float]] = {}
    for i, stack in enumerate(stacks):
        if stack.part:
            places = 1 if stack.part == "outside" else stack.layers
            less = base * (1 - ratios[i]) / places / stack.share
            formed.setdefault((stack.bits, stack.group_size), {})[stack.part] = whole[stack.part] - less
    nodes = (stacks[0].nodes - stacks[no_ffn].nodes) / stacks[no_ffn].changed
    return MeasuredCosts(
        n_threads=len(cpus),
        affinity=cpus,
        step_ms=base,
        constant_ms=constant,
        node_ms=_node_ms(ffn, nodes),
        attention=sorted(attention, key=lambda cost: (cost.kv_heads, cost.query_heads)),
        ffn=sorted(ffn, key=lambda cost: cost.width),
        bandwidth=bandwidth,
        processes=list(processes),
        conv=sorted(conv, key=lambda cost: cost.channels),
        delta=sorted(delta, key=lambda cost: cost.heads),
        head=[HeadCost(rows, constant - less) for rows, less in sorted(smaller.items())],
        forms=[
            FormCost(*form, parts.get("attention"), parts.get("ffn"), parts.get("outside"))
            for form, parts in sorted(formed.items())
        ],
    )


def fit_ratios(processes: Sequence[CostProcess], count: int) -> list[float]:
    """Step of each of ``count`` stacks over that of the first: robust two-way fit (Huber 1981, chapter 7)."""
    rows, steps = [], []
    for index, process in enumerate(processes):
        for place, (stack, level) in enumerate(zip(process.stacks, process.levels(), strict=True)):
            row = np.zeros(count + len(processes) + 1)
            row[[stack, count + index]] = 1
            row[-1] = place == 0
            rows.append(row)
            steps.append(level)
    # So that few processes, which cannot tell the share of the first place, leave it at nothing.
    rows.append(np.append(np.zeros(count + len(processes)), 1e-3))
    design, logs = np.array(rows), np.array([*steps, 0.0])
    weights = np.ones(len(logs))
    for _ in range(HUBER_ROUNDS):
        root = np.sqrt(weights)
        effects = np.linalg.lstsq(design * root[:, None], logs * root, rcond=None)[0]
        off = np.abs(logs - design @ effects)
        spread = max(1.4826 * float(np.median(off)), FINEST)
        weights = np.minimum(1, HUBER_TUNING * spread / np.maximum(off, FINEST))
    return [float(np.exp(effect - effects[0])) for effect in effects[:count]]


def _node_ms(ffn: Sequence[FfnCost], nodes: float) -> float | None:
    """Extrapolate a feed-forward block to width 0, by the line through its widths (Theil-Sen), over its nodes."""
    slopes = [(a.ms - b.ms) / (a.width - b.width) for a in ffn for b in ffn if a.width > b.width]
    if not slopes:
        return None
    slope = statistics.median(slopes)
    return max(0.0, statistics.median(cost.ms - slope * cost.width for cost in ffn)) / nodes

"""Compare a bundle's answers on aarch64 with this host's: the real agent, worker and wheel, emulated.

Kernels differ by instruction set: fp32 sums in another order, int4 with activations in int8 even rounds otherwise (a
CPU without dotprod computes them in fp32). So greedy tokens must be the same for a bundle of 32 bits, and for others
the likelihood of a text may move by ``NLL_TOLERANCE``. Speeds are null: an emulator's times say nothing of a board.
"""

from __future__ import annotations

import math
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bench.measure.answers import NLL_TOLERANCE, answer_of, ask, read_answer
from bench.measure.options import BenchOptions
from bench.measure.result import Result
from bench.remote.board import Board
from bench.remote.files import pack
from bench.remote.options import BoardOptions
from bench.remote.target import measure_on
from bench.runtimes.peers import read_peers
from devices.emulate.qemu import Emulated, EmulationError, Root
from export.bundle.manifest import BundleManifest, read_manifest
from saap.base.progress import Progress

GREEDY = 16
NO_SPEED = "computed by an emulator, whose times say nothing of a board"
TIMEOUT_S = 3600.0  # of one process: kernels are 25 to 130 times slower
SILENCE_S = 600.0  # its Python needs seconds to start, on a busy host more than a real board may be silent for


@dataclass(frozen=True)
class Answer:
    """One CPU's answer to the text. Speed and memory are null, and ``unknown`` says why."""

    cpu: str
    tokens: list[int]
    nll: float
    versions: dict[str, str] = field(default_factory=dict)
    same_tokens: int | None = None  # how many of the first tokens are this host's
    nll_difference: float | None = None  # from this host, nats per token
    faults: list[str] = field(default_factory=list)
    decode_ts: None = None
    prefill_ts: None = None
    peak_decode_bytes: None = None
    unknown: dict[str, str] = field(
        default_factory=lambda: dict.fromkeys(("decode_ts", "prefill_ts", "peak_decode_bytes"), NO_SPEED)
    )


@dataclass(frozen=True)
class Emulation:
    """One bundle on several CPUs."""

    bundle: str
    bundle_hash: str | None
    bits: int
    text: list[int]
    reference: Answer  # of this host
    answers: list[Answer]
    schema: int = 1

    @property
    def exit_code(self) -> int:
        return int(any(answer.faults for answer in self.answers))


def emulate(
    spec: str,
    cpus: Sequence[str],
    text: Sequence[int],
    root: Root,
    *,
    progress: Progress | None = None,
    run: Callable[[str, BenchOptions, Emulated, Progress | None], Result] | None = None,
) -> Emulation:
    """Ask a bundle on this host and on every CPU.

    Args:
        text: token ids, at least two.
        root: of ``devices.emulate.qemu.prepare``.

    Raises:
        EmulationError: the bundle does not answer here.
        BoardError: the agent or the worker fails there.
    """
    plan = BenchOptions(
        prompt=4, generate=2, threads=1, repetitions=1, warmup=1, cold=False, timeout_s=TIMEOUT_S, text=tuple(text),
        greedy=GREEDY,
    )  # fmt: skip
    (peer,) = read_peers([spec], len(text) + GREEDY)
    manifest = read_manifest(peer.path)
    here = read_answer(ask(peer, plan, 1))
    if here.error:
        raise EmulationError(f"{spec} does not answer on this host: {here.error}")
    reference = Answer(f"this host ({platform.machine()})", here.tokens, here.nll)
    answers = []
    with tempfile.TemporaryDirectory(prefix="saap-emulated-") as home:
        for cpu in cpus:
            result = (run or _run)(spec, plan, Emulated(root, cpu, Path(home) / cpu), progress)
            answers.append(judged(_answer(cpu, result), reference, manifest))
    return Emulation(spec, manifest.content_hash, manifest.bits, list(text), reference, answers)


def judged(answer: Answer, reference: Answer, manifest: BundleManifest) -> Answer:
    """Add an answer's differences from this host's, and those that are faults."""
    pairs = list(zip(answer.tokens, reference.tokens, strict=False))
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    moved = answer.nll - reference.nll
    faults = []
    if manifest.bits == 32 and answer.tokens != reference.tokens:
        faults.append(f"greedy tokens differ from the {same + 1}. on, and 32 bits must give the same")
    if not abs(moved) <= NLL_TOLERANCE:
        faults.append(f"the likelihood moved by {moved:+.4f} nats per token, {NLL_TOLERANCE} are allowed")
    return replace(answer, same_tokens=same, nll_difference=moved, faults=faults)


def document(emulation: Emulation) -> dict[str, object]:
    """Return the emulation as JSON; NaN and infinity are null."""
    content = asdict(emulation)
    for answer in (content["reference"], *content["answers"]):
        for name in ("nll", "nll_difference"):
            if answer[name] is not None and not math.isfinite(answer[name]):
                answer[name] = None
                answer["unknown"][name] = "it is not a number"
    return content


def _run(spec: str, plan: BenchOptions, board: Emulated, progress: Progress | None) -> Result:
    slow = Board(board, patience_s=TIMEOUT_S, silence_s=SILENCE_S)
    return measure_on(slow, pack([spec], plan.positions, BoardOptions(board_packages=True)), plan, progress)


def _answer(cpu: str, result: Result) -> Answer:
    answer = answer_of(result)
    (m,) = result.measurements
    if answer.error or not m.samples:
        why = answer.error or "; ".join(m.reasons)
        raise EmulationError(f"{m.name} does not run on an emulated {cpu}: {why}")
    if (ran_on := result.device.get("architecture")) != "aarch64":
        raise EmulationError(f"the emulated Python of {cpu} was not used: the run was on {ran_on}")
    packages = ["python", "onnxruntime", "numpy"]
    versions = {name: result.versions[name] for name in packages if name in result.versions}
    return Answer(cpu, answer.tokens, answer.nll, versions)

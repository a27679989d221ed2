"""A model's answer beside its speed: greedy tokens after a fixed text, and the text's negative log-likelihood.

The text is token ids, so that a board needs neither tokenizer nor file, and a changed tokenizer is no excuse.
Results differ between instruction sets (int8 kernels sum in another order), so answers compare within one device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from bench.measure.options import BenchOptions
from bench.measure.result import Json, Result
from bench.runtimes.peers import Peer
from export.engine.process import EngineProcess
from saap.base.child import ChildFailedError
from saap.base.progress import Progress, advance

NLL_TOLERANCE = 0.02  # nats per token: what other kernels of the same precision move it by


@dataclass(frozen=True)
class Answer:
    """Greedy tokens and nats per token; or why there are none."""

    tokens: list[int] = field(default_factory=list)
    nll: float = math.nan
    error: str | None = None


def ask_all(peers: Sequence[Peer], plan: BenchOptions, threads: int, progress: Progress | None) -> Json:
    """Return the text of the options and each model's answer to it, as a result records them; empty without a text."""
    if not plan.text:
        return {}
    advance(progress, "asking for answers", 0, 0)
    return {"text": list(plan.text), "answers": {peer.name: ask(peer, plan, threads) for peer in peers}}


def ask(peer: Peer, plan: BenchOptions, threads: int) -> Json:
    """Ask a bundle for its answer to ``plan.text``, in a fresh process.

    Returns:
        ``{"tokens": [plan.greedy ids], "nll": nats per token}``, or ``{"error": why}``. A likelihood that is no number
        is None, which JSON can hold: a board's result has to arrive to be called worse.
    """
    if not peer.row.of_bundles:
        return {"error": f"{peer.kind} is not asked: give a bundle"}
    job = peer.job(threads, len(plan.text) + plan.greedy, plan.provider)
    try:
        with EngineProcess(job, peer.python, peer.environment(threads), plan.timeout_s) as process:
            return process.text(list(plan.text), plan.greedy)
    except ChildFailedError as error:
        return {"error": str(error)}


def answer_of(result: Result) -> Answer:
    """Return the answer of a result's only model."""
    answers = result.settings.get("answers") or {}
    return read_answer(next(iter(answers.values()), {"error": "the run did not ask the model"}))


def read_answer(answer: Json) -> Answer:
    """Read the result of ``ask``; a likelihood of None is NaN."""
    return msgspec.convert({key: value for key, value in answer.items() if value is not None}, Answer)

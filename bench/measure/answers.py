"""A model's answer beside its speed: greedy tokens after a fixed text, and the text's negative log-likelihood.

``python -m bench.measure.answers`` is the process that asks one bundle, job as JSON on stdin, the answer as one line
of JSON. The text is token ids, so that a board needs neither tokenizer nor file, and a changed tokenizer is no excuse.
Results differ between instruction sets (int8 kernels sum in another order), so answers compare within one device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

import msgspec
import numpy as np

from bench.measure.cores import choose_cores, pin
from bench.measure.options import BenchOptions
from bench.measure.result import Json, Result
from bench.runtimes.peers import Peer
from export.engine.onnxruntime import Decoder, Logits
from saap.base.child import ChildFailedError, call, job_and_tell
from saap.base.progress import Progress

NLL_TOLERANCE = 0.02  # nats per token: what other kernels of the same precision move it by


@dataclass(frozen=True)
class Answer:
    """Greedy tokens and nats per token; or why there are none."""

    tokens: list[int] = field(default_factory=list)
    nll: float = math.nan
    error: str | None = None


@dataclass(frozen=True)
class _Job:
    path: str
    ids: list[int]
    greedy: int
    threads: int
    cpus: list[int]
    provider: str
    runtime: str | None = None  # module of another engine; None: ONNX Runtime
    choice: str | None = None  # of that engine's own settings


def ask_all(peers: Sequence[Peer], plan: BenchOptions, threads: int, progress: Progress | None) -> Json:
    """The text of the options and each model's answer to it, as a result records them; empty without a text."""
    if not plan.text:
        return {}
    if progress:
        progress("asking for answers", 0, 0)
    return {"text": list(plan.text), "answers": {peer.name: ask(peer, plan, threads) for peer in peers}}


def ask(peer: Peer, plan: BenchOptions, threads: int) -> Json:
    """Ask a bundle for its answer to ``plan.text``, in a fresh process.

    Returns:
        ``{"tokens": [plan.greedy ids], "nll": nats per token}``, or ``{"error": why}``. A likelihood that is no number
        is None, which JSON can hold: a board's result has to arrive to be called worse.
    """
    if peer.kind not in ("onnx", "llama.cpp", "openvino"):
        return {"error": f"{peer.kind} is not asked: give a bundle"}
    cpus = choose_cores(threads)
    job = _Job(str(peer.path), list(plan.text), plan.greedy, threads, cpus, plan.provider, peer.runtime, peer.choice)
    try:
        return call("bench.measure.answers", asdict(job), plan.timeout_s, peer.environment(threads), peer.python)
    except ChildFailedError as error:
        return {"error": str(error)}


def answer_of(result: Result) -> Answer:
    """The answer of a result's only model."""
    answers = result.settings.get("answers") or {}
    return read_answer(next(iter(answers.values()), {"error": "the run did not ask the model"}))


def read_answer(answer: Json) -> Answer:
    """Read the result of ``ask``; a likelihood of None is NaN."""
    return msgspec.convert({key: value for key, value in answer.items() if value is not None}, Answer)


def answers(decoder: Decoder, ids: list[int], greedy: int) -> Json:
    """Ask a decoder that holds ``len(ids) + greedy`` positions.

    The likelihood is taken step by step and the tokens after one prefill, so both paths are looked at.

    Args:
        ids: at least two.
    """
    decoder.reset()
    logits = decoder.prefill(np.asarray(ids[:1], np.int64))
    losses = []
    for token in ids[1:]:
        losses.append(_loss(logits, token))
        logits = decoder.step(token)
    decoder.reset()
    logits = decoder.prefill(np.asarray(ids, np.int64))
    tokens: list[int] = []
    while len(tokens) < greedy:
        tokens.append(int(np.argmax(logits)))
        if len(tokens) < greedy:
            logits = decoder.step(tokens[-1])
    nll = float(np.mean(losses))
    return {"tokens": tokens, "nll": nll if math.isfinite(nll) else None}


def _loss(logits: Logits, token: int) -> float:
    """-log softmax, in float64 so that the sum over the vocabulary adds no error of its own."""
    row = np.asarray(logits, np.float64)
    top = row.max()
    return float(top + np.log(np.exp(row - top).sum()) - row[token])


def main() -> None:
    job, tell = job_and_tell(_Job)
    pin(job.cpus)
    length = len(job.ids) + job.greedy
    if job.runtime is None:
        from bench.runtimes.decoders import make_decoder

        decoder = make_decoder(job.path, job.threads, length, job.provider)
    else:
        choice = {} if job.choice is None else {"choice": job.choice}
        decoder = import_module(job.runtime).load(Path(job.path), job.threads, length, **choice)
    tell(answers(decoder, job.ids, job.greedy))


if __name__ == "__main__":
    main()

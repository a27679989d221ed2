"""What a model says, beside how fast: greedy tokens after a fixed text, and the text's negative log-likelihood.

``python -m bench.measure.answers`` is the process that asks one bundle, job as JSON on stdin, the answer as one line
of JSON. The text is token ids, so that a board needs neither tokenizer nor file, and a changed tokenizer is no excuse.
Results differ between instruction sets (int8 kernels sum in another order), so answers compare within one device.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bench.child import ChildFailedError, call, job_and_tell
from bench.measure.cores import choose_cores, pin
from bench.measure.options import BenchOptions
from bench.measure.result import Result
from bench.runtimes.onnxruntime import Decoder, Logits
from bench.runtimes.peers import Peer

NLL_TOLERANCE = 0.02  # nats per token: what other kernels of the same precision move it by


def ask(peer: Peer, plan: BenchOptions, threads: int) -> dict[str, Any]:
    """What a bundle says to ``plan.text``, in a fresh process.

    Returns:
        ``{"tokens": [plan.greedy ids], "nll": nats per token}``, or ``{"error": why}``. A likelihood that is no number
        is None, which JSON can hold: a board's result has to arrive to be called worse.
    """
    if peer.runtime is not None:
        return {"error": f"{peer.kind} is not asked: give a bundle"}
    job = {
        "path": str(peer.path), "ids": list(plan.text), "greedy": plan.greedy, "threads": threads,
        "cpus": choose_cores(threads), "provider": plan.provider,
    }  # fmt: skip
    environment = peer.environment(threads)
    try:
        return call("bench.measure.answers", job, plan.timeout_s, environment, peer.python)
    except ChildFailedError as error:
        return {"error": str(error)}


def answer_of(result: Result) -> dict[str, Any]:
    """The answers of a result's only model."""
    given = result.settings.get("answers") or {}
    return numeric(next(iter(given.values()), {"error": "the run did not ask the model"}))


def numeric(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer whose likelihood is a float, NaN where it is no number."""
    return answer if "error" in answer or answer["nll"] is not None else {**answer, "nll": math.nan}


def answers(decoder: Decoder, ids: list[int], greedy: int) -> dict[str, Any]:
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
    """Read the job, print the answer."""
    from bench.runtimes.decoders import make_decoder

    job, tell = job_and_tell()
    pin(job["cpus"])
    positions = len(job["ids"]) + job["greedy"]
    decoder = make_decoder(job["path"], job["threads"], positions, job["provider"])
    tell(answers(decoder, job["ids"], job["greedy"]))


if __name__ == "__main__":
    main()

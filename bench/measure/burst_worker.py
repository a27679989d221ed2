"""The process that keeps a model loaded: ``python -m bench.measure.burst_worker``, a JSON line for a JSON line.

The first line is the ``Job``; its answer, the seconds of a decode step, comes once the model is loaded and warm. Each
line after it asks for the prompt from an empty cache, or for some decode steps, and is answered with their seconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time

import msgspec
import numpy as np

from bench.measure.cores import pin
from bench.measure.worker import Job, chooser, runtime_of, warm_up

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


class Burst(msgspec.Struct):
    """What is asked for: the prompt, or so many decode steps after what came before."""

    prompt: bool = False
    steps: int = 0


def main() -> None:
    """Answer until nothing more is asked."""
    if sys.platform == "linux":  # a process that is stopped does not see that its parent has gone
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print

    def answer(seconds: float) -> None:
        out.write(json.dumps({"seconds": seconds}) + "\n")
        out.flush()

    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    load, _ = runtime_of(job)
    pin(job.cpus)
    decoder, clock = load(job), time.perf_counter
    choose = chooser(decoder)
    prompt, context = np.asarray(job.prompt, np.int64), np.asarray(job.context, np.int64)
    times, _ = warm_up(decoder, prompt, job.warmup, clock, context, job.n_gen)
    answer(float(np.median(times[1:] or times or [1.0])))
    token = 0
    for line in sys.stdin.buffer:
        burst = msgspec.json.decode(line, type=Burst)
        if burst.prompt:
            decoder.reset()
            if len(context):
                logits = decoder.prefill(context)
            start = clock()
            if len(prompt):
                logits = decoder.prefill(prompt)
            token = choose(logits)
        else:
            start = clock()
            for _ in range(burst.steps):
                token = choose(decoder.step(token))
        answer(clock() - start)


if __name__ == "__main__":
    main()

"""Logits of a bundle's file in another engine, in a process of its own: ``python -m export.engine.worker``.

What the bench times and what is judged here are one: the same library, options and numbers of the cache.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.engine.llama_cpp import LlamaCppDecoder
from export.engine.onnxruntime import Logits
from export.engine.openvino import scorer as openvino_scorer
from export.engine.table import OPENVINO
from saap.base.child import ChildFailedError, call, job_and_tell
from saap.base.errors import UserError

TIMEOUT_S = 3600.0  # of one batch of rows


@dataclass(frozen=True)
class Job:
    """Rows of token ids, each read from an empty cache, and the .npy file for their logits."""

    engine: str
    path: str
    rows: list[list[int]]
    threads: int
    out: str


def process_environment(threads: int) -> dict[str, str]:
    """Variables of a process that runs llama.cpp: a failed assertion would start a debugger to print the stack."""
    return {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}


def logits_of(engine: str, path: Path, python: str, rows: NDArray[np.int64], threads: int) -> Logits:
    """Logits [rows, tokens, vocab] of rows [rows, tokens], of a model that is loaded for this call.

    Args:
        path: a GGUF file for llama.cpp, a bundle for OpenVINO.
        python: that has the engine.

    Raises UserError: the engine cannot run it.
    """
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "logits.npy"
        job = asdict(Job(engine, str(path.resolve()), rows.tolist(), threads, str(out)))
        try:
            call(__name__, job, TIMEOUT_S, process_environment(threads), python)
        except ChildFailedError as error:
            raise UserError(f"{path} gives no logits in {engine}: {error}") from None
        found: Logits = np.load(out)
        return found


def main() -> None:
    job, tell = job_and_tell(Job)
    path, longest = Path(job.path), max(map(len, job.rows))
    kind = openvino_scorer if job.engine == OPENVINO else LlamaCppDecoder
    decoder = kind(path, job.threads, longest)
    np.save(job.out, np.stack([decoder.logits(np.asarray(row)).copy() for row in job.rows]))
    tell({"rows": len(job.rows)})


if __name__ == "__main__":
    main()

"""Logits of a GGUF file in llama.cpp, in a process of its own: ``python -m bench.runtimes.llama_cpp_logits``.

What the bench times and what is judged here are one: the same library, options and numbers of the cache.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from devices.common.child import ChildFailedError, call, job_and_tell
from devices.common.errors import UserError
from export.bundle.decoder import Logits

if TYPE_CHECKING:
    from bench.runtimes.peers import Peer

TIMEOUT_S = 3600.0  # of one batch of rows


@dataclass(frozen=True)
class Job:
    """Rows of token ids, each read from an empty cache, and the .npy file for their logits."""

    path: str
    rows: list[list[int]]
    threads: int
    out: str


def logits_of(peer: Peer, rows: NDArray[np.int64], threads: int) -> Logits:
    """Logits [rows, tokens, vocab] of rows [rows, tokens], loaded for this call.

    Raises UserError: llama.cpp cannot run the file.
    """
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "logits.npy"
        job = asdict(Job(str(peer.path), rows.tolist(), threads, str(out)))
        try:
            call(__name__, job, TIMEOUT_S, peer.environment(threads), peer.python)
        except ChildFailedError as error:
            raise UserError(f"{peer.spec} gives no logits: {error}") from None
        found: Logits = np.load(out)
        return found


def main() -> None:
    job, tell = job_and_tell(Job)
    from bench.runtimes.llama_cpp import LlamaCppDecoder

    decoder = LlamaCppDecoder(Path(job.path), job.threads, max(map(len, job.rows)))
    np.save(job.out, np.stack([decoder.logits(np.asarray(row)).copy() for row in job.rows]))
    tell({"rows": len(job.rows)})


if __name__ == "__main__":
    main()

"""One thing to measure, and the Python that measures it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure.child import ChildFailedError, call
from bench.measure.installed import absent
from bench.measure.result import ModelFacts
from devices.common.errors import UserError

PEER_PYTHON = "SAAP_PEER_PYTHON"
WORKER_TELLS = ("parameters", "model_bytes", "weight_bytes_per_token", "kv_bytes_per_token", "bits")


class PeerError(UserError):
    """A spec that cannot be measured here."""


@dataclass(frozen=True)
class Peer:
    """One thing to measure, checked, and the worker that measures it."""

    name: str
    spec: str
    kind: str  # onnx | torch | llama.cpp | genai | optimum
    path: Path
    worker: str  # module that runs as __main__
    vocab_size: int
    bundle_hash: str | None
    model: ModelFacts
    unknown: dict[str, str]
    python: str = sys.executable  # interpreter of the worker

    def environment(self, threads: int) -> dict[str, str]:
        """Variables of the worker's process.

        PyTorch's OpenMP threads that spin while idle slow their neighbours. llama.cpp computes with OpenMP's, so their
        waiting is left as its builders chose it.
        """
        if self.kind in ("torch", "optimum"):
            quiet = {"TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_OFFLINE": "1"}
            return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", **quiet}
        # A failed assertion of ggml would otherwise start a debugger to print the stack.
        return {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}


def unknown_facts() -> dict[str, str]:
    """Why sizes are null in a result whose worker never answered."""
    return dict.fromkeys(WORKER_TELLS, "the worker gave no answer")


def python_with(modules: Sequence[str], what: str, install: str) -> str:
    """The interpreter that has ``modules``: the one that ``SAAP_PEER_PYTHON`` names, else our own.

    Raises:
        PeerError: neither has them; ``what`` is the spec, ``install`` what to give to pip.
    """
    chosen = os.environ.get(PEER_PYTHON)
    if chosen and not missing_in(chosen, modules):
        return chosen
    missing = absent(modules)
    if not missing:
        return sys.executable
    elsewhere = f" in {chosen} or here" if chosen else ""
    raise PeerError(
        f"{what} needs {missing[0]}, which is not installed{elsewhere}: pip install {install}, "
        f"or name a Python that has it in {PEER_PYTHON}"
    )


def missing_in(python: str, modules: Sequence[str]) -> list[str]:
    """Which of ``modules`` another interpreter does not have; none is imported.

    Raises:
        PeerError: it is no Python that can run our workers.
    """
    try:
        return list(call("bench.measure.installed", {"modules": list(modules)}, 60, python=python)["missing"])
    except (OSError, ChildFailedError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PeerError(
            f"{PEER_PYTHON}={python} does not run ({reason}): give the path of a Python 3.10 or newer with numpy"
        ) from None

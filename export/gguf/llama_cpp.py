"""Integers of llama.cpp's own quantizer, in a process of its own: a failed assertion of ggml ends the process.

``python -m export.gguf.llama_cpp`` is that process, in the Python that has llama-cpp-python.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from saap.base.child import ChildFailedError, call, job_and_tell
from saap.base.errors import UserError
from saap.base.interpreters import python_with

HOURS_S = 4 * 3600  # of a model as large as a disk holds


@dataclass(frozen=True)
class Job:
    """A GGUF file of floats, where the other goes, and its type as llama-quantize calls it."""

    source: str
    out: str
    kind: str


def quantizer() -> str:
    """Find the Python that has llama.cpp. Raises UserError: none has."""
    return python_with(["llama_cpp"], "llama.cpp's quantizer", "llama-cpp-python")


def quantize(source: Path, out: Path, kind: str, python: str) -> None:
    """Write a file of floats as one of integers, as llama-quantize does by default.

    Raises UserError: a type that llama.cpp does not know, or a model that it cannot quantize.
    """
    job = asdict(Job(str(source.resolve()), str(out.resolve()), kind))
    try:
        call("export.gguf.llama_cpp", job, HOURS_S, env={"GGML_NO_BACKTRACE": "1"}, python=python)
    except ChildFailedError as error:
        raise UserError(f"llama.cpp wrote no {kind} of {source.name}: {error}") from None


def main() -> None:
    job, tell = job_and_tell(Job)
    from llama_cpp import llama_cpp

    kind = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job.kind}", None)
    if kind is None:
        sys.exit(f"it knows no type {job.kind}")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = kind
    if llama_cpp.llama_model_quantize(job.source.encode(), job.out.encode(), ctypes.byref(options)):
        sys.exit(1)  # llama.cpp has said why
    tell({"bytes": Path(job.out).stat().st_size})


if __name__ == "__main__":
    main()

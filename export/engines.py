"""Files of other engines beside the graph: the same integers, held against what the graph says."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from torch.nn import functional as F

from devices.common.progress import Progress
from export.bundle.engines import ENGINES, FILES, LLAMA_CPP, ONNXRUNTIME
from export.bundle.llama_cpp_logits import logits_of
from export.bundle.manifest import Parity
from export.gguf.layout import GGUFSource
from export.gguf.llama_cpp import quantizer
from export.gguf.write import BITS as GGUF_TYPES
from export.gguf.write import write_gguf
from export.options import ExportOptions
from export.source import ModelSource
from saap.system.device_names import AUTO
from saap.system.errors import UserError

FARTHEST = 0.02  # of the graph's perplexity: llama.cpp rounds activations its own way


def engines_of(directory: Path, options: ExportOptions) -> list[str]:
    """The engines that are asked for, ONNX Runtime first; with ``auto`` those that are here and hold the model."""
    if options.engines != (AUTO,):
        return sorted(options.engines, key=ENGINES.index)
    found = [ONNXRUNTIME]
    if options.target == "cpu" and options.integers != "nearest":
        with suppress(UserError):
            quantizer()
            GGUFSource(directory, None, None)
            found.append(LLAMA_CPP)
    return found


def check_engines(directory: Path, options: ExportOptions) -> None:
    """Raise UserError for an engine that cannot hold the model, before its integers are chosen."""
    if LLAMA_CPP in options.engines:
        try:
            GGUFSource(directory, None, None)
        except UserError as error:
            raise UserError(f"--engines {LLAMA_CPP}: {error}") from None


def write_engine(
    engine: str, source: ModelSource, out: Path, options: ExportOptions, progress: Progress | None
) -> dict[str, object]:
    """Write the file of another engine beside the graph; what the manifest says of it.

    Raises UserError: the engine cannot hold the model.
    """
    kind = None if source.quant else GGUF_TYPES[options.bits or 4]
    try:
        report = write_gguf(source.directory, out / FILES[engine], kind=kind, progress=progress)
    except UserError as error:
        raise UserError(f"--engines {engine}: {error}") from None
    return {"exact": report.worst_error_rounded in (None, 0.0), "type": report.kind, "notes": report.notes}


def engine_nll(file: Path, ids: torch.Tensor | None, parity: Parity | None, progress: Progress | None) -> float | None:
    """What llama.cpp makes of the rows of the parity check, nats per token; None where it was not checked or not here.

    Raises UserError: it computes something else than the graph.
    """
    if ids is None or parity is None:
        return None
    try:
        python = quantizer()
    except UserError:
        return None
    if progress:
        progress("checking what llama.cpp computes (rows)", 0, len(ids))
    logits = torch.from_numpy(logits_of(file, python, ids.numpy(), torch.get_num_threads()))
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    if progress:
        progress("checking what llama.cpp computes (rows)", len(ids), len(ids))
    if abs(nll - parity.nll_graph) > FARTHEST:
        raise UserError(
            f"llama.cpp computes something else than the graph (NLL {nll:.4f} instead of {parity.nll_graph:.4f}): "
            "nothing was exported; leave llama.cpp out of --engines"
        )
    return nll

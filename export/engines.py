"""Other engines of a bundle: the same integers in a file beside the graph or in the graph itself, held against it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from torch.nn import functional as F

from export.bundle.manifest import Parity
from export.engine.table import ENGINES, EXTRAS, FILES, LLAMA_CPP, ONNXRUNTIME, OPENVINO, PACKAGES
from export.engine.worker import logits_of
from export.gguf.families import open_source
from export.gguf.write import BITS as GGUF_TYPES
from export.gguf.write import write_gguf
from export.options import ExportOptions
from export.source import ModelSource
from saap.base.errors import UserError
from saap.base.interpreters import python_with
from saap.base.progress import Progress
from saap.models.architectures import shape_of
from saap.models.checkpoint import read_config
from saap.system.device_names import AUTO

FARTHEST = 0.02  # of the graph's perplexity: each engine rounds activations its own way


def engines_of(directory: Path, options: ExportOptions) -> list[str]:
    """The engines that are asked for, ONNX Runtime first; with ``auto`` those that are here and hold the model."""
    if options.engines != (AUTO,):
        return sorted(options.engines, key=ENGINES.index)
    found = [ONNXRUNTIME]
    if options.target != "cpu":
        return found
    with suppress(UserError):
        if options.integers != "nearest":
            python_of(LLAMA_CPP)
            open_source(directory, None, None)
            found.append(LLAMA_CPP)
    with suppress(UserError):
        if options.kv_bits == 32:
            python_of(OPENVINO)
            check_operators(directory)
            found.append(OPENVINO)
    return found


def python_of(engine: str) -> str:
    """The Python that has an engine. Raises UserError: there is none."""
    return python_with(PACKAGES[engine], engine, EXTRAS[engine])


def check_engines(directory: Path, options: ExportOptions) -> None:
    """Raise UserError for an engine that cannot hold the model or is not here, before its integers are chosen.

    llama.cpp need not be here, for its file is written without it.
    """
    if OPENVINO in options.engines:
        check_operators(directory)
        python_of(OPENVINO)
    if LLAMA_CPP in options.engines:
        try:
            open_source(directory, None, None)
        except UserError as error:
            raise UserError(f"--engines {LLAMA_CPP}: {error}") from None


def check_operators(directory: Path) -> None:
    """Raise UserError for a model whose graph has an operator that OpenVINO does not read."""
    shape = shape_of(read_config(directory))
    if shape.delta is not None:
        raise UserError(f"--engines {OPENVINO}: it does not read the operator of gated delta nets: leave it out")
    if shape.per_layer:
        raise UserError(f"--engines {OPENVINO}: keys and values that later layers read were not tried: leave it out")


def write_engine(
    engine: str, source: ModelSource, out: Path, options: ExportOptions, progress: Progress | None
) -> dict[str, object]:
    """Write the file of another engine beside the graph, if it needs one; what the manifest says of it.

    Raises UserError: the engine cannot hold the model.
    """
    if engine not in FILES:
        return {"exact": True}  # it reads the graph
    kind = None if source.quant else GGUF_TYPES[options.bits or 4]
    try:
        report = write_gguf(source.directory, out / FILES[engine], kind=kind, progress=progress)
    except UserError as error:
        raise UserError(f"--engines {engine}: {error}") from None
    return {"exact": report.worst_error_rounded in (None, 0.0), "type": report.kind, "notes": report.notes}


def engine_nll(
    engine: str, bundle: Path, ids: torch.Tensor | None, parity: Parity | None, progress: Progress | None
) -> float | None:
    """What an engine makes of the rows of the parity check, nats per token; None where it was not checked or not here.

    Raises UserError: it computes something else than the graph.
    """
    if ids is None or parity is None:
        return None
    try:
        python = python_of(engine)
    except UserError:
        return None
    if progress:
        progress(f"checking what {engine} computes (rows)", 0, len(ids))
    path = bundle / FILES[engine] if engine in FILES else bundle
    logits = torch.from_numpy(logits_of(engine, path, python, ids.numpy(), torch.get_num_threads()))
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    if progress:
        progress(f"checking what {engine} computes (rows)", len(ids), len(ids))
    if abs(nll - parity.nll_graph) > FARTHEST:
        raise UserError(
            f"{engine} computes something else than the graph (NLL {nll:.4f} instead of {parity.nll_graph:.4f}): "
            f"nothing was exported; leave {engine} out of --engines"
        )
    return nll

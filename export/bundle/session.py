"""ONNX Runtime sessions as decode wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from devices.common.errors import UserError
from export.bundle.external_data import check_external_data


class DecoderError(UserError):
    """The bundle, the context or the threads that were asked for cannot be run here."""


def open_session(graph: Path, threads: int) -> Any:
    """A session on the CPU; threads spin between operators, since a decode step has hundreds of short ones.

    Raises:
        BundleError: weights outside the graph's folder, or none there.
        DecoderError: ONNX Runtime refuses the graph.
    """
    check_external_data(graph)
    return make_session(graph, session_options(threads, {}))


def session_options(threads: int, entries: dict[str, str], runtime: Any = None) -> Any:
    """Options of every session: one stream of operators, whose threads spin where there is more than one.

    Args:
        entries: session config entries that override the defaults.
        runtime: the onnxruntime module, or another one in its place.
    """
    if runtime is None:
        import onnxruntime as runtime  # type: ignore[no-redef]

    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    # Both keep buffers for tensors of the same size to come. Layers that differ have none, and prompts of each length
    # would have a block of their own: a pruned model would need more memory than the dense one, for no speed.
    options.enable_mem_pattern = options.enable_mem_reuse = False
    options.log_severity_level = 3
    for key, value in {"session.intra_op.allow_spinning": "1" if threads > 1 else "0", **entries}.items():
        options.add_session_config_entry(key, value)
    return options


def make_session(graph: Path, options: Any) -> Any:
    """A session on the CPU with these options, over data files that were checked.

    Raises:
        DecoderError: ONNX Runtime refuses the graph.
    """
    import onnxruntime as ort

    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise DecoderError(f"ONNX Runtime {ort.__version__} cannot load {graph}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What ONNX Runtime says is wrong, without the lines on where."""
    return (str(error).splitlines() or [type(error).__name__])[0]

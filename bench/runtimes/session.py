"""ONNX Runtime sessions as decode wants them, and weights that stay packed between processes.

ONNX Runtime copies every quantised matrix into the layout of this CPU's kernels when a session is made. With
``prepacked`` that copy is made once, written beside its graph into the user's cache, and memory-mapped from then on:
those pages are the file's, so the system may drop and reread them, and the next start does not pack again. The file
belongs to one bundle, one version of ONNX Runtime and one kind of CPU, which its folder is named after.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from devices.common.errors import UserError
from export.bundle.external_data import check_external_data
from export.bundle.manifest import BundleManifest

CACHE = "SAAP_CACHE"
PREPACKED = "model.onnx"


class DecoderError(UserError):
    """The bundle, the context or the threads that were asked for cannot be run here."""


def open_session(graph: Path, threads: int) -> Any:
    """A session on the CPU; threads spin between operators, since a decode step has hundreds of short ones.

    Raises:
        BundleError: weights outside the graph's folder, or none there.
        DecoderError: ONNX Runtime refuses the graph.
    """
    check_external_data(graph)
    return _session(graph, session_options(threads, {}))


def prepacked_session(graph: Path, manifest: BundleManifest, threads: int) -> Any:
    """A session over packed weights in the user's cache, which the first call makes.

    Raises:
        BundleError, DecoderError: as :func:`open_session`.
    """
    return open_session(prepack(graph, manifest), threads)


def cache_directory() -> Path:
    """The user's cache: ``SAAP_CACHE``, or ``saap`` in ``XDG_CACHE_HOME``."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saap"


def prepacked_directory(manifest: BundleManifest) -> Path:
    """Where the packed weights of a bundle are for this machine."""
    import onnxruntime as ort

    key = f"{manifest.content_hash}-{ort.__version__}-{_cpu()}"
    return cache_directory() / "prepacked" / hashlib.sha256(key.encode()).hexdigest()[:24]


def prepack(graph: Path, manifest: BundleManifest) -> Path:
    """The graph over packed weights, made where it is not there yet.

    Raises:
        BundleError, DecoderError: as :func:`open_session`.
    """
    directory = prepacked_directory(manifest)
    if (directory / PREPACKED).is_file():
        return directory / PREPACKED
    partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    check_external_data(graph)
    options = session_options(
        1,
        {
            "session.save_external_prepacked_constant_initializers": "1",
            "session.optimized_model_external_initializers_file_name": PREPACKED + ".data",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        },
    )
    options.optimized_model_filepath = str(partial / PREPACKED)
    try:
        _session(graph, options)
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory / PREPACKED


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


def _session(graph: Path, options: Any) -> Any:
    import onnxruntime as ort

    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise DecoderError(f"ONNX Runtime {ort.__version__} cannot load {graph}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What ONNX Runtime says is wrong, without the lines on where."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _cpu() -> str:
    """What the packed layout depends on: architecture and instruction sets."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine() + platform.processor()
    lines = {line for line in text.splitlines() if line.split(":")[0].strip() in ("flags", "Features", "model name")}
    return platform.machine() + "".join(sorted(lines))

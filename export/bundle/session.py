"""ONNX Runtime sessions as decode wants them: which bundle runs where, and weights that stay packed.

ONNX Runtime copies every quantised matrix into the layout of this CPU's kernels when a session is made. With
:func:`prepack` that copy is made once, written beside its graph into the user's cache, and memory-mapped from then on:
those pages are the file's, so the system may drop and reread them, and the next start does not pack again. The file
belongs to one bundle, one version of ONNX Runtime and one kind of CPU, which its folder is named after.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from devices.common.errors import UserError, first_line
from devices.common.files import cache_directory
from export.bundle.external_data import check_external_data
from export.bundle.manifest import BundleManifest, too_old

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

PREPACKED = "model.onnx"
EXECUTION = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
# TensorRT takes standard operators only; attention of the cuda target is ONNX Runtime's own and float16.
TARGETS = {"cpu": ("cpu", "portable"), "cuda": ("cuda",), "tensorrt": ("portable",)}


class DecoderError(UserError):
    """The bundle, the context or the threads that were asked for cannot be run here."""


def open_session(graph: Path, threads: int) -> InferenceSession:
    """A session on the CPU; threads spin between operators, since a decode step has hundreds of short ones.

    Raises:
        BundleError: weights outside the graph's folder, or none there.
        DecoderError: ONNX Runtime refuses the graph.
    """
    check_external_data(graph)
    return make_session(graph, session_options(threads, {}))


def session_options(threads: int, entries: dict[str, str], runtime: ModuleType | None = None) -> SessionOptions:
    """Options of every session: one stream of operators, whose threads spin where there is more than one.

    Args:
        entries: session config entries that override the defaults.
        runtime: the onnxruntime module, or another one in its place.
    """
    if runtime is None:
        runtime = import_module("onnxruntime")
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


def make_session(graph: Path, options: SessionOptions) -> InferenceSession:
    """A session on the CPU with these options, over data files that were checked.

    Raises:
        DecoderError: ONNX Runtime refuses the graph.
    """
    import onnxruntime as ort

    try:
        return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise DecoderError(f"ONNX Runtime {ort.__version__} cannot load {graph}: {first_line(error)}") from error


def check_provider(
    manifest: BundleManifest, provider: str, where: str, *, cuda_graph: bool = False, runtime: ModuleType | None = None
) -> None:
    """Refuse a bundle that a provider cannot run, and a provider that this ONNX Runtime does not have.

    Args:
        provider: cpu, cuda or tensorrt.
        cuda_graph: whether decode steps shall be replayed as a CUDA graph.
        runtime: the onnxruntime module, or another one in its place.
    """
    if provider not in EXECUTION:
        raise DecoderError(f"there is no provider {provider!r}: give {', '.join(EXECUTION)}")
    if manifest.target not in TARGETS[provider]:
        fit = [name for name, targets in TARGETS.items() if manifest.target in targets]
        raise DecoderError(
            f"{where} is a bundle for {manifest.target}, which the provider {provider} does not run (it is one for "
            f"{' or '.join(fit) or 'another runtime'}): saap export MODEL -o BUNDLE --target {TARGETS[provider][0]}"
        )
    if cuda_graph and provider != "cuda":
        why = "its cache moves at every token" if provider == "tensorrt" else "there is no GPU in it"
        raise DecoderError(f"the provider {provider} cannot replay a CUDA graph ({why}): leave it out, or use cuda")
    if runtime is None:
        runtime = import_module("onnxruntime")
    if refusal := too_old(manifest, runtime.__version__):
        raise DecoderError(f"{where} {refusal}")
    if provider != "cpu":
        _check_installed(provider, runtime)


def _check_installed(provider: str, runtime: ModuleType) -> None:
    available = runtime.get_available_providers()
    if EXECUTION[provider] in available:
        return
    raise DecoderError(
        f"the provider {provider} needs {EXECUTION[provider]}, and this ONNX Runtime {runtime.__version__} has only "
        f"{', '.join(available)}: pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'; a Jetson "
        "needs NVIDIA's own build, since the aarch64 wheel has no kernels for Orin or Thor"
    )


def prepacked_directory(manifest: BundleManifest) -> Path:
    """Where the packed weights of a bundle are for this machine."""
    import onnxruntime as ort

    key = f"{manifest.content_hash}-{ort.__version__}-{_cpu()}"
    return cache_directory() / "prepacked" / hashlib.sha256(key.encode()).hexdigest()[:24]


def prepack(graph: Path, manifest: BundleManifest) -> Path:
    """The graph over packed weights, made where it is not there yet."""
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
        make_session(graph, options)
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory / PREPACKED


def _cpu() -> str:
    """What the packed layout depends on: architecture and instruction sets."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine() + platform.processor()
    lines = {line for line in text.splitlines() if line.split(":")[0].strip() in ("flags", "Features", "model name")}
    return platform.machine() + "".join(sorted(lines))

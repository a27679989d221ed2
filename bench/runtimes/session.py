"""ONNX Runtime's weights that stay packed between processes.

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

from export.bundle.external_data import check_external_data
from export.bundle.manifest import BundleManifest
from export.bundle.session import DecoderError, first_line, make_session, open_session, session_options

__all__ = ["DecoderError", "cache_directory", "first_line", "open_session", "prepack", "prepacked_directory",
           "prepacked_session", "session_options"]  # fmt: skip

CACHE = "SAAP_CACHE"
PREPACKED = "model.onnx"


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

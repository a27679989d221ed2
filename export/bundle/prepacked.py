"""Packed weights of a bundle in the user's cache: made once for a machine, sealed, and mapped from there.

ONNX Runtime copies every quantised matrix into the layout of this CPU's kernels when a session is made. Here that copy
is made once, written beside its graph into the cache, and memory-mapped from then on: those pages are the file's, so
the system may drop and reread them, and the next start does not pack again. The file belongs to one bundle, one version
of ONNX Runtime and one kind of CPU, which its folder is named after.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from pathlib import Path

from export.bundle.graph_check import check_graph
from export.bundle.manifest import BundleManifest
from export.bundle.session import make_session, session_options
from saap.base.files import cache_directory, sha256_file, write_text

GRAPH, SEAL, CHECKED = "model.onnx", "seal.json", "checked.json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def prepacked_directory(manifest: BundleManifest) -> Path:
    """Where the packed weights of a bundle are for this machine."""
    import onnxruntime as ort

    key = f"{manifest.content_hash}-{ort.__version__}-{_cpu()}"
    return cache_directory() / "prepacked" / hashlib.sha256(key.encode()).hexdigest()[:24]


def prepack(graph: Path, manifest: BundleManifest) -> Path:
    """The graph over packed weights, made where it is not there yet or damaged.

    Raises:
        BundleError, DecoderError: as of a session.
    """
    directory = prepacked_directory(manifest)
    if _is_whole(directory):
        return directory / GRAPH
    partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    check_graph(graph)
    options = session_options(
        1,
        {
            "session.save_external_prepacked_constant_initializers": "1",
            "session.optimized_model_external_initializers_file_name": GRAPH + ".data",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        },
    )
    options.optimized_model_filepath = str(partial / GRAPH)
    try:
        make_session(graph, options)
        hashes = {path.name: sha256_file(path) for path in partial.iterdir()}
        write_text(partial / SEAL, json.dumps(hashes))
        _move(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory / GRAPH


def _move(partial: Path, directory: Path) -> None:
    """Put a finished folder into its place, unless another process did meanwhile; a damaged one goes."""
    if directory.exists() and not _is_whole(directory):
        damaged = directory.with_name(f"{directory.name}.damaged-{os.getpid()}")
        directory.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        partial.rename(directory)
    except OSError:  # a folder that holds something is never replaced
        if not _is_whole(directory):
            raise


def _is_whole(directory: Path) -> bool:
    """Whether the files are those that were sealed; they are read once in each boot, and where they were replaced."""
    try:
        hashes = json.loads((directory / SEAL).read_text(encoding="utf-8"))
        seen = {"boot": _BOOT.read_text(encoding="ascii") if _BOOT.is_file() else ""}
        for name in (SEAL, *sorted(hashes)):
            status = (directory / name).stat()
            seen[name] = f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        checked = directory / CHECKED
        if checked.is_file() and json.loads(checked.read_text(encoding="utf-8")) == seen:
            return True
        if GRAPH not in hashes or any(sha256_file(directory / name) != sealed for name, sealed in hashes.items()):
            return False
        write_text(checked, json.dumps(seen))
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    return True


def _cpu() -> str:
    """What the packed layout depends on: architecture and instruction sets."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine() + platform.processor()
    lines = {line for line in text.splitlines() if line.split(":")[0].strip() in ("flags", "Features", "model name")}
    return platform.machine() + "".join(sorted(lines))

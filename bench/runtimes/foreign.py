"""Specs of other people's runtimes: ``llama.cpp:FILE.gguf``, ``genai:DIR``, ``optimum:DIR``.

What a spec needs is checked here from its own small files; the packages are looked for, never imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.measure.result import ModelFacts
from bench.runtimes.peer import Peer, PeerError, python_with, unknown_facts
from devices.common.files import parse_json
from devices.common.gguf_header import read_header
from export.bundle.manifest import DECODE_GRAPH, MANIFEST, WEIGHTS, BundleManifest, verify_files

LLAMA_CPP, GENAI, OPTIMUM = "llama.cpp:", "genai:", "optimum:"
GENAI_CONFIG, LONGEST_NAME = "genai_config.json", 255


def llama_cpp_peer(spec: str, length: int) -> Peer:
    """A GGUF file in llama.cpp.

    Raises:
        PeerError, GgufHeaderError: no such file, too short a context, llama-cpp-python not installed.
    """
    path = _path(spec, LLAMA_CPP)
    header = read_header(path)
    vocab, context = header.vocab_size, header.context_length
    if not vocab or not context:
        raise PeerError(f"{spec}: the header names no vocabulary or no context length; get a complete GGUF model")
    _check_context(spec, length, context)
    python = python_with(["llama_cpp"], spec, "llama-cpp-python")
    return _peer(spec, f"{path.stem} (llama.cpp)", "llama.cpp", path, "bench.runtimes.llama_cpp", vocab, python)


def genai_peer(spec: str, length: int) -> Peer:
    """A bundle, or a directory of genai's own model builder, in onnxruntime-genai.

    Raises:
        PeerError, BundleError: no ``genai_config.json``, too short a context, onnxruntime-genai not installed.
    """
    path = _path(spec, GENAI)
    model = _read(spec, path / GENAI_CONFIG, "a bundle, or a folder of onnxruntime-genai's model builder").get("model")
    vocab, context, graph = _sizes(spec, path / GENAI_CONFIG, model)
    if not (path / graph).is_file():
        raise PeerError(f"{spec}: {GENAI_CONFIG} names {graph}, which is not there; make the folder again")
    _check_context(spec, length + 1, context)  # genai counts the token that is drawn last, too
    python = python_with(["onnxruntime_genai"], spec, "onnxruntime-genai")
    return _peer(spec, f"{path.name} (genai)", "genai", path, "bench.runtimes.genai", vocab, python)


def optimum_peer(spec: str, length: int) -> Peer:
    """A portable bundle of uniform sizes, or optimum's own export, in optimum-onnx.

    Raises:
        PeerError, BundleError: no ``model.onnx`` or ``config.json``, too short a context, optimum-onnx not installed.
    """
    path = _path(spec, OPTIMUM)
    config = _read(spec, path / "config.json", "a directory of `saap export --target portable` or of optimum")
    if not (path / DECODE_GRAPH).is_file():
        raise PeerError(f"{spec}: there is no {DECODE_GRAPH} in {path}; make one with `saap export --target portable`")
    vocab, context = config.get("vocab_size"), config.get("max_position_embeddings", length)
    if not isinstance(vocab, int) or not isinstance(context, int):
        raise PeerError(f"{spec}: {path / 'config.json'} names no vocab_size; export the model again")
    _check_context(spec, length, context)
    python = python_with(["optimum.onnxruntime", "torch"], spec, "'saap[optimum]'")
    return _peer(spec, f"{path.name} (optimum)", "optimum", path, "bench.runtimes.optimum", vocab, python)


def bundle_facts(manifest: BundleManifest) -> ModelFacts:
    """Sizes as the bundle's manifest has them."""
    return ModelFacts(
        parameters=manifest.parameters,
        model_bytes=sum(manifest.files[name].bytes for name in (DECODE_GRAPH, WEIGHTS) if name in manifest.files),
        weight_bytes_per_token=manifest.weight_bytes_per_token,
        kv_bytes_per_token=manifest.kv_bytes_per_token,
        bits=manifest.bits,
        vocab_size=manifest.vocab_size,
    )


def _peer(spec: str, name: str, kind: str, path: Path, worker: str, vocab: int, python: str) -> Peer:
    """With the facts of the manifest where the directory is a bundle, else those that the worker will tell."""
    manifest = verify_files(path) if (path / MANIFEST).is_file() else None
    return Peer(
        name=name,
        spec=spec,
        kind=kind,
        path=path,
        worker=worker,
        vocab_size=vocab,
        bundle_hash=manifest.content_hash if manifest else None,
        model=bundle_facts(manifest) if manifest else ModelFacts(vocab_size=vocab, unknown=unknown_facts()),
        unknown={} if manifest else {"bundle_hash": "it is not a bundle"},
        python=python,
    )


def _path(spec: str, prefix: str) -> Path:
    return Path(spec.removeprefix(prefix)).resolve()


def _check_context(spec: str, length: int, context: int) -> None:
    if length > context:
        raise PeerError(f"{length} tokens of context do not fit {spec}: it holds 1 to {context}; ask for less")


def _read(spec: str, path: Path, wanted: str) -> dict[str, Any]:
    if not path.is_file():
        raise PeerError(f"{spec}: no {path.name} in {path.parent}; give {wanted}")
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        document = None
    if not isinstance(document, dict):
        raise PeerError(f"{spec}: {path} is damaged; give {wanted}")
    return document


def _sizes(spec: str, path: Path, model: Any) -> tuple[int, int, str]:
    """Vocabulary, context and the graph's file name of a ``genai_config.json``."""
    try:
        vocab, context, graph = model["vocab_size"], model["context_length"], model["decoder"]["filename"]
    except (KeyError, TypeError):
        vocab = context = graph = None
    named = isinstance(graph, str) and len(graph) <= LONGEST_NAME and Path(graph).name == graph
    if type(vocab) is not int or type(context) is not int or not named:
        raise PeerError(f"{spec}: {path} names no vocab_size, context_length or decoder; make the folder again")
    return vocab, context, graph

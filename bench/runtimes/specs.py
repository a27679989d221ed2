"""What can be measured: a bundle, or a model in another runtime, each in a process of its own.

A plain path is a bundle, ``prepacked:BUNDLE`` one whose packed weights are kept on this device, ``torch:DIR`` a model
directory in transformers; ``llama.cpp:FILE.gguf``, ``genai:DIR`` and ``optimum:DIR`` are in ``bench.runtimes.foreign``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from bench.measure.result import ModelFacts
from bench.runtimes.foreign import GENAI, LLAMA_CPP, OPTIMUM, bundle_facts, genai_peer, llama_cpp_peer, optimum_peer
from bench.runtimes.onnxruntime import check_context
from bench.runtimes.peer import Peer, PeerError, unknown_facts
from bench.runtimes.providers import check_provider
from bench.runtimes.session import prepack
from export.bundle.manifest import DECODE_GRAPH, read_manifest, verify_files

__all__ = ["FORMS", "Peer", "PeerError", "read_peers"]

TORCH = "torch:"
PREPACKED = "prepacked:"
WORKER = "bench.measure.worker"
FORMS = "a bundle's path, prepacked:BUNDLE, torch:DIR, llama.cpp:FILE.gguf, genai:DIR or optimum:DIR"


def read_peers(
    specs: Sequence[str],
    length: int,
    names: Sequence[str] | None = None,
    provider: str = "cpu",
    cuda_graph: bool = False,
) -> list[Peer]:
    """Check every spec before anything is measured.

    Args:
        specs: bundles as plain paths, the others by their prefix.
        length: positions that each must hold.
        names: one per spec; by default the name of the file or directory, with the runtime's where it is another.
        provider: of ONNX Runtime, which only plain bundles take.
        cuda_graph: replay decode steps as a CUDA graph.

    Raises:
        PeerError, BundleError, DecoderError, GgufHeaderError: naming the spec and what to do.
    """
    if not specs:
        raise PeerError(f"nothing to measure: give {FORMS}")
    peers = [_reader(spec)(spec, length) for spec in specs]
    for peer in peers:
        if peer.worker == WORKER:
            check_provider(read_manifest(peer.path), provider, peer.spec, cuda_graph=cuda_graph)
        elif provider != "cpu" or cuda_graph:
            raise PeerError(
                f"{peer.spec} runs on the CPU only: leave --provider and --cuda-graph out, or give a bundle"
            )
    chosen = list(names) if names is not None else _distinct([peer.name for peer in peers])
    if len(chosen) != len(peers) or len(set(chosen)) != len(chosen):
        raise PeerError(f"{len(peers)} specs need as many different names, not {', '.join(chosen) or 'none'}")
    return [Peer(**{**vars(peer), "name": name}) for peer, name in zip(peers, chosen, strict=True)]


def _reader(spec: str) -> Callable[[str, int], Peer]:
    readers = {
        PREPACKED: _prepacked,
        TORCH: _torch,
        LLAMA_CPP: llama_cpp_peer,
        GENAI: genai_peer,
        OPTIMUM: optimum_peer,
    }
    return next((read for prefix, read in readers.items() if spec.startswith(prefix)), _bundle)


def _bundle(spec: str, length: int) -> Peer:
    prefix = spec.split(":", 1)[0] if ":" in spec else ""
    if prefix and not Path(spec).exists() and os.sep not in prefix:
        raise PeerError(f"{spec}: there is no runtime {prefix!r}; give {FORMS}")
    path = Path(spec).resolve()
    manifest = verify_files(path)
    check_context(manifest, length, spec)
    return Peer(
        name=path.name,
        spec=spec,
        kind="onnx",
        path=path,
        worker=WORKER,
        vocab_size=manifest.vocab_size,
        bundle_hash=manifest.content_hash,
        model=bundle_facts(manifest),
        unknown={},
    )


def _prepacked(spec: str, length: int) -> Peer:
    peer = _bundle(spec.removeprefix(PREPACKED), length)
    # Made before anything is measured: the first start packs, all later ones map.
    prepack(peer.path / DECODE_GRAPH, read_manifest(peer.path))
    return replace(peer, name=f"{peer.name} (prepacked)", spec=spec, worker="bench.runtimes.prepacked")


def _torch(spec: str, length: int) -> Peer:
    path = Path(spec.removeprefix(TORCH)).resolve()
    config_path = path / "config.json"
    if not config_path.is_file():
        raise PeerError(f"{spec}: no config.json in {path}; give torch: a Hugging Face model directory")
    if not (find_spec("torch") and find_spec("transformers")):
        raise PeerError(f"{spec} needs PyTorch and transformers, which are not installed: pip install 'saap[prune]'")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        vocab, context = int(config["vocab_size"]), int(config.get("max_position_embeddings", length))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PeerError(f"{spec}: {config_path} is damaged or names no vocab_size; get the model again") from None
    if length > context:
        raise PeerError(f"{length} tokens of context do not fit {spec}: it holds 1 to {context}; ask for less")
    return Peer(
        name=f"{path.name} (torch)",
        spec=spec,
        kind="torch",
        path=path,
        worker="bench.runtimes.torch",
        vocab_size=vocab,
        bundle_hash=None,
        model=ModelFacts(vocab_size=vocab, unknown=unknown_facts()),
        unknown={"bundle_hash": "a model directory is not a bundle"},
    )


def _distinct(names: list[str]) -> list[str]:
    """Names with a number added from the second same one on."""
    seen: set[str] = set()
    out = []
    for name in names:
        candidate, n = name, 2
        while candidate in seen:
            candidate, n = f"{name} #{n}", n + 1
        seen.add(candidate)
        out.append(candidate)
    return out

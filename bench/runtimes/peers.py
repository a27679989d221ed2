"""Subjects of a measurement, each in a process of its own: a bundle in one of its engines, or another runtime's model.

A plain path is a bundle, ``BUNDLE@ENGINE`` one in another engine. The peers are ``torch:DIR``, a model directory in
transformers, ``llama.cpp:FILE.gguf``, ``genai:DIR``, ``optimum:DIR`` and ``openvino:DIR``, a directory of
optimum-intel. What a spec needs is checked here from its own small files; the packages are looked for, never imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import msgspec

from export.bundle import Bundle
from export.bundle.manifest import (
    DECODE_GRAPH,
    MANIFEST,
    WEIGHTS,
    BundleError,
    BundleManifest,
    read_manifest,
)
from export.engine.facts import SIZES, ModelFacts
from export.engine.genai import model_of
from export.engine.openvino import IR
from export.engine.protocol import EngineOptions, check_context
from export.engine.session import check_provider
from export.engine.spec import resolve
from export.engine.table import ONNXRUNTIME, QUIET, Row, row_of
from export.engine.worker import Job
from saap.base.caches import GROWING
from saap.base.cgroup import available
from saap.base.cores import choose_cores
from saap.base.documents import LARGEST
from saap.base.errors import UserError
from saap.base.files import parse_json, read_whole
from saap.base.gguf_header import read_header
from saap.base.memory_limit import most_bytes
from saap.base.progress import Progress

TORCH, LLAMA_CPP, GENAI, OPTIMUM, OPENVINO = "torch:", "llama.cpp:", "genai:", "optimum:", "openvino:"
FOREIGN = ("genai", "optimum", "openvino")  # graphs that other tools wrote
OTHER_RUNTIMES = (TORCH, LLAMA_CPP, GENAI, OPTIMUM, OPENVINO)
FORMS = "a bundle's path, BUNDLE@ENGINE, torch:DIR, llama.cpp:FILE.gguf, genai:DIR, optimum:DIR or openvino:DIR"
CONFIG = "config.json"
RUNTIME_BYTES = {"torch": 350 << 20, "optimum": 400 << 20}  # interpreter and libraries, resident; ours is smaller
ONNXRUNTIME_BYTES = 64 << 20


class _Config(msgspec.Struct):
    """The fields of a ``config.json`` that are read."""

    vocab_size: int
    max_position_embeddings: int | None = None


OPTIMUM_ROW = Row(
    "optimum", "bench.runtimes.optimum", ("optimum.onnxruntime", "torch"), "'saap[optimum]'", environment=QUIET,
    of_bundles=False,
)  # fmt: skip


class PeerError(UserError):
    """A spec that cannot be measured here."""


@dataclass(frozen=True)
class Peer:
    """One thing to measure, checked."""

    name: str
    spec: str
    kind: str  # onnx | torch | llama.cpp | genai | optimum | openvino
    path: Path
    row: Row  # of what runs it
    vocab_size: int
    bundle_hash: str | None
    model: ModelFacts
    unknown: dict[str, str]
    python: str = sys.executable  # interpreter of the worker
    choice: str | None = None  # one of the row's; None: its default
    foreign_graph: bool = False  # of a bundle: a graph of other operators runs, too
    huge_pages: bool = True  # as in generation; a peer gets none that its own users do not have

    def environment(self, threads: int) -> dict[str, str]:
        """Variables of the worker's process."""
        return self.row.process_environment(threads)

    def job(self, threads: int, positions: int, provider: str = "cpu") -> Job:
        """Return the job of a worker that opens this peer."""
        options = EngineOptions(
            threads, positions, provider=provider, choice=self.choice, foreign_graph=self.foreign_graph,
            huge_pages=self.huge_pages,
        )  # fmt: skip
        most = None
        if self.foreign_graph or self.kind in FOREIGN:
            parts = memory_needs(self.kind, self.model, positions, self.path)
            most = parts["runtime"] + most_bytes(parts["weights"], positions, positions, self.vocab_size)
        return Job(self.row.module, str(self.path), options, list(self.row.packages), choose_cores(threads), most)


def read_peers(
    specs: Sequence[str],
    length: int,
    names: Sequence[str] | None = None,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> list[Peer]:
    """Check every spec before anything is measured.

    Args:
        length: positions that each must hold.
        names: one per spec; by default the name of the file or directory, with the runtime's where it is another.
        provider: of ONNX Runtime, which only plain bundles take.
        progress: told what ``BUNDLE@fastest`` measures.

    Raises:
        UserError: naming the spec and what to do.
    """
    if not specs:
        raise PeerError(f"nothing to measure: give {FORMS}")
    peers = [_read(spec, length, progress) for spec in specs]
    for peer in peers:
        if peer.kind == "onnx":
            check_provider(read_manifest(peer.path), provider, peer.spec)
        elif provider != "cpu":
            raise PeerError(f"{peer.spec} runs on the CPU only: leave --provider out, or give a bundle")
    chosen = list(names) if names is not None else _distinct([peer.name for peer in peers])
    if len(chosen) != len(peers) or len(set(chosen)) != len(chosen):
        raise PeerError(f"{len(peers)} specs need as many different names, not {', '.join(chosen) or 'none'}")
    return [replace(peer, name=name) for peer, name in zip(peers, chosen, strict=True)]


def _read(spec: str, length: int, progress: Progress | None) -> Peer:
    match spec.partition(":"):
        case "torch", ":", _:
            if (_path(spec) / MANIFEST).is_file():
                raise PeerError(f"{spec}: it is a bundle; leave torch: out, or give the model that it was made from")
            peer = _directory(spec, length, row_of("torch"), "torch: a Hugging Face model directory")
            return replace(peer, unknown={"bundle_hash": "a model directory is not a bundle"})
        case "llama.cpp", ":", _:
            return _llama_cpp(spec, length)
        case "genai", ":", _:
            return genai_peer(spec, length)
        case "optimum", ":", _:  # a portable bundle of uniform sizes, or optimum's own export
            allowed = "a directory of optimum, or make one with `saap export --target portable`"
            return _directory(spec, length, OPTIMUM_ROW, allowed, DECODE_GRAPH)
        case "openvino", ":", _:  # `optimum-cli export openvino` for one
            return _directory(spec, length, row_of("openvino"), "a directory of optimum-intel, or BUNDLE@openvino", IR)
    return _bundle(spec, length, progress)


def refuse_removed(spec: str) -> None:
    """Raise PeerError for a spec of a kind that was removed."""
    if spec.startswith("prepacked:"):
        raise PeerError(f"{spec}: prepacked: was removed: give the bundle without it, which needs as much memory")


def _bundle(spec: str, length: int, progress: Progress | None) -> Peer:
    """Read a bundle, which runs in ONNX Runtime or in the engine that is named with it."""
    refuse_removed(spec)
    named = resolve(spec, progress)
    prefix = spec.split(":", 1)[0] if ":" in spec else ""
    if prefix and not named.bundle.exists() and os.sep not in prefix:
        raise PeerError(f"{spec}: there is no runtime {prefix!r}; give {FORMS}")
    bundle = Bundle.open(named.bundle).check()
    manifest, source = bundle.manifest, named.source(bundle).resolve()
    check_context(manifest, length, spec)
    row = named.row
    kind = "onnx" if named.engine in (None, ONNXRUNTIME) else row.name
    peer = _peer(str(named), kind, source, manifest.vocab_size, row, manifest)
    return replace(peer, name=named.bundle.resolve().name + (f"@{named.engine}" if kind != "onnx" else ""))


def _llama_cpp(spec: str, length: int) -> Peer:
    path = _path(spec)
    header = read_header(path)
    if not header.vocab_size or not header.context_length:
        raise PeerError(f"{spec}: the header names no vocabulary or no context length; get a complete GGUF model")
    _check_context(spec, length, header.context_length)
    return replace(_peer(spec, "llama.cpp", path, header.vocab_size, row_of("llama.cpp")), huge_pages=False)


def genai_peer(spec: str, length: int) -> Peer:
    """Read a bundle, or a directory of genai's own model builder, to run in onnxruntime-genai.

    Raises:
        PeerError, BundleError: no ``genai_config.json``, too short a context, onnxruntime-genai not installed.
    """
    path = _path(spec)
    try:
        model = model_of(path)
    except BundleError as error:
        raise PeerError(f"{spec}: {error}") from None
    _check_context(spec, length + 1, model.context_length)  # genai counts the token that is drawn last, too
    return _peer(spec, "genai", path, model.vocab_size, row_of("genai"), _manifest(path))


def _directory(spec: str, length: int, row: Row, allowed: str, graph: str | None = None) -> Peer:
    """Read a directory with a ``config.json`` and a graph; ``allowed`` says what to give."""
    path = _path(spec)
    for name in filter(None, (graph, CONFIG)):
        if not (path / name).is_file():
            raise PeerError(f"{spec}: there is no {name} in {path}; give {allowed}")
    try:
        config = msgspec.convert(parse_json(read_whole(path / CONFIG, LARGEST)), _Config)
    except (OSError, ValueError):
        raise PeerError(f"{spec}: {CONFIG} is damaged or names no vocab_size; give {allowed}") from None
    _check_context(spec, length, config.max_position_embeddings)
    return _peer(spec, row.name, path, config.vocab_size, row, _manifest(path))


def _peer(spec: str, kind: str, path: Path, vocab: int, row: Row, manifest: BundleManifest | None = None) -> Peer:
    """Make a peer with the facts of the manifest where there is one, else those that the worker will tell."""
    model = ModelFacts(vocab_size=vocab, unknown=dict.fromkeys(SIZES, "the worker gave no answer"))
    if manifest:
        model = bundle_facts(manifest)
    if kind != "onnx":  # other clients give all layers caches of full length
        model = replace(model, sliding=GROWING)
    return Peer(
        name=f"{path.stem if path.is_file() else path.name} ({kind})",
        spec=spec,
        kind=kind,
        path=path,
        row=row,
        vocab_size=vocab,
        bundle_hash=manifest.content_hash if manifest else None,
        model=model,
        unknown={} if manifest else {"bundle_hash": "it is not a bundle"},
        python=row.python(spec),
    )


def _manifest(path: Path) -> BundleManifest | None:
    return Bundle.open(path).check().manifest if (path / MANIFEST).is_file() else None


def _distinct(names: list[str]) -> list[str]:
    """Names with a number added from the second same one on."""
    chosen: list[str] = []
    for name in names:
        numbered = (f"{name} #{n}" for n in count(2))
        chosen.append(next(candidate for candidate in chain([name], numbered) if candidate not in chosen))
    return chosen


def bundle_facts(manifest: BundleManifest) -> ModelFacts:
    return ModelFacts(
        parameters=manifest.parameters,
        model_bytes=sum(manifest.files[name].bytes for name in (DECODE_GRAPH, WEIGHTS) if name in manifest.files),
        weight_bytes_per_token=manifest.weight_bytes_per_token,
        kv_bytes_per_token=manifest.kv_bytes_per_token,
        bits=manifest.bits,
        vocab_size=manifest.vocab_size,
        sliding=manifest.sliding,
        spelling=manifest.spelling,
    )


def memory_needs(kind: str, model: ModelFacts, positions: int, path: Path) -> dict[str, int]:
    """Bytes by what takes them; a part that is not known is left out.

    Weights count once: a runtime that packs them keeps that copy in memory and may drop the file's pages, one that
    maps the file must read all of it for every token.
    """
    parts = {"weights": model.model_bytes or _weight_files(path), "runtime": RUNTIME_BYTES.get(kind, ONNXRUNTIME_BYTES)}
    kv = model.kv_bytes_per_token
    return parts if kv is None else {**parts, "cache": kv * positions - model.sliding.saved(positions)}


def check_memory(peers: Sequence[Peer], positions: int, root: Path = Path("/")) -> None:
    """Refuse what is larger than the memory that is left, so that a board does not swap or kill.

    Raises PeerError: with the sum.
    """
    left = available(root)
    for peer in peers:
        parts = memory_needs(peer.kind, peer.model, positions, peer.path)
        if left is not None and sum(parts.values()) > left:
            sizes = " + ".join(f"{name} {size / 1e6:.0f}" for name, size in parts.items())
            raise PeerError(
                f"{peer.spec} needs about {sum(parts.values()) / 1e6:.0f} MB ({sizes}) and {left / 1e6:.0f} MB are "
                "available: stop other programs, ask for fewer tokens, or export with fewer --bits"
            )


def _weight_files(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    kinds = ("*.safetensors", "*.onnx", "*.onnx.data", "*.onnx_data", "openvino_model.bin")
    return sum(file.stat().st_size for kind in kinds for file in path.glob(kind))


def _path(spec: str) -> Path:
    return Path(spec.partition(":")[2]).resolve()


def _check_context(spec: str, length: int, context: int | None) -> None:
    if context is not None and length > context:
        raise PeerError(f"{length} tokens of context do not fit {spec}: give 1 to {context}")

"""What can be measured: a bundle, or ``torch:DIR``, a model directory run by transformers in a process of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.result import ModelFacts
from bench.runtime import check_context
from export.bundle import DECODE_GRAPH, WEIGHTS, verify_files

TORCH = "torch:"
_WORKER_TELLS = ("parameters", "model_bytes", "weight_bytes_per_token", "kv_bytes_per_token", "bits")


class PeerError(ValueError):
    """A spec that cannot be measured here."""

    exit_code = 2


@dataclass(frozen=True)
class Peer:
    """One thing to measure, checked, and the worker that measures it."""

    name: str
    spec: str
    kind: str  # onnx | torch
    path: Path
    worker: str  # module that runs as __main__
    vocab_size: int
    bundle_hash: str | None
    model: ModelFacts
    unknown: dict[str, str]

    def environment(self, threads: int) -> dict[str, str]:
        """Variables of the worker's process; OpenMP threads that spin while idle slow their neighbours."""
        if self.kind == "torch":
            quiet = {"TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_OFFLINE": "1"}
            return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", **quiet}
        return {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}


def read_peers(specs: Sequence[str], length: int, names: Sequence[str] | None = None) -> list[Peer]:
    """Check every spec before anything is measured.

    Args:
        specs: bundles as plain paths, model directories as ``torch:DIR``.
        length: positions that each must hold.
        names: one per spec; by default the directory's name, ``(torch)`` added for torch.

    Raises:
        PeerError, BundleError, DecoderError: naming the spec and what to do.
    """
    if not specs:
        raise PeerError("nothing to measure: give a bundle, or torch:DIR")
    peers = [_torch(spec, length) if spec.startswith(TORCH) else _bundle(spec, length) for spec in specs]
    chosen = list(names) if names is not None else _distinct([peer.name for peer in peers])
    if len(chosen) != len(peers) or len(set(chosen)) != len(chosen):
        raise PeerError(f"{len(peers)} specs need as many different names, not {', '.join(chosen) or 'none'}")
    return [Peer(**{**vars(peer), "name": name}) for peer, name in zip(peers, chosen, strict=True)]


def _bundle(spec: str, length: int) -> Peer:
    prefix = spec.split(":", 1)[0] if ":" in spec else ""
    if prefix and not Path(spec).exists() and os.sep not in prefix:
        raise PeerError(f"{spec}: there is no runtime {prefix!r}; give a bundle's path, or torch:DIR")
    path = Path(spec).resolve()
    manifest = verify_files(path)
    check_context(manifest, length, spec)
    facts = ModelFacts(
        parameters=manifest.parameters,
        model_bytes=sum(manifest.files[name].bytes for name in (DECODE_GRAPH, WEIGHTS) if name in manifest.files),
        weight_bytes_per_token=manifest.weight_bytes_per_token,
        kv_bytes_per_token=manifest.kv_bytes_per_token,
        bits=manifest.bits,
        vocab_size=manifest.vocab_size,
    )
    return Peer(
        name=path.name,
        spec=spec,
        kind="onnx",
        path=path,
        worker="bench.worker",
        vocab_size=manifest.vocab_size,
        bundle_hash=manifest.content_hash,
        model=facts,
        unknown={},
    )


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
        worker="bench.torch_worker",
        vocab_size=vocab,
        bundle_hash=None,
        model=ModelFacts(vocab_size=vocab, unknown=dict.fromkeys(_WORKER_TELLS, "the worker gave no answer")),
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

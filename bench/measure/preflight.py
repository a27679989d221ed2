"""Will a model fit into memory? Asked before anything is loaded, so that a board does not swap or kill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.measure.memory import available
from bench.measure.plan import Setting
from bench.runtimes.peer import Peer, PeerError

RUNTIME = {"torch": 350 << 20, "optimum": 400 << 20}  # interpreter and libraries, resident; ours is smaller
RUNTIME_ONNX = 64 << 20


def check_memory(peers: Sequence[Peer], settings: Sequence[Setting], root: Path = Path("/")) -> None:
    """Refuse what is larger than the memory that is left.

    Weights count once: a runtime that packs them keeps that copy in memory and may drop the file's pages, one that
    maps the file must read all of it for every token.

    Raises:
        PeerError: with the sum.
    """
    left = available(root)
    positions = max(setting.positions for setting in settings)
    for peer in peers:
        parts = needs(peer, positions)
        if left is not None and sum(parts.values()) > left:
            told = " + ".join(f"{name} {size / 1e6:.0f}" for name, size in parts.items())
            raise PeerError(
                f"{peer.spec} needs about {sum(parts.values()) / 1e6:.0f} MB ({told}) and {left / 1e6:.0f} MB are "
                "available: stop other programs, ask for fewer tokens, or export with fewer --bits"
            )


def needs(peer: Peer, positions: int) -> dict[str, int]:
    """Bytes by what takes them; a part that is not known is left out."""
    weights = peer.model.model_bytes or _size(peer.path)
    kv = peer.model.kv_bytes_per_token
    parts = {"weights": weights, "runtime": RUNTIME.get(peer.kind, RUNTIME_ONNX)}
    return parts if kv is None else {**parts, "cache": kv * positions}


def _size(path: Path) -> int:
    """Bytes of the weights' files."""
    if path.is_file():
        return path.stat().st_size
    kinds = ("*.safetensors", "*.onnx", "*.onnx.data", "*.onnx_data")
    return sum(file.stat().st_size for kind in kinds for file in path.glob(kind))

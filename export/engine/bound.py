"""A bundle in ONNX Runtime with bound inputs and outputs: the common part of the engines on a CPU and on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.bundle.manifest import BundleManifest, CachePart
from export.engine.protocol import (
    Engine,
    EngineError,
    EngineOptions,
    Ids,
    check_context,
    check_ids,
    check_room,
    check_threads,
)

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

    Cache = list[tuple[CachePart, OrtValue]]  # of every layer that remembers something


class BoundEngine(Engine):
    """A bundle, ``length`` positions of whose cache of ``max_length`` are in use."""

    _shared = True  # past and present are one buffer

    def __init__(self, manifest: BundleManifest, source: Path, options: EngineOptions) -> None:
        check_context(manifest, options.max_length, str(source))
        check_threads(options.threads)
        self.manifest, self.max_length, self.length = manifest, options.max_length, 0
        self.can_rewind = manifest.can_forget

    def _bind(self, session: InferenceSession) -> None:
        self._binding = session.io_binding()
        self._takes_positions = any(each.name == "position_ids" for each in session.get_inputs())

    def _with_room_for(self, count: int) -> int:
        """Positions in use once ``count`` more are."""
        return check_room(self.length + count, self.max_length)

    def _bind_cache(self, cache: Cache) -> None:
        self._past = cache
        for part, value in cache:
            self._binding.bind_ortvalue_input(part.past, value)
            if self._shared:
                self._binding.bind_ortvalue_output(part.present, value)


def zeros(part: CachePart, positions: int) -> NDArray[np.generic]:
    return np.zeros(part.sized(1, positions), np.dtype(part.dtype))


def as_prompt(ids: Ids, manifest: BundleManifest) -> Ids:
    """[n] -> [1, n], contiguous. Raises EngineError: none, or one that is not in the vocabulary."""
    if not len(ids):
        raise EngineError("an empty prompt has no next token: give at least one token")
    check_ids(ids, manifest)
    return np.ascontiguousarray(ids, dtype=np.int64).reshape(1, -1)

"""ONNX Runtime: KV buffers shared, everything bound once.

Decode is dominated by reading the weights, so the loop around it must cost nothing: the buffers of ids, logits and KV
are bound once, past and present are the same memory, and per token only the view of the mask grows.

The weights that ONNX Runtime packed are moved to huge pages.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle
from export.bundle.manifest import (
    PREFILL_CHUNK,
    WINDOW_START,
    CachePart,
)
from export.engine.bound import BoundEngine, as_prompt, zeros
from export.engine.cuda import CudaEngine
from export.engine.huge_pages import with_huge_pages
from export.engine.protocol import (
    Engine,
    EngineError,
    EngineOptions,
    Ids,
    Logits,
)
from export.engine.scoring import BundleScorer
from export.engine.session import check_provider, open_session
from export.engine.sliding import SlidingCaches
from saap.base.errors import first_line
from saap.base.memory_limit import MemoryLimit, most_bytes

if TYPE_CHECKING:
    from onnxruntime import OrtValue

    Cache = list[tuple[CachePart, OrtValue]]  # of every layer that remembers something


class OnnxRuntimeEngine(BoundEngine):
    """A bundle on the CPU; the KV cache is allocated zeroed and touched as it fills.

    ``huge_page_bytes``: of memory that was moved to huge pages.
    """

    def __init__(self, source: Path, options: EngineOptions) -> None:
        from onnxruntime import OrtValue

        bundle = replace(Bundle.open(source), foreign=options.foreign_graph)
        manifest = bundle.manifest
        check_provider(manifest, "cpu", str(source))
        super().__init__(manifest, source, options)
        max_length = options.max_length
        # Before the KV buffers exist, whose pages are touched as they fill.
        self._session, self.huge_page_bytes = with_huge_pages(
            lambda: open_session(bundle, options.threads), manifest.weight_bytes_per_token
        )
        self._bind(self._session)
        self._stored = bundle.graph_bytes()
        # Standard operators concatenate the cache; only GroupQueryAttention writes into the past buffer.
        self._shared = self.manifest.target != "portable"
        self._token = np.zeros((1, 1), np.int64)
        self._mask = np.ones((1, max_length), np.int64)
        self._positions = np.arange(max_length, dtype=np.int64).reshape(1, -1)
        self._logits: Logits = np.empty((1, 1, self.manifest.vocab_size), np.float32)
        self._bound: Ids | None = None  # the array of ids that the binding points to
        self._sliding = self._sliding_caches()
        self._kv = [(part, OrtValue.ortvalue_from_numpy(self._buffer(part))) for part in manifest.cache]
        self._start()
        if not self._shared:
            self._free_outputs()
        # Bound after the cache: _carry_cache counts on it.
        self._binding.bind_output("logits", "cpu", 0, np.float32, self._logits.shape, self._logits.ctypes.data)

    def _sliding_caches(self) -> SlidingCaches | None:
        """Make shorter caches of sliding layers, for a graph that has an input for the position where they start."""
        has_start = any(each.name == WINDOW_START for each in self._session.get_overridable_initializers())
        caches = SlidingCaches(max((part.window for part in self.manifest.cache), default=0))
        if not has_start or not self._shared or caches.capacity >= self.max_length:
            return None
        self._binding.bind_input(WINDOW_START, "cpu", 0, np.int64, (1,), caches.start.ctypes.data)
        return caches

    def _buffer(self, part: CachePart) -> NDArray[np.generic]:
        """Allocate an empty cache, which an OrtValue borrows."""
        if not part.window or self._sliding is None:
            return zeros(part, self.max_length if self._shared else 0)
        buffer = zeros(part, self._sliding.capacity)
        self._sliding.buffers.append(buffer)
        return buffer

    def rewind(self, length: int) -> int:
        """Forget all but the first ``length`` positions; how many are kept.

        None are where a state cannot go back, or a sliding layer has let go what it would see. Stale positions are
        never attended to, so only states are cleared.
        """
        if not 0 <= length <= self.length:
            raise EngineError(f"{length} positions cannot be kept: give 0 to {self.length}, which are in use")
        forgotten = not self.can_rewind or (self._sliding and not self._sliding.holds(length))
        if length == 0 or (length < self.length and forgotten):
            self._start()
        elif not self._shared:
            self._cut_cache(length)
        self.length = min(length, self.length)
        return self.length

    def _start(self) -> None:
        """Begin a new sequence."""
        self.length = 0
        if self._sliding:
            self._sliding.skip(0)
        for part, value in self._kv:
            if not part.grows:
                value.update_inplace(np.zeros(part.sized(1, 0), np.dtype(part.dtype)))
        self._bind_cache(self._kv)

    def prefill(self, ids: Ids) -> Logits:
        """Append ``ids`` [n], in pieces as in generation; the logits [vocab] after the last of them."""
        prompt = as_prompt(ids, self.manifest)
        self._with_room_for(len(ids))
        for start in range(0, len(ids), PREFILL_CHUNK):
            last = self._run(prompt[:, start : start + PREFILL_CHUNK])
        return last

    def step(self, token_id: int) -> Logits:
        self._token[0, 0] = token_id
        return self._run(self._token)

    def _run(self, ids: Ids) -> Logits:
        """Append ``ids`` [1, n]; the logits [vocab] after the last of them."""
        count, total = ids.shape[1], self._with_room_for(ids.shape[1])
        if self._sliding:
            self._sliding.make_room(self.length, count)
        binding = self._binding
        if self._bound is not ids:
            binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
            self._bound = ids
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), self._mask.ctypes.data)
        if self._takes_positions:
            start = self._positions[:, self.length :].ctypes.data
            binding.bind_input("position_ids", "cpu", 0, np.int64, (1, count), start)
        if not self._shared:
            self._free_outputs()
        try:
            with MemoryLimit(most_bytes(self._stored, count, total, self.manifest.vocab_size)):
                self._session.run_with_iobinding(binding)
        except Exception as error:  # as in own_session
            raise EngineError(f"the graph cannot be run: {first_line(error)}; export the bundle again") from None
        self.length = total
        if not self._shared:
            self._carry_cache()
        logits: Logits = self._logits[0, 0]
        return logits

    def _carry_cache(self) -> None:
        # The binding lists outputs in the order they were first bound: the cache, then the logits.
        present = self._binding.get_outputs()[: len(self._past)]
        self._bind_cache([(part, value) for (part, _), value in zip(self._past, present, strict=True)])

    def _free_outputs(self) -> None:
        # Outputs of new sizes. Before ONNX Runtime 1.24 this empties the values that get_outputs gave, so it is done
        # when the next run no longer needs them, not when they are carried over.
        for part, _ in self._past:
            self._binding.bind_output(part.present, "cpu")

    def _cut_cache(self, length: int) -> None:
        from onnxruntime import OrtValue

        kept = [(part, value.numpy()[:, :, :length] if part.grows else value.numpy()) for part, value in self._past]
        self._bind_cache([(part, OrtValue.ortvalue_from_numpy(np.ascontiguousarray(each))) for part, each in kept])


def open(source: Path, options: EngineOptions) -> Engine:
    """Open a bundle whose files were checked, on the CPU or on a GPU.

    Raises:
        BundleError: a graph that is not what its manifest says.
        EngineError: context, threads, or a graph that this ONNX Runtime cannot load.
    """
    if options.scoring:
        return BundleScorer(source, options.threads)
    if options.provider != "cpu":
        return CudaEngine(source, options)
    return OnnxRuntimeEngine(source, options)

"""The decoder that generates and that is measured: a bundle in ONNX Runtime, KV buffers shared, everything bound once.

Decode is dominated by reading the weights, so the loop around it must cost nothing: the buffers of ids, logits and KV
are bound once, past and present are the same memory, and per token only the view of the mask grows.

The weights that ONNX Runtime packed are moved to huge pages.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from export.bundle.manifest import (
    DECODE_GRAPH,
    PREFILL_CHUNK,
    WINDOW_START,
    BundleManifest,
    CachePart,
    read_manifest,
    verify_files,
)
from export.engine.huge_pages import with_huge_pages
from export.engine.session import DecoderError, check_provider, open_session
from export.engine.sliding import SlidingCaches
from saap.base.cores import allowed_cores
from saap.base.errors import first_line
from saap.base.wording import counted

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

    Cache = list[tuple[CachePart, OrtValue]]  # of every layer that remembers something

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class Decoder(Protocol):
    """A model with a KV cache, one sequence at a time."""

    @property
    def max_length(self) -> int:
        """Positions that the cache holds: prompt and generated tokens together."""

    def reset(self) -> None:
        """Forget the sequence."""

    def prefill(self, ids: Ids) -> Logits:
        """Append ``ids`` [n]; the logits [vocab] after the last of them, valid until the next call."""

    def step(self, token_id: int) -> Logits:
        """Append one token; the logits [vocab] after it, valid until the next call."""


def check_threads(threads: int) -> None:
    available = len(allowed_cores())
    if not 1 <= threads <= available:
        raise DecoderError(
            f"{counted(threads, 'thread')} cannot be used: this process has {counted(available, 'core')}, "
            f"give 1 to {available}"
        )


def check_context(manifest: BundleManifest, length: int, where: str) -> None:
    """Refuse more positions than the model was made for."""
    if not 1 <= length <= manifest.context_length:
        raise DecoderError(f"{length} tokens of context do not fit {where}: give 1 to {manifest.context_length}")


def with_room(total: int, most: int) -> int:
    """The positions that will be in use. Raises DecoderError: there are not so many."""
    if total > most:
        raise DecoderError(f"the cache holds {most} positions and {total} are needed: ask for less")
    return total


class BundleDecoder:
    """A bundle, ``length`` positions of whose cache of ``max_length`` are in use."""

    device = "cpu"  # where the cache is
    _shared = True  # past and present are one buffer

    def __init__(self, manifest: BundleManifest, where: Path, threads: int, max_length: int) -> None:
        check_context(manifest, max_length, str(where))
        check_threads(threads)
        self.manifest, self.max_length, self.length = manifest, max_length, 0

    def _bind(self, session: InferenceSession) -> None:
        self._binding = session.io_binding()
        self._takes_positions = any(given.name == "position_ids" for given in session.get_inputs())

    def _with_room_for(self, count: int) -> int:
        """Positions in use once ``count`` more are."""
        return with_room(self.length + count, self.max_length)

    def _zero_cache(self, positions: int, put: Callable[[NDArray[np.generic]], OrtValue]) -> Cache:
        return [(part, put(_zeros(part, positions))) for part in self.manifest.cache]

    def _bind_cache(self, cache: Cache) -> None:
        self._past = cache
        for part, value in cache:
            self._binding.bind_ortvalue_input(part.past, value)
            if self._shared:
                self._binding.bind_ortvalue_output(part.present, value)

    def _carry_cache(self) -> None:
        # The binding lists outputs in the order they were first bound: the cache, then the logits.
        present = self._binding.get_outputs()[: len(self._past)]
        self._bind_cache([(part, value) for (part, _), value in zip(self._past, present, strict=True)])

    def _free_outputs(self) -> None:
        # Outputs of new sizes. Before ONNX Runtime 1.24 this empties the values that get_outputs gave, so it is done
        # when the next run no longer needs them, not when they are carried over.
        for part, _ in self._past:
            self._binding.bind_output(part.present, self.device)


def _zeros(part: CachePart, positions: int) -> NDArray[np.generic]:
    return np.zeros(part.sized(1, positions), np.dtype(part.dtype))


def check_ids(ids: Ids, manifest: BundleManifest) -> None:
    """Refuse ids that the embedding has no row for: not every operator does.

    Raises DecoderError: says which, and what is allowed.
    """
    if ids.size and not 0 <= ids.min() <= ids.max() < manifest.vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise DecoderError(
            f"token {wrong} is not in the vocabulary of {manifest.vocab_size}: the tokenizer belongs to another model"
        )


def as_prompt(ids: Ids, manifest: BundleManifest) -> Ids:
    """[n] -> [1, n], contiguous. Raises DecoderError: none, or one that is not in the vocabulary."""
    if not len(ids):
        raise DecoderError("an empty prompt has no next token: give at least one token")
    check_ids(ids, manifest)
    return np.ascontiguousarray(ids, dtype=np.int64).reshape(1, -1)


class OrtDecoder(BundleDecoder):
    """A bundle in ONNX Runtime on the CPU.

    Args:
        threads: intra-op threads; the caller pins the process.
        max_length: positions of the KV cache, allocated zeroed, touched as it fills.
        verify: check the files' hashes first, which reads them all.
        manifest: the bundle's, where it was read before.

    ``huge_page_bytes``: of memory that was moved to huge pages.

    Raises:
        BundleError: the bundle does not verify.
        DecoderError: context, threads, or a graph that this ONNX Runtime cannot load.
    """

    def __init__(
        self,
        bundle_dir: str | Path,
        threads: int,
        max_length: int,
        *,
        verify: bool = True,
        manifest: BundleManifest | None = None,
    ) -> None:
        from onnxruntime import OrtValue

        directory = Path(bundle_dir)
        manifest = manifest or read_manifest(directory)
        if verify:
            verify_files(directory, manifest)
        check_provider(manifest, "cpu", str(directory))
        super().__init__(manifest, directory, threads, max_length)
        graph = directory / DECODE_GRAPH
        # Before the KV buffers exist, whose pages shall come as they fill.
        self._session, self.huge_page_bytes = with_huge_pages(
            lambda: open_session(graph, threads, manifest),
            manifest.weight_bytes_per_token,
        )
        self._bind(self._session)
        # Standard operators concatenate the cache; only GroupQueryAttention writes into the past buffer.
        self._shared = self.manifest.target != "portable"
        self._token = np.zeros((1, 1), np.int64)
        self._mask = np.ones((1, max_length), np.int64)
        self._positions = np.arange(max_length, dtype=np.int64).reshape(1, -1)
        self._logits: Logits = np.empty((1, 1, self.manifest.vocab_size), np.float32)
        self._bound: Ids | None = None  # the array of ids that the binding points to
        self._sliding = self._sliding_caches()
        self._kv = [(part, OrtValue.ortvalue_from_numpy(self._buffer(part))) for part in manifest.cache]
        self.reset()
        if not self._shared:
            self._free_outputs()
        # Bound after the cache: _carry_cache counts on it.
        self._binding.bind_output("logits", "cpu", 0, np.float32, self._logits.shape, self._logits.ctypes.data)

    def _sliding_caches(self) -> SlidingCaches | None:
        """Of a graph that can be told where they start, where they are shorter than the others."""
        told = any(given.name == WINDOW_START for given in self._session.get_overridable_initializers())
        caches = SlidingCaches(max((part.window for part in self.manifest.cache), default=0))
        if not told or not self._shared or caches.capacity >= self.max_length:
            return None
        self._binding.bind_input(WINDOW_START, "cpu", 0, np.int64, (1,), caches.start.ctypes.data)
        return caches

    def _buffer(self, part: CachePart) -> NDArray[np.generic]:
        """An empty cache, which an OrtValue borrows."""
        if not part.window or self._sliding is None:
            return _zeros(part, self.max_length if self._shared else 0)
        buffer = _zeros(part, self._sliding.capacity)
        self._sliding.buffers.append(buffer)
        return buffer

    def reset(self) -> None:
        """Forget the sequence; stale positions are never attended to, so only states are cleared."""
        self.length = 0
        if self._sliding:
            self._sliding.skip(0)
        for part, value in self._kv:
            if not part.grows:
                value.update_inplace(np.zeros(part.sized(1, 0), np.dtype(part.dtype)))
        self._bind_cache(self._kv)

    def rewind(self, length: int) -> int:
        """Forget all but the first ``length`` positions; how many are kept.

        None are where a state cannot go back, or a sliding layer has let go what it would see.
        """
        if not 0 <= length <= self.length:
            raise DecoderError(f"{length} positions cannot be kept: give 0 to {self.length}, which are in use")
        let_go = not self.manifest.can_forget or (self._sliding and not self._sliding.holds(length))
        if length < self.length and let_go:
            self.reset()
            return 0
        if not self._shared:
            self._cut_cache(length)
        self.length = length
        return length

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
            self._session.run_with_iobinding(binding)
        except Exception as error:  # as in make_session
            raise DecoderError(f"the graph cannot be run: {first_line(error)}; export the bundle again") from None
        self.length = total
        if not self._shared:
            self._carry_cache()
        logits: Logits = self._logits[0, 0]
        return logits

    def _cut_cache(self, length: int) -> None:
        from onnxruntime import OrtValue

        kept = [(part, value.numpy()[:, :, :length] if part.grows else value.numpy()) for part, value in self._past]
        self._bind_cache([(part, OrtValue.ortvalue_from_numpy(np.ascontiguousarray(each))) for part, each in kept])

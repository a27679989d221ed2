"""ONNX Runtime with the logits of every position. No torch and no transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from export.bundle import Bundle
from export.bundle.manifest import FIRST_LOGIT, SCORING_GRAPH, BundleManifest, too_old
from export.engine.protocol import Engine, EngineError, Ids, Logits, check_ids, check_room
from export.engine.session import open_session
from saap.base.errors import first_line
from saap.base.memory_limit import MemoryLimit, most_bytes

Cache = dict[str, np.ndarray]  # name of an input -> keys or values [batch, kv_heads, tokens, head_dim], or a state


class BundleScorer(Engine):
    """The scoring graph of a bundle: logits of every position, from an empty cache.

    ``graph``: file name; of the decode graph only the last position's logits come back.

    Raises:
        BundleError: no bundle there.
        EngineError: the bundle has no such graph, or this ONNX Runtime is too old for it.
    """

    def __init__(self, directory: str | Path, threads: int = 1, graph: str = SCORING_GRAPH) -> None:
        import onnxruntime

        bundle = Bundle.open(directory)
        self.manifest = bundle.manifest
        self.max_length, self.can_rewind = self.manifest.context_length, self.manifest.can_forget
        self._length, self._cache = 0, empty_past(self.manifest, 1)
        if why := too_old(self.manifest, onnxruntime.__version__):
            raise EngineError(f"{directory} {why}")
        if graph not in self.manifest.files:
            raise EngineError(f"{directory} has no {graph}: export it again with this saap")
        self._session = open_session(bundle, threads, graph)
        self._stored = bundle.graph_bytes(graph)
        # Bundles of earlier versions, and those that optimum wrote, have no such input.
        self._may_skip = any(each.name == FIRST_LOGIT for each in self._session.get_overridable_initializers())

    def prefill(self, ids: Ids) -> Logits:
        self._length = check_room(self._length + len(ids), self.max_length)
        logits, self._cache = self.read(ids[None], self._cache, last=True)
        last: Logits = logits[0, -1]
        return last

    def step(self, token_id: int) -> Logits:
        return self.prefill(np.array([token_id], np.int64))

    def rewind(self, length: int) -> int:
        if length and not self.can_rewind:
            length = length if length == self._length else 0
        parts = {part.past: part for part in self.manifest.cache}
        fresh = empty_past(self.manifest, 1) if not length else self._cache
        self._cache = {name: value[:, :, :length] if parts[name].grows else value for name, value in fresh.items()}
        self._length = length
        return length

    def logits(self, rows: Ids) -> Logits:
        """Logits [b, s, vocab] of rows [b, s], each from an empty cache."""
        return self._run(rows, empty_past(self.manifest, len(rows)), ["logits"])[0]

    def read(self, ids: np.ndarray, cache: Cache | None = None, last: bool = False) -> tuple[Logits, Cache]:
        """Logits [1, s, vocab] of one row ``ids`` [1, s] after what ``cache`` holds, and the cache after it.

        The cache that is given stays as it was, so several rows may follow the same one.

        ``last``: only those of the last position are wanted, [1, 1, vocab].
        """
        past = empty_past(self.manifest, 1) if cache is None else cache
        names = [part.present for part in self.manifest.cache]
        logits, *present = self._run(ids, past, ["logits", *names], last)
        return logits[:, -1:] if last else logits, dict(zip(past, present, strict=True))

    def _run(self, ids: np.ndarray, past: Cache, outputs: list[str], last: bool = False) -> list[np.ndarray]:
        check_ids(ids, self.manifest)
        feed = graph_feed(ids, past)
        if all(each.name != "position_ids" for each in self._session.get_inputs()):  # all but the portable target
            del feed["position_ids"]
        if last and self._may_skip:
            feed[FIRST_LOGIT] = np.array([-1])
        most = most_bytes(self._stored, ids.size, feed["attention_mask"].shape[1], self.manifest.vocab_size)
        try:
            with MemoryLimit(most):
                logits, *rest = self._session.run(outputs, feed)
        except Exception as error:  # as in own_session
            raise EngineError(f"the graph cannot be run: {first_line(error)}; export the bundle again") from None
        return [np.asarray(logits, dtype=np.float32), *rest]


def graph_feed(ids: np.ndarray, past: Cache) -> dict[str, np.ndarray]:
    """Build the inputs of a graph of any target for rows ``ids`` [b, s] that follow ``past``, nothing padded."""
    ids = np.ascontiguousarray(ids, dtype=np.int64)
    start = next((part.shape[2] for name, part in past.items() if name.startswith("past_key_values")), 0)
    mask = np.ones((len(ids), start + ids.shape[1]), np.int64)
    positions = np.broadcast_to(np.arange(start, start + ids.shape[1]), ids.shape)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}


def empty_past(manifest: BundleManifest, batch: int) -> Cache:
    """Build an empty cache: name of the input to array, keys and values of no position, states of 0."""
    return {part.past: np.zeros(part.sized(batch, 0), np.dtype(part.dtype)) for part in manifest.cache}

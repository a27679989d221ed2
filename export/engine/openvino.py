"""A bundle's own graph in OpenVINO, or a directory of optimum-intel (``openvino_model.xml``).

OpenVINO reads MatMulNBits and GroupQueryAttention as they stand in the graph, so it needs no file of its own and holds
the same integers. The cache becomes state of the model, as OpenVINO's own exporters make it: what is an input and an
output of the graph would be copied at every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.bundle.graph_check import check_graph
from export.bundle.manifest import DECODE_GRAPH, SCORING_GRAPH, CachePart, read_manifest
from export.engine.onnxruntime import Ids, Logits, check_threads, with_room

if TYPE_CHECKING:
    from openvino import CompiledModel, Model

IR = "openvino_model.xml"
OPTIONS = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "ENABLE_HYPER_THREADING": False}


class OpenVinoDecoder:
    """A model in OpenVINO behind the ``Decoder`` protocol.

    Args:
        path: a bundle of the cpu target with a float cache, or a directory with ``openvino_model.xml``.
        graph: of the bundle; the scoring graph answers for every token.
        max_length: positions that may be used; OpenVINO's cache grows by itself, the rotary tables do not.
    """

    def __init__(self, path: Path, threads: int, max_length: int, graph: str = DECODE_GRAPH) -> None:
        import openvino

        check_threads(threads)
        self.path, self.max_length, self.length = path, max_length, 0
        self.can_forget = True
        options = {**OPTIONS, "INFERENCE_NUM_THREADS": threads}
        core = openvino.Core()
        if (path / IR).is_file():
            model = core.read_model(path / IR)
        else:
            check_graph(path / graph)
            manifest = read_manifest(path)
            self.can_forget = manifest.can_forget
            if manifest.bits == 32:  # where a CPU has bfloat16, OpenVINO computes in it by default
                options["INFERENCE_PRECISION_HINT"] = "f32"
            model = _with_state(core.read_model(path / graph), manifest.cache)
        self.compiled: CompiledModel = core.compile_model(model, "CPU", options)
        self._inputs = {name for given in self.compiled.inputs for name in given.names}
        self._request = self.compiled.create_infer_request()

    def reset(self) -> None:
        self._request.reset_state()
        self.length = 0

    def rewind(self, length: int) -> int:
        """Forget all but the first ``length`` positions; how many are kept."""
        import openvino

        if length < self.length and not self.can_forget:
            self.reset()
            return 0
        for state in self._request.query_state():
            if self.can_forget:
                state.state = openvino.Tensor(np.ascontiguousarray(state.state.data[:, :, :length]))
        self.length = length
        return length

    def prefill(self, ids: Ids) -> Logits:
        """Append ``ids`` [n]; the logits [vocab] after the last of them."""
        logits: Logits = self._append(ids)[-1]
        return logits

    def step(self, token_id: int) -> Logits:
        return self.prefill(np.array([token_id]))

    def logits(self, ids: Ids) -> Logits:
        """After each of ``ids`` [n], the first of an empty cache: [n, vocab]; of the scoring graph."""
        self.reset()
        return self._append(ids)

    def _append(self, ids: Ids) -> Logits:
        before, self.length = self.length, with_room(self.length + len(ids), self.max_length)
        feed = {
            "input_ids": ids[None].astype(np.int64),
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.arange(before, self.length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        found = self._request.infer({name: value for name, value in feed.items() if name in self._inputs})
        logits: Logits = found["logits"][0]
        return logits


def scorer(path: Path, threads: int, max_length: int) -> OpenVinoDecoder:
    """A bundle's scoring graph."""
    return OpenVinoDecoder(path, threads, max_length, SCORING_GRAPH)


def _with_state(model: Model, cache: Sequence[CachePart]) -> Model:
    """The model for one sequence, its cache a state that is empty at first."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    shapes = {given: given.get_partial_shape() for given in model.inputs}
    for shape in shapes.values():
        shape[0] = 1
    model.reshape(shapes)
    apply_make_stateful_transformation(model, {part.past: part.present for part in cache})
    return model

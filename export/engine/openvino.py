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

from export.bundle import Bundle
from export.bundle.manifest import DECODE_GRAPH, SCORING_GRAPH, CachePart
from export.engine.facts import SIZES, ModelFacts
from export.engine.protocol import Engine, EngineOptions, Ids, Logits, check_room, check_threads

if TYPE_CHECKING:
    from openvino import CompiledModel, Model

IR = "openvino_model.xml"
PROPERTIES = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "ENABLE_HYPER_THREADING": False}


class OpenVinoEngine(Engine):
    """A bundle of the cpu target with a float cache, or a directory with ``openvino_model.xml``.

    OpenVINO's cache grows by itself; the rotary tables do not.
    """

    def __init__(self, source: Path, options: EngineOptions) -> None:
        import openvino

        check_threads(options.threads)
        self.path, self.max_length, self.length = source, options.max_length, 0
        properties = {**PROPERTIES, "INFERENCE_NUM_THREADS": options.threads}
        core = openvino.Core()
        if (source / IR).is_file():
            model = core.read_model(source / IR)
        else:
            bundle = Bundle.open(source)
            manifest, graph = bundle.manifest, bundle.graph(SCORING_GRAPH if options.scoring else DECODE_GRAPH)
            self.can_rewind = manifest.can_forget
            if manifest.bits == 32:  # where a CPU has bfloat16, OpenVINO computes in it by default
                properties["INFERENCE_PRECISION_HINT"] = "f32"
            model = _with_state(core.read_model(graph), manifest.cache)
        self.compiled: CompiledModel = core.compile_model(model, "CPU", properties)
        self._inputs = {name for each in self.compiled.inputs for name in each.names}
        self._request = self.compiled.create_infer_request()

    def rewind(self, length: int) -> int:
        """Forget all but the first ``length`` positions; how many are kept."""
        import openvino

        if not length or (length < self.length and not self.can_rewind):
            self._request.reset_state()
            length = 0
        elif length < self.length:
            for state in self._request.query_state():
                state.state = openvino.Tensor(np.ascontiguousarray(state.state.data[:, :, :length]))
        self.length = length
        return length

    def prefill(self, ids: Ids) -> Logits:
        """Append ``ids`` [n]; the logits [vocab] after the last of them."""
        logits: Logits = self._append(ids)[-1]
        return logits

    def step(self, token_id: int) -> Logits:
        return self.prefill(np.array([token_id]))

    def logits(self, rows: Ids) -> Logits:
        return np.stack([self._row(ids) for ids in rows])

    def _row(self, ids: Ids) -> Logits:
        self.rewind(0)
        logits: Logits = self._append(ids).copy()
        return logits

    def versions(self) -> dict[str, str]:
        """Its version, and what it computes and keeps the cache in."""
        import openvino

        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        properties = ", ".join(f"{name} {_type_name(self.compiled.get_property(name))}" for name in names)
        return {"openvino": openvino.__version__, "openvino options": properties}

    def facts(self) -> ModelFacts | None:
        if not (self.path / IR).is_file():
            return None
        files = (self.path / IR, (self.path / IR).with_suffix(".bin"))
        unknown = {name: "an IR is not unpacked" for name in SIZES if name != "model_bytes"}
        return ModelFacts(model_bytes=sum(file.stat().st_size for file in files), unknown=unknown)

    def _append(self, ids: Ids) -> Logits:
        before, self.length = self.length, check_room(self.length + len(ids), self.max_length)
        feed = {
            "input_ids": ids[None].astype(np.int64),
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.arange(before, self.length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        outputs = self._request.infer({name: value for name, value in feed.items() if name in self._inputs})
        logits: Logits = outputs["logits"][0]
        return logits


def _with_state(model: Model, cache: Sequence[CachePart]) -> Model:
    """Return the model for one sequence, its cache a state that is empty at first."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    shapes = {port: port.get_partial_shape() for port in model.inputs}
    for shape in shapes.values():
        shape[0] = 1
    model.reshape(shapes)
    apply_make_stateful_transformation(model, {part.past: part.present for part in cache})
    return model


def _type_name(value: object) -> str:
    """Name a type as OpenVINO's own tools print it."""
    return str(getattr(value, "to_string", lambda: value)())


open = OpenVinoEngine


def OpenVinoDecoder(path: Path, threads: int, max_length: int) -> OpenVinoEngine:  # noqa: N802  its earlier name
    """Open a bundle as earlier releases did."""
    return OpenVinoEngine(path, EngineOptions(threads, max_length))

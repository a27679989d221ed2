"""Runs a graph in consecutive pieces, for a bundle that is larger than memory allows.

ONNX Runtime holds a session's weights twice or more, mapped and packed. Of a piece it holds a few hundred megabytes;
all rows go through it before the next one is loaded. The nodes, their order and their weights are those of the file;
what ONNX Runtime would fuse across a cut, in the portable graph alone, it computes node by node.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from export.engine.session import own_session
from export.needs import PIECE_BYTES

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PIECE = ".piece.onnx"  # beside the data file, which a graph may name only by a path inside its own folder

Feed = Mapping[str, np.ndarray]


def logits_in_pieces(
    graph: Path, feeds: Sequence[Feed], threads: int = 1, piece_bytes: int = PIECE_BYTES
) -> Iterator[np.ndarray]:
    """Logits [batch, scored, vocab] of each feed in turn, in the type that the graph gives.

    Args:
        graph: an ONNX file with an output ``logits``; its folder is written to.
        feeds: inputs by their names, each once through the whole graph; names that it does not have are passed over.
    """
    model = onnx.load(graph, load_external_data=False)
    states: list[dict[str, np.ndarray]] = [{} for _ in feeds]  # what earlier pieces made and later ones read
    cut = _Cut(model.graph, piece_bytes)
    for index, nodes in enumerate(cut.pieces):
        later = cut.read_after(index)
        outputs = [name for node in nodes for name in node.output if name in later]
        session = _session(
            graph, _piece(model, [*cut.needed(nodes), *nodes], outputs, {**feeds[0], **states[0]}), threads
        )
        names = {each.name for each in session.get_inputs()}
        for row, feed in enumerate(feeds):
            known = {**feed, **states[row]}
            results = dict(zip(outputs, session.run(outputs, {name: known[name] for name in names}), strict=True))
            if index == len(cut.pieces) - 1:
                yield results["logits"]
            states[row] = {name: array for name, array in (states[row] | results).items() if name in later}
        del session  # before the next piece is loaded beside it


def _session(graph: Path, piece: onnx.ModelProto, threads: int) -> InferenceSession:
    file = graph.with_name(PIECE)
    try:
        onnx.save(piece, file)
        return own_session(file, threads)
    finally:
        file.unlink(missing_ok=True)


class _Cut:
    """The nodes that lead to the logits, in pieces.

    What does not depend on the tokens, such as lengths that all layers read, is computed again in each piece, so that
    only the stream of states crosses from one to the next.
    """

    def __init__(self, graph: onnx.GraphProto, piece_bytes: int) -> None:
        self.sizes = {each.name: _bytes_of(each) for each in graph.initializer}
        self._common: list[onnx.NodeProto] = []
        depends = {"input_ids"}
        self.pieces: list[list[onnx.NodeProto]] = [[]]
        weights: set[str] = set()
        for node in graph.node:
            reads = _reads(node)
            if not depends & reads:
                self._common.append(node)
                continue
            depends.update(node.output)
            if sum(self.sizes.get(name, 0) for name in weights) >= piece_bytes:
                self.pieces.append([])
                weights = set()
            self.pieces[-1].append(node)
            weights |= reads
        self._reads = [set().union(*(_reads(node) for node in piece)) for piece in self.pieces]

    def read_after(self, index: int) -> set[str]:
        """Return the names that later pieces read; after the last one the logits."""
        return set().union(*self._reads[index + 1 :]) or {"logits"}

    def needed(self, nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """List the nodes that are common to all pieces and that these ones need, in order."""
        names = {name for node in nodes for name in _reads(node)}
        shared = []
        for node in reversed(self._common):
            if names & set(node.output):
                shared.append(node)
                names |= _reads(node)
        return shared[::-1]


def _piece(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], results: list[str], known: Feed) -> onnx.ModelProto:
    """Build a model of these nodes; what they read and none of them makes are its inputs, typed as what is known."""
    reads = {name for node in nodes for name in _reads(node)} - {name for node in nodes for name in node.output}
    weights = [each for each in model.graph.initializer if each.name in reads]
    sources = sorted((reads & known.keys()) - {each.name for each in weights})
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(known[name].dtype), None)
        for name in sources
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in results]  # ONNX Runtime infers their types
    graph = onnx.helper.make_graph(nodes, "piece", inputs, outputs, weights)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those of graphs inside it too."""
    inner = [g for a in node.attribute for g in (a.graphs if a.graphs else [a.g] if a.HasField("g") else [])]
    return {name for name in node.input if name}.union(*(_reads(each) for graph in inner for each in graph.node))


def _bytes_of(tensor: onnx.TensorProto) -> int:
    size: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims)) * size

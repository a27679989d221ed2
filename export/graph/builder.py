"""Builds a graph node by node with onnx_ir: values, initialisers, inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.tape import Tape

from export.bundle.manifest import FIRST_LOGIT

Attribute = int | float | str | Sequence[int] | ir.Graph
Step = Callable[["GraphBuilder", ir.Value, list[ir.Value]], tuple[ir.Value, ir.Value]]


class GraphBuilder:
    """Collects the nodes of one graph over tensors that are already in a data file.

    ``tensors``: what :meth:`weight` may name; only those that are named become initialisers.
    """

    def __init__(self, tensors: Mapping[str, ir.ExternalTensor]) -> None:
        self.tensors = tensors
        self._initializers: dict[str, ir.Value] = {}
        self._tape = Tape()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Attribute) -> ir.Value:
        return self._tape.op(kind, inputs, attributes, domain=domain)

    def multi(
        self, kind: str, inputs: Sequence[ir.Value | None], outputs: int, domain: str = "", **attributes: Attribute
    ) -> list[ir.Value]:
        return list(self._tape.op_multi_out(kind, inputs, attributes, domain=domain, num_outputs=outputs))

    def scan(self, name: str, step: Step, state: ir.Value, sequences: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:
        """Add a loop over the first axis of ``sequences`` that carries a state.

        Args:
            name: of the loop, before those of its values, which differ from all others of the graph.
            step: (builder of the body, state, what each of the sequences is now) -> what is read, and the next state.

        Returns what was read, along the first axis, and the last state.
        """
        inner = GraphBuilder(self.tensors)
        inputs = [inner.input(f"{name}.given{n}", ir.DataType.FLOAT, []) for n in range(1 + len(sequences))]
        for value in inputs:
            value.shape = None
        read, last = step(inner, inputs[0], inputs[1:])
        nodes = list(inner._tape.nodes)
        for number, value in enumerate(value for node in nodes for value in node.outputs):
            value.name = f"{name}.{number}"
        for value in (read, last):
            value.type = ir.TensorType(ir.DataType.FLOAT)
        body = ir.Graph(inputs, [last, read], nodes=nodes, name=name)
        outputs = self.multi("Scan", [state, *sequences], 2, body=body, num_scan_inputs=len(sequences))
        return outputs[1], outputs[0]

    def split(self, x: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
        """Pieces of the last axis, of the given sizes."""
        name = "split." + ".".join(map(str, sizes))
        return self.multi("Split", [x, self.constant(name, list(sizes))], len(sizes), axis=-1)

    def weight(self, name: str) -> ir.Value:
        """Use a tensor of the data file."""
        return self._initializer(name, self.tensors[name])

    def constant(
        self, name: str, value: int | float | list[int] | list[float], dtype: ir.DataType | None = None
    ) -> ir.Value:
        """Add a small tensor to the graph, int64 or float32 where no dtype is given; the name says its value."""
        name = f"constant.{name}"
        if name in self._initializers:
            return self._initializers[name]
        kind = dtype or (ir.DataType.FLOAT if isinstance(value, float) else ir.DataType.INT64)
        return self._initializer(name, ir.tensor(value, dtype=kind, name=name))

    def input(self, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._inputs.append(value)
        return value

    def defaulted(self, name: str, value: list[int]) -> ir.Value:
        """Add a graph input, int64 [n], that is ``value`` where it is not given."""
        tensor = ir.tensor(value, dtype=ir.DataType.INT64, name=name)
        self._inputs.append(self._initializer(name, tensor))
        return self._initializers[name]

    def last_positions(self, x: ir.Value, scoring: bool) -> ir.Value:
        """Take the last position of x [batch, sequence, ...]; for scoring, those from input ``first_logit`` on."""
        if not scoring:
            return self.op("Gather", x, self.constant("last", [-1]), axis=1)
        first, axis = self.defaulted(FIRST_LOGIT, [0]), self.constant("axis1", [1])
        return self.op("Slice", x, first, self.constant("end", [2**63 - 1]), axis)

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: list[int | str]) -> None:
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        self._outputs.append(value)

    def model(self, opsets: Mapping[str, int], ir_version: int) -> ir.Model:
        """Finish the model; ``logits``, which is made last, becomes the first output."""
        outputs = sorted(self._outputs, key=lambda value: value.name != "logits")
        graph = ir.Graph(
            self._inputs,
            outputs,
            nodes=self._tape.nodes,
            initializers=list(self._initializers.values()),
            opset_imports=dict(opsets),
            name="decoder",
        )
        return ir.Model(graph, ir_version=ir_version, producer_name="saap")

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._initializers:
            self._initializers[name] = ir.Value(
                name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self._initializers[name]

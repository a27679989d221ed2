"""The decoder, node by node: what one generated token costs is decided here.

Per layer: RMS norm (fused with the residual addition), one matrix for q, k and v, GroupQueryAttention with the rotary
embedding inside, o_proj, norm, one matrix for gate and up, SiLU x up, down_proj. The residual stream is a pair
(residual, delta) whose sum is formed inside the next SkipSimplifiedLayerNormalization. A layer without attention or
without FFN simply leaves its nodes out. The decode graph takes the last position before the head, so that a prompt does
not pay for the vocabulary at every token; the scoring graph keeps all positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.tape import Tape

from export.weights import Precision, WeightFile
from saap.structures import LayerSizes, ModelShape

MICROSOFT = "com.microsoft"
OPSET = 17  # known to ONNX Runtime 1.23 and older; all the rest comes from com.microsoft
IR_VERSION = 10


class DecoderGraph:
    """Builds one graph over weights that are already in the data file."""

    def __init__(self, shape: ModelShape, precision: Precision, file: WeightFile, epsilon: float) -> None:
        self.shape, self.precision, self.epsilon = shape, precision, epsilon
        self._tensors = file.tensors
        self._initializers: dict[str, ir.Value] = {}
        self._tape = Tape()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def build(self, scoring: bool) -> ir.Model:
        """The decode graph, or the scoring graph with the logits of all positions."""
        ids = self._input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        mask = self._input("attention_mask", ir.DataType.INT64, ["batch", "total"])
        lengths, total = self._lengths(mask)
        residual, delta = self._embed(ids), None
        kv_index = 0
        for index, sizes in enumerate(self.shape.layers):
            name = f"layers.{index}"
            if sizes.query_heads:
                normed, residual = self._norm(residual, delta, f"{name}.attention_norm")
                delta = self._attention(normed, name, sizes, kv_index, lengths, total)
                kv_index += 1
            if sizes.ffn:
                normed, residual = self._norm(residual, delta, f"{name}.ffn_norm")
                delta = self._feed_forward(normed, name, sizes)
        normed, _ = self._norm(residual, delta, "norm")
        if not scoring:
            normed = self._op("Gather", [normed, self._constant("last", [-1])], axis=1)
        logits = self._head(normed)
        self._output(logits, "logits", ir.DataType.FLOAT, ["batch", "sequence" if scoring else 1, self.shape.vocab])
        self._outputs.insert(0, self._outputs.pop())
        return self._model()

    def _model(self) -> ir.Model:
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET, MICROSOFT: 1},
            name="decoder",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="saap")

    # Pieces of the decoder

    def _lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """GroupQueryAttention wants the index of each row's last token and the length of the longest row, int32."""
        summed = self._op("ReduceSum", [mask, self._constant("axis1", [1])], keepdims=0)
        last = self._op("Sub", [summed, self._constant("one", 1)])
        total = self._op("Gather", [self._op("Shape", [mask]), self._constant("axis", 1)], axis=0)
        int32 = ir.DataType.INT32.value
        return self._op("Cast", [last], to=int32), self._op("Cast", [total], to=int32)

    def _embed(self, ids: ir.Value) -> ir.Value:
        if self.precision.head_bits == 32:
            return self._op("Gather", [self._weight("embedding.weight"), ids], axis=0)
        inputs = [self._weight("embedding.qweight"), ids, self._weight("embedding.scales3")]
        groups = self._op(
            "GatherBlockQuantized", inputs, MICROSOFT, gather_axis=0, quantize_axis=2, block_size=self.precision.block,
            bits=self.precision.head_bits,
        )  # fmt: skip
        return self._op("Reshape", [groups, self._constant("hidden_shape", [0, 0, self.shape.hidden])])

    def _norm(self, residual: ir.Value, delta: ir.Value | None, weight: str) -> tuple[ir.Value, ir.Value]:
        """(norm(residual + delta), residual + delta)."""
        gamma = self._weight(weight)
        if delta is None:
            return self._op("SimplifiedLayerNormalization", [residual, gamma], axis=-1, epsilon=self.epsilon), residual
        outputs = self._multi(
            "SkipSimplifiedLayerNormalization", [residual, delta, gamma], 4, MICROSOFT, epsilon=self.epsilon
        )
        outputs[1].name = outputs[2].name = ""  # mean and inverse deviation are not wanted
        return outputs[0], outputs[3]

    def _attention(
        self, x: ir.Value, name: str, sizes: LayerSizes, kv_index: int, lengths: ir.Value, total: ir.Value
    ) -> ir.Value:
        dim = self.shape.head_dim
        qkv = self._linear(x, f"{name}.qkv", self.shape.hidden, (sizes.query_heads + 2 * sizes.kv_heads) * dim)
        past = [
            self._input(f"past_key_values.{kv_index}.{part}", ir.DataType.FLOAT, ["batch", sizes.kv_heads, "past", dim])
            for part in ("key", "value")
        ]
        rotary = [self._weight("cos"), self._weight("sin")]
        outputs = self._multi(
            "GroupQueryAttention", [qkv, None, None, *past, lengths, total, *rotary], 3, MICROSOFT,
            num_heads=sizes.query_heads, kv_num_heads=sizes.kv_heads, do_rotary=1, rotary_interleaved=0,
        )  # fmt: skip
        for part, value in zip(("key", "value"), outputs[1:], strict=True):
            self._output(
                value, f"present.{kv_index}.{part}", ir.DataType.FLOAT, ["batch", sizes.kv_heads, "total_or_past", dim]
            )
        return self._linear(outputs[0], f"{name}.o", sizes.query_heads * dim, self.shape.hidden)

    def _feed_forward(self, x: ir.Value, name: str, sizes: LayerSizes) -> ir.Value:
        both = self._linear(x, f"{name}.gate_up", self.shape.hidden, 2 * sizes.ffn)
        gate, up = self._multi("Split", [both, self._constant(f"split{sizes.ffn}", [sizes.ffn] * 2)], 2, axis=-1)
        # Written as x * sigmoid(x): ONNX Runtime fuses the pair to one QuickGelu.
        silu = self._op("Mul", [gate, self._op("Sigmoid", [gate])])
        return self._linear(self._op("Mul", [silu, up]), f"{name}.down", sizes.ffn, self.shape.hidden)

    def _head(self, x: ir.Value) -> ir.Value:
        name = "embedding" if self.shape.tied else "head"
        if self.precision.head_bits == 32:
            return self._op("FusedMatMul", [x, self._weight(f"{name}.weight")], MICROSOFT, transB=1)
        inputs = [x, self._weight(f"{name}.qweight"), self._weight(f"{name}.scales")]
        return self._quantised(inputs, self.shape.hidden, self.shape.vocab, self.precision.head_bits)

    def _linear(self, x: ir.Value, name: str, k: int, n: int) -> ir.Value:
        bias = self._weight(f"{name}.bias") if f"{name}.bias" in self._tensors else None
        if self.precision.bits == 32:
            y = self._op("MatMul", [x, self._weight(f"{name}.weight")])
            return y if bias is None else self._op("Add", [y, bias])
        inputs = [x, *(self._weight(f"{name}.{part}") for part in ("qweight", "scales", "zero_points"))]
        return self._quantised([*inputs, None, bias] if bias is not None else inputs, k, n, self.precision.bits)

    def _quantised(self, inputs: Sequence[ir.Value | None], k: int, n: int, bits: int) -> ir.Value:
        return self._op(
            "MatMulNBits", inputs, MICROSOFT, K=k, N=n, bits=bits, block_size=self.precision.block,
            accuracy_level=self.precision.accuracy_level,
        )  # fmt: skip

    # Plumbing

    def _op(self, kind: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        return self._tape.op(kind, inputs, attributes, domain=domain)

    def _multi(
        self, kind: str, inputs: Sequence[ir.Value | None], outputs: int, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        return list(self._tape.op_multi_out(kind, inputs, attributes, domain=domain, num_outputs=outputs))

    def _weight(self, name: str) -> ir.Value:
        if name not in self._initializers:
            self._add_initializer(name, self._tensors[name])
        return self._initializers[name]

    def _constant(self, name: str, value: int | list[int]) -> ir.Value:
        name = f"constant.{name}"
        if name not in self._initializers:
            self._add_initializer(name, ir.tensor(value, dtype=ir.DataType.INT64, name=name))
        return self._initializers[name]

    def _add_initializer(self, name: str, tensor: Any) -> None:
        self._initializers[name] = ir.Value(
            name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )

    def _input(self, name: str, dtype: ir.DataType, shape: list[Any]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._inputs.append(value)
        return value

    def _output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: list[Any]) -> None:
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        self._outputs.append(value)

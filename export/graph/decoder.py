"""The decoder, node by node: what one generated token costs is decided here.

Per layer: RMS norm (fused with the residual addition), one matrix for q, k and v, GroupQueryAttention with the rotary
embedding inside, o_proj, norm, one matrix for gate and up, SiLU x up, down_proj. The residual stream is a pair
(residual, delta) whose sum is formed inside the next SkipSimplifiedLayerNormalization. A layer without attention or
without FFN simply leaves its nodes out. The decode graph takes the last position before the head, so that a prompt does
not pay for the vocabulary at every token; the scoring graph keeps all positions.

What a family has beyond LLaMA is in its :class:`saap.models.architectures.Traits`, or simply in the data file: a bias
or a
norm that is there is applied. Norms of single heads cost a Split before the attention, which takes none on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from export.graph.builder import GraphBuilder
from export.graph.rotary import rotary_names
from export.graph.weights import WeightFile
from export.source import Precision
from saap.models.architectures import LayerTraits, Traits
from saap.models.shape import LayerSizes, ModelShape
from saap.system.errors import UserError

MICROSOFT = "com.microsoft"
OPSET = 17  # known to ONNX Runtime 1.23 and older; all the rest comes from com.microsoft
IR_VERSION = 10
KV_SCALES = 12  # place of the cache's scales among GroupQueryAttention's inputs


def check_attention(shape: ModelShape, traits: Traits, rotary_dims: Mapping[str, int]) -> None:
    """Refuse head sizes that GroupQueryAttention refuses when it runs.

    Args:
        rotary_dims: elements of a head that each of the rotary tables turns.

    Raises:
        UserError: names the size and what is allowed.
    """
    step = 16 if any(layer.rotary for layer in traits.layers) else 8
    if shape.head_dim % step:
        raise UserError(
            f"a head size of {shape.head_dim} cannot be exported: ONNX Runtime's attention takes multiples of {step}"
        )
    for dims in rotary_dims.values():
        if dims % 16:
            raise UserError(
                f"rotary embedding of {dims} elements of a head cannot be exported: ONNX Runtime takes multiples of 16"
            )


class DecoderGraph:
    """Builds one graph over weights that are already in the data file."""

    def __init__(
        self, shape: ModelShape, traits: Traits, precision: Precision, file: WeightFile, epsilon: float
    ) -> None:
        self.shape, self.traits, self.precision, self.epsilon = shape, traits, precision, epsilon
        self._tensors = file.tensors
        self._float = ir.DataType.from_numpy(np.dtype(precision.floats))
        self._kv = ir.DataType.from_numpy(np.dtype(precision.kv))
        self._builder = GraphBuilder(file.tensors)

    def build(self, scoring: bool) -> ir.Model:
        """The decode graph, or the scoring graph with the logits of all positions."""
        ids = self._builder.input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        mask = self._builder.input("attention_mask", ir.DataType.INT64, ["batch", "total"])
        lengths, total = self._lengths(mask)
        residual, delta = self._embed(ids), None
        kv_index = 0
        for index, sizes in enumerate(self.shape.layers):
            name = f"layers.{index}"
            if sizes.query_heads:
                normed, residual = self._norm(residual, delta, f"{name}.attention_norm")
                delta = self._attention(normed, index, kv_index, lengths, total)
                delta = self._optional_norm(delta, f"{name}.attention_post_norm")
                kv_index += 1
            if sizes.ffn:
                normed, residual = self._norm(residual, delta, f"{name}.ffn_norm")
                delta = self._optional_norm(self._feed_forward(normed, name, sizes), f"{name}.ffn_post_norm")
        normed, _ = self._norm(residual, delta, "norm")
        logits = self._capped(self._head(self._builder.last_positions(normed, scoring)))
        if self._float != ir.DataType.FLOAT:
            logits = self._op("Cast", [logits], to=ir.DataType.FLOAT.value)
        self._builder.output(
            logits, "logits", ir.DataType.FLOAT, ["batch", "scored" if scoring else 1, self.shape.vocab]
        )
        return self._builder.model({"": OPSET, MICROSOFT: 1}, IR_VERSION)

    # Pieces of the decoder

    def _lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """GroupQueryAttention wants the index of each row's last token and the length of the longest row, int32."""
        summed = self._op("ReduceSum", [mask, self._constant("axis1", [1])], keepdims=0)
        last = self._op("Sub", [summed, self._constant("one", 1)])
        total = self._op("Gather", [self._op("Shape", [mask]), self._constant("axis", 1)], axis=0)
        int32 = ir.DataType.INT32.value
        return self._op("Cast", [last], to=int32), self._op("Cast", [total], to=int32)

    def _embed(self, ids: ir.Value) -> ir.Value:
        rows = self._rows(ids)
        scale = self.traits.embedding_scale
        return rows if scale is None else self._op("Mul", [rows, self._constant("embedding_scale", scale)])

    def _rows(self, ids: ir.Value) -> ir.Value:
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

    def _optional_norm(self, x: ir.Value, weight: str) -> ir.Value:
        return self._norm(x, None, weight)[0] if weight in self._tensors else x

    def _attention(self, x: ir.Value, index: int, kv_index: int, lengths: ir.Value, total: ir.Value) -> ir.Value:
        name, dim = f"layers.{index}", self.shape.head_dim
        sizes, traits = self.shape.layers[index], self.traits.layers[index]
        qkv = self._linear(x, f"{name}.qkv", self.shape.hidden, (sizes.query_heads + 2 * sizes.kv_heads) * dim)
        past = [
            self._builder.input(f"past_key_values.{kv_index}.{part}", self._kv, ["batch", sizes.kv_heads, "past", dim])
            for part in ("key", "value")
        ]
        inputs = [*self._normed_heads(qkv, name, sizes), *past, lengths, total, *self._rotary(traits)]
        if self._kv == ir.DataType.INT8:
            unused = [None] * (KV_SCALES - len(inputs))
            inputs += [*unused, *(self._weight(f"{name}.{part}_scale") for part in ("key", "value"))]
        outputs = self._multi(
            "GroupQueryAttention", inputs, 3, MICROSOFT, num_heads=sizes.query_heads, kv_num_heads=sizes.kv_heads,
            do_rotary=int(traits.rotary is not None), rotary_interleaved=0, **self._attention_options(traits),
        )  # fmt: skip
        for part, value in zip(("key", "value"), outputs[1:], strict=True):
            self._builder.output(
                value, f"present.{kv_index}.{part}", self._kv, ["batch", sizes.kv_heads, "total_or_past", dim]
            )
        return self._linear(outputs[0], f"{name}.o", sizes.query_heads * dim, self.shape.hidden)

    def _normed_heads(self, qkv: ir.Value, name: str, sizes: LayerSizes) -> list[ir.Value | None]:
        """The op's first three inputs: all in one where heads have no norms, else queries, keys and values."""
        if f"{name}.query_norm" not in self._tensors:
            return [qkv, None, None]
        dim, counts = self.shape.head_dim, (sizes.query_heads, sizes.kv_heads, sizes.kv_heads)
        widths = [count * dim for count in counts]
        split = self._constant("split" + "_".join(map(str, widths)), widths)
        parts = self._multi("Split", [qkv, split], 3, axis=-1)
        normed: list[ir.Value | None] = []
        for part, count, norm in zip(parts[:2], counts[:2], ("query_norm", "key_norm"), strict=True):
            heads = self._op("Reshape", [part, self._constant(f"heads{count}", [0, 0, count, dim])])
            heads, _ = self._norm(heads, None, f"{name}.{norm}")
            normed.append(self._op("Reshape", [heads, self._constant(f"flat{count * dim}", [0, 0, count * dim])]))
        return [*normed, parts[2]]

    def _rotary(self, traits: LayerTraits) -> list[ir.Value]:
        """The layer's cos and sin tables, none where the layer has no rotary embedding."""
        return [] if traits.rotary is None else [self._weight(name) for name in rotary_names(traits.rotary)]

    def _attention_options(self, traits: LayerTraits) -> dict[str, Any]:
        """Attributes that only some families and caches set."""
        options: dict[str, Any] = {}
        if self._kv == ir.DataType.INT8:
            options |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        if traits.window:
            options["local_window_size"] = traits.window
        if self.traits.attention_scale is not None:
            options["scale"] = self.traits.attention_scale
        return options

    def _feed_forward(self, x: ir.Value, name: str, sizes: LayerSizes) -> ir.Value:
        both = self._linear(x, f"{name}.gate_up", self.shape.hidden, 2 * sizes.ffn)
        gate, up = self._multi("Split", [both, self._constant(f"split{sizes.ffn}", [sizes.ffn] * 2)], 2, axis=-1)
        product = self._op("Mul", [self._activation(gate), up])
        return self._linear(product, f"{name}.down", sizes.ffn, self.shape.hidden)

    def _activation(self, x: ir.Value) -> ir.Value:
        if self.traits.activation == "gelu_pytorch_tanh":
            return self._op("FastGelu", [x], MICROSOFT)
        # Written as x * sigmoid(x): ONNX Runtime fuses the pair to one QuickGelu.
        return self._op("Mul", [x, self._op("Sigmoid", [x])])

    def _capped(self, logits: ir.Value) -> ir.Value:
        if self.traits.logit_cap is None:
            return logits
        cap = self._constant("logit_cap", float(self.traits.logit_cap))
        return self._op("Mul", [self._op("Tanh", [self._op("Div", [logits, cap])]), cap])

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
        zero_points = f"{name}.zero_points"
        inputs: list[ir.Value | None] = [x, self._weight(f"{name}.qweight"), self._weight(f"{name}.scales")]
        inside = bias is not None and self._float == ir.DataType.FLOAT  # ONNX Runtime's CUDA kernel took none for long
        if zero_points in self._tensors or inside:
            inputs.append(self._weight(zero_points) if zero_points in self._tensors else None)
        bits = self._tensors[f"{name}.qweight"].nbytes * 8 // (n * k)  # each matrix has its own, and the file knows
        y = self._quantised([*inputs, None, bias] if inside else inputs, k, n, bits)
        return y if bias is None or inside else self._op("Add", [y, bias])

    def _quantised(self, inputs: Sequence[ir.Value | None], k: int, n: int, bits: int) -> ir.Value:
        return self._op(
            "MatMulNBits", inputs, MICROSOFT, K=k, N=n, bits=bits, block_size=self.precision.block,
            accuracy_level=self.precision.accuracy_level,
        )  # fmt: skip

    # Plumbing

    def _op(self, kind: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        return self._builder.op(kind, *inputs, domain=domain, **attributes)

    def _multi(
        self, kind: str, inputs: Sequence[ir.Value | None], outputs: int, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        return self._builder.multi(kind, inputs, outputs, domain=domain, **attributes)

    def _weight(self, name: str) -> ir.Value:
        return self._builder.weight(name)

    def _constant(self, name: str, value: float | list[int]) -> ir.Value:
        """A float or, for integers, int64 tensor in the graph."""
        return self._builder.constant(name, value, self._float if isinstance(value, float) else None)

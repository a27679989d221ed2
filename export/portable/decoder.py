"""The decoder in standard operators of ONNX opset 21, node by node, for every runtime that is not ONNX Runtime's own.

Norms, rotary embedding and attention are spelled out; 4- and 8-bit matrices are blockwise DequantizeLinear nodes, which
ONNX Runtime fuses with the MatMul behind them. The KV cache grows by Concat, so past and present are two buffers.
Attention multiplies all query heads of a KV group at once ([batch, kv, group * sequence, head_dim] x [batch, kv,
head_dim, total]), so keys and values are never repeated.

Beside the usual inputs the graph takes ``position_ids`` [batch, sequence] int64. Masked are the keys behind a query,
those before the layer's window, and those whose ``attention_mask`` is 0 (padding). What a family has beyond LLaMA is in
its :class:`saap.models.architectures.Traits`, or simply in the data file: a bias or a norm that is there is applied.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from export.graph.builder import GraphBuilder
from export.graph.decoder import UNIT_EPSILON, DecoderGraph, GraphModel
from export.graph.rotary import Table, rotary_names
from saap.models.shape import LayerSizes

OPSET = 21  # the first one with 4-bit integers and DequantizeLinear in blocks
# Added to the score of a key that must not be seen: exp of it is 0, and float16 holds it too.
HIDDEN_SCORE = -3e4

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


class StandardGraph(DecoderGraph):
    """The decoder in standard operators, over weights in a :class:`export.portable.weights.StandardLayout`."""

    opsets = {"": OPSET}  # noqa: RUF012

    def __init__(self, model: GraphModel, tensors: Mapping[str, ir.ExternalTensor]) -> None:
        super().__init__(model, tensors)
        self._biases: dict[int, ir.Value] = {}  # by window
        self._rotations: dict[str, ir.Value] = {}  # by table
        self._new: ir.Value | None = None  # the mask of the new tokens, [batch, sequence, 1]

    def begin(self, ids: ir.Value, mask: ir.Value) -> None:
        """Compute the lengths of the new tokens and of all, [1] each, and how far each key is from each query."""
        g = self.graph
        self._mask = mask
        self._positions = g.input("position_ids", INT64, ["batch", "sequence"])
        axis, zero, one = g.constant("1", [1]), g.constant("scalar.0", 0), g.constant("scalar.1", 1)
        self._sequence = g.op("Gather", g.op("Shape", ids), axis)
        self._total = g.op("Gather", g.op("Shape", mask), axis)
        keys = g.op("Range", zero, g.op("Squeeze", self._total), one)
        past = g.op("Sub", self._total, self._sequence)
        queries = g.op("Range", g.op("Squeeze", past), g.op("Squeeze", self._total), one)
        self._distance = g.op("Sub", g.op("Unsqueeze", queries, axis), keys)
        real = g.op("Cast", mask, to=ir.DataType.BOOL.value)
        self._real = g.op("Unsqueeze", real, g.constant("1.2.3", [1, 2, 3]))

    def _attention_bias(self, window: int) -> ir.Value:
        """[batch, 1, 1, sequence, total]: 0 where a query may look, else far below."""
        g = self.graph
        if window not in self._biases:
            visible = g.op("GreaterOrEqual", self._distance, g.constant("scalar.0", 0))
            if window:
                near = g.op("Less", self._distance, g.constant(f"scalar.{window}", window))
                visible = g.op("And", visible, near)
            visible = g.op("And", visible, self._real)
            scores = g.constant("0.0", 0.0), g.constant("hidden_score", HIDDEN_SCORE)
            self._biases[window] = g.op("Where", visible, *scores)
        return self._biases[window]

    def _rotation(self, table: str) -> ir.Value:
        """cos or sin of the positions: [batch, sequence, 1, rotary_dim / 2]."""
        g = self.graph
        if table not in self._rotations:
            rows = g.op("Gather", g.weight(table), self._positions, axis=0)
            self._rotations[table] = g.op("Unsqueeze", rows, g.constant("2", [2]))
        return self._rotations[table]

    def embedding(self, ids: ir.Value) -> ir.Value:
        g, bits = self.graph, self.precision.head_bits
        if not self.shape.tied:
            return self.lookup("embedding", ids, self.shape.hidden)
        if bits == 32:
            return self._columns("head.weight", ids)
        scales, groups = self._columns("gathered.scales", ids), self.tensors["head.scales"].shape.numpy()[0]
        if bits == 8:
            codes = self._columns("gathered.codes", ids)
            return self._scaled(g.op("Cast", codes, to=FLOAT.value), scales, groups, self.shape.hidden)
        # Integers of 4 bits cannot be gathered: their bytes are, and the wanted half of each is taken.
        low, _ = self._halves()
        two = g.constant("scalar.2", 2)
        both = self._columns("gathered.codes", g.op("Div", ids, two))
        bits_down = g.op("Mul", g.op("Mod", ids, two), g.constant("scalar.4", 4))
        shift = g.op("Cast", g.op("Unsqueeze", bits_down, g.constant("2", [2])), to=ir.DataType.UINT8.value)
        codes = g.op("BitwiseAnd", g.op("BitShift", both, shift, direction="RIGHT"), low)
        return self._scaled(self._signed(codes), scales, groups, self.shape.hidden)

    def lookup(self, name: str, ids: ir.Value, width: int) -> ir.Value:
        g, bits = self.graph, self.precision.head_bits
        if bits == 32:
            return self._rows(f"{name}.weight", ids)
        scales, groups = self._rows(f"{name}.scales", ids), self.tensors[f"{name}.scales"].shape.numpy()[1]
        if bits == 8:
            return self._scaled(g.op("Cast", self._rows(f"{name}.codes", ids), to=FLOAT.value), scales, groups, width)
        low, four = self._halves()
        both = self._rows(f"{name}.codes", ids)
        halves = g.op("BitwiseAnd", both, low), g.op("BitShift", both, four, direction="RIGHT")
        return self._scaled(self._signed(g.op("Concat", *halves, axis=-1)), scales, groups, width)

    def _halves(self) -> tuple[ir.Value, ir.Value]:
        """Return the mask of a byte's lower half, and the shift of its upper one."""
        g, byte = self.graph, ir.DataType.UINT8
        return g.constant("byte.15", 15, byte), g.constant("byte.4", 4, byte)

    def _signed(self, codes: ir.Value) -> ir.Value:
        """Signed integers of 4 bits, each in a byte, as floats."""
        g = self.graph
        unsigned = g.op("BitwiseXor", codes, g.constant("byte.8", 8, ir.DataType.UINT8))
        return g.op("Sub", g.op("Cast", unsigned, to=FLOAT.value), g.constant("8.0", 8.0))

    def _columns(self, name: str, indices: ir.Value) -> ir.Value:
        """Columns of a matrix [n, vocab] as [batch, sequence, n]."""
        g = self.graph
        return g.op("Transpose", g.op("Gather", g.weight(name), indices, axis=1), perm=[1, 2, 0])

    def _rows(self, name: str, ids: ir.Value) -> ir.Value:
        return self.graph.op("Gather", self.graph.weight(name), ids, axis=0)

    def _scaled(self, values: ir.Value, scales: ir.Value, groups: int, width: int) -> ir.Value:
        """Values [batch, sequence, width] times one scale per group."""
        g = self.graph
        grouped = g.op("Reshape", values, self._shape(0, 0, groups, width // groups))
        product = g.op("Mul", grouped, g.op("Unsqueeze", scales, g.constant("3", [3])))
        return g.op("Reshape", product, self._shape(0, 0, width))

    def norm(self, residual: ir.Value, delta: ir.Value | None, weight: str) -> tuple[ir.Value, ir.Value]:
        """x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich, arXiv 1910.07467), and x, the sum."""
        g = self.graph
        x = residual if delta is None else g.op("Add", residual, delta)
        return g.op("Mul", self._normed(x), g.weight(weight)), x

    def _normed(self, x: ir.Value) -> ir.Value:
        g = self.graph
        squares = g.op("Pow", x, g.constant("2.0", 2.0))
        mean = g.op("ReduceMean", squares, g.constant("-1", [-1]), keepdims=1)
        return g.op("Div", x, g.op("Sqrt", g.op("Add", mean, g.constant("epsilon", float(self.epsilon)))))

    def attention(self, x: ir.Value, index: int, mixer: int) -> ir.Value:
        sizes, traits = self.shape.layers[index], self.traits.layers[index]
        g, name, dim = self.graph, f"layers.{index}", self.shape.head_of(sizes)
        heads, kv, group = sizes.query_heads, sizes.kv_heads, sizes.heads_per_group
        q, gate = self.queries_and_gate(x, name, sizes)
        slides = bool(traits.window)
        if not sizes.reads:
            q, k, v = g.split(q, [heads * dim, kv * dim, kv * dim])
        q = self._placed(q, heads, dim, f"{name}.query_norm", traits.rotary)
        if not sizes.reads:
            k = self._placed(k, kv, dim, f"{name}.key_norm", traits.rotary)
            v = g.op("Reshape", v, self._shape(0, 0, kv, dim))
            v = self._normed(v) if self.value_norm else v
            self._left_kv[slides] = [self._cached(*new, mixer) for new in ((k, "key", kv, dim), (v, "value", kv, dim))]
        keys, values = self._left_kv[slides]
        q = g.op("Mul", q, g.constant("scale", self.traits.attention_scale or dim**-0.5))
        q = g.op("Transpose", g.op("Reshape", q, self._shape(0, 0, kv, group, dim)), perm=[0, 2, 3, 1, 4])
        q = g.op("Reshape", q, self._shape(0, kv, -1, dim))
        scores = g.op("MatMul", q, g.op("Transpose", keys, perm=[0, 1, 3, 2]))
        by_query = g.op("Concat", self._shape(0, kv, group), self._sequence, g.constant("-1", [-1]), axis=0)
        masked = g.op("Add", g.op("Reshape", scores, by_query), self._attention_bias(traits.window))
        weights = g.op("Softmax", masked, axis=-1)
        by_group = g.op("Concat", self._shape(0, kv, -1), self._total, axis=0)
        mixed = g.op("MatMul", g.op("Reshape", weights, by_group), values)
        mixed = g.op("Reshape", mixed, self._shape(0, kv, group, -1, dim))
        mixed = g.op("Transpose", mixed, perm=[0, 3, 1, 2, 4])
        if gate is not None:
            mixed = g.op("Mul", g.op("Reshape", mixed, self._shape(0, 0, heads, dim)), gate)
        return self._linear(g.op("Reshape", mixed, self._shape(0, 0, heads * dim)), f"{name}.o")

    def _placed(self, x: ir.Value, heads: int, dim: int, norm: str, table: Table | None) -> ir.Value:
        """Reshape queries or keys to [batch, sequence, heads, head_dim], normed and rotated where the layer does so."""
        g = self.graph
        spans_heads = self.shape.qk_norm == "all"
        x = self.optional_norm(x, norm) if spans_heads else x
        x = g.op("Reshape", x, self._shape(0, 0, heads, dim))
        x = x if spans_heads else self.optional_norm(x, norm)
        return x if table is None else self._rotate(x, dim, *rotary_names(table))

    def _rotate(self, x: ir.Value, dim: int, cos_table: str, sin_table: str) -> ir.Value:
        """Rotate the pairs (i, i + rotary_dim / 2); what a partial rotary embedding leaves out stays as it is."""
        g, cos, sin = self.graph, self._rotation(cos_table), self._rotation(sin_table)
        width = self.tensors[cos_table].shape[1]
        assert isinstance(width, int), "tensors of the data file have concrete shapes"
        half = width
        rest = dim - 2 * half
        left, right, *rest_of_head = g.split(x, [half, half, *([rest] if rest else [])])
        turned = g.op("Sub", g.op("Mul", left, cos), g.op("Mul", right, sin))
        other = g.op("Add", g.op("Mul", right, cos), g.op("Mul", left, sin))
        return g.op("Concat", turned, other, *rest_of_head, axis=-1)

    def _cached(self, new: ir.Value, part: str, kv_heads: int, dim: int, mixer: int) -> ir.Value:
        """Append the new positions to the past: [batch, kv_heads, total, head_dim]."""
        g = self.graph
        past = g.input(f"past_key_values.{mixer}.{part}", FLOAT, ["batch", kv_heads, "past", dim])
        present = g.op("Concat", past, g.op("Transpose", new, perm=[0, 2, 1, 3]), axis=2)
        g.output(present, f"present.{mixer}.{part}", FLOAT, ["batch", kv_heads, "total", dim])
        return present

    def feed_forward(self, x: ir.Value, name: str, sizes: LayerSizes) -> ir.Value:
        gate, up = self.graph.split(self._linear(x, f"{name}.gate_up"), [sizes.ffn, sizes.ffn])
        return self._linear(self.graph.op("Mul", self.activation(gate), up), f"{name}.down")

    def activation(self, x: ir.Value) -> ir.Value:
        if self.traits.activation == "gelu_pytorch_tanh":
            return self.graph.op("Gelu", x, approximate="tanh")
        return self.sigmoid_times(x)

    def head(self, x: ir.Value) -> ir.Value:
        return self._matrix_product(x, "head", self.precision.head_bits)

    def real(self, x: ir.Value) -> ir.Value:
        """Zero the padding, which stays where it is: it adds nothing to a state, as in transformers."""
        g = self.graph
        if self._new is None:
            start = g.op("Sub", g.constant("0", [0]), self._sequence)
            ends = g.constant("end", [2**63 - 1]), g.constant("1", [1])
            mask = g.op("Cast", g.op("Slice", self._mask, start, *ends), to=FLOAT.value)
            self._new = g.op("Unsqueeze", mask, g.constant("2", [2]))
        return g.op("Mul", x, self._new)

    def unit(self, x: ir.Value, size: int) -> ir.Value:
        g = self.graph
        squares = g.op("ReduceSum", g.op("Mul", x, x), g.constant("-1", [-1]), keepdims=1)
        return g.op("Div", x, g.op("Sqrt", g.op("Add", squares, g.constant("unit_epsilon", UNIT_EPSILON))))

    def recurrence(
        self, mixed: tuple[ir.Value, ir.Value, ir.Value], rates: tuple[ir.Value, ir.Value], past: ir.Value, keys: int
    ) -> tuple[ir.Value, ir.Value]:
        """Token by token: of the state S and its rest R = e^g S comes R + k (b (v - R^T k))^T, read by q."""
        g, heads = self.graph, self.shape.delta
        assert heads is not None, "a layer has a delta net of heads that are described"
        query, key, value = mixed
        written, kept = rates
        scaled = g.op("Mul", query, g.constant(f"delta_scale{heads.key}", heads.key**-0.5))
        sequences = [
            *(self._served(self._heads(part, keys, heads.key), keys) for part in (scaled, key)),
            self._heads(value, keys * heads.values, heads.value), written, g.op("Exp", kept),
        ]  # fmt: skip
        row, column, last = (g.constant(f"{axes}", [int(axes)]) for axes in ("2", "3", "-1"))

        def step(inner: GraphBuilder, state: ir.Value, parts: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
            q, k, v, share, left = parts

            def per_head(x: ir.Value) -> ir.Value:
                return inner.op("Unsqueeze", inner.op("Unsqueeze", x, last), last)

            state = inner.op("Mul", state, per_head(left))
            known = inner.op("MatMul", inner.op("Unsqueeze", k, row), state)
            news = inner.op("Mul", inner.op("Sub", inner.op("Unsqueeze", v, row), known), per_head(share))
            state = inner.op("Add", state, inner.op("MatMul", inner.op("Unsqueeze", k, column), news))
            return inner.op("Squeeze", inner.op("MatMul", inner.op("Unsqueeze", q, row), state), row), state

        by_token = [g.op("Transpose", x, perm=[1, 0, 2, 3][: 4 if n < 3 else 3]) for n, x in enumerate(sequences)]
        read, state = g.scan(f"scan.{past.name}", step, past, by_token)
        return self._flat(g.op("Transpose", read, perm=[1, 0, 2, 3]), keys * heads.width), state

    def _served(self, x: ir.Value, keys: int) -> ir.Value:
        """Key heads [batch, sequence, keys, size], each repeated for the value heads that it serves."""
        g, heads = self.graph, self.shape.delta
        assert heads is not None, "a layer has a delta net of heads that are described"
        if heads.values == 1:
            return x
        each = g.op("Unsqueeze", x, g.constant("3", [3]))
        many = g.op("Expand", each, self._shape(1, 1, keys, heads.values, heads.key))
        return g.op("Reshape", many, self._shape(0, 0, keys * heads.values, heads.key))

    def matrix_product(self, x: ir.Value, name: str, k: int, n: int) -> ir.Value:
        return self._linear(x, name)

    def _linear(self, x: ir.Value, name: str) -> ir.Value:
        g = self.graph
        y = self._matrix_product(x, name, self.precision.bits)
        return g.op("Add", y, g.weight(f"{name}.bias")) if f"{name}.bias" in self.tensors else y

    def _matrix_product(self, x: ir.Value, name: str, bits: int) -> ir.Value:
        g = self.graph
        if bits == 32:
            return g.op("MatMul", x, g.weight(f"{name}.weight"))
        inputs = [g.weight(f"{name}.codes"), g.weight(f"{name}.scales")]
        columns, groups = (self.tensors[f"{name}.{part}"].shape.numpy()[0] for part in ("codes", "scales"))
        return g.op("MatMul", x, g.op("DequantizeLinear", *inputs, axis=0, block_size=columns // groups))

    def _shape(self, *dims: int) -> ir.Value:
        """Add a constant shape for Reshape: 0 keeps a dimension, -1 takes what is left."""
        return self.graph.constant("shape." + ".".join(map(str, dims)), list(dims))

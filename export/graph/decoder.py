"""The decoder, node by node: what one generated token costs is decided here.

:class:`DecoderGraph` is what all graphs have in common, and :class:`MicrosoftGraph` the one for ONNX Runtime. Per
layer: RMS norm (fused with the residual addition), one matrix for q, k and v, GroupQueryAttention with the rotary
embedding inside, o_proj, norm, one matrix for gate and up, SiLU x up, down_proj. The residual stream is a pair
(residual, delta) whose sum is formed inside the next SkipSimplifiedLayerNormalization. A layer without attention or
without FFN simply leaves its nodes out. The decode graph takes the last position before the head, so that a prompt does
not pay for the vocabulary at every token; the scoring graph keeps all positions.

What a family has beyond LLaMA is in its :class:`saap.models.architectures.Traits`, or simply in the data file: a bias
or a norm that is there is applied. Norms of single heads cost a Split before the attention, which takes none on a CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.bundle.manifest import DECODE_GRAPH, SCORING_GRAPH, WINDOW_START
from export.graph.builder import Attribute, GraphBuilder
from export.graph.rotary import rotary_names
from export.graph.weights import WORD_ROWS
from export.source import Precision
from saap.base.errors import UserError
from saap.models.architectures import LayerTraits, Traits
from saap.models.modeling_slim import GONE
from saap.models.shape import LayerSizes, ModelShape
from saap.models.slim_quant import MatrixForm

MICROSOFT = "com.microsoft"
OPSET = 17  # known to ONNX Runtime 1.23 and older; all the rest comes from com.microsoft
IR_VERSION = 10
UNIT_EPSILON = 1e-6  # added to the squared length of a query or key of a delta net
KV_SCALES = 12  # place of the cache's scales among GroupQueryAttention's inputs


def check_attention(shape: ModelShape, traits: Traits, rotary_dims: Mapping[str, int]) -> None:
    """Refuse head sizes that GroupQueryAttention refuses when it runs.

    ``rotary_dims``: elements of a head that each of the rotary tables turns.
    """
    step = 16 if any(layer.rotary for layer in traits.layers) else 8
    for dim in {shape.head_of(sizes) for sizes in shape.layers if sizes.query_heads}:
        if dim % step:
            raise UserError(
                f"a head size of {dim} cannot be exported: ONNX Runtime's attention takes multiples of {step}"
            )
    for dims in rotary_dims.values():
        if dims % 16:
            raise UserError(
                f"rotary embedding of {dims} elements of a head cannot be exported: ONNX Runtime takes multiples of 16"
            )


@dataclass(frozen=True)
class GraphModel:
    """The model that a graph computes: sizes, the family's traits, precision, and the norms' epsilon."""

    shape: ModelShape
    traits: Traits
    precision: Precision
    epsilon: float
    value_norm: bool = False  # whether values are normed head by head


class DecoderGraph(ABC):
    """Builds one graph over tensors that are already in the data file; how it computes is its subclasses' matter.

    ``tensors``: of the data file, by name.
    """

    opsets: Mapping[str, int]

    def __init__(self, model: GraphModel, tensors: Mapping[str, ir.ExternalTensor]) -> None:
        self.shape, self.traits = model.shape, model.traits
        self.precision, self.epsilon, self.value_norm = model.precision, model.epsilon, model.value_norm
        self.tensors = tensors
        self.floats = ir.DataType.from_numpy(np.dtype(model.precision.floats))
        self.kv = ir.DataType.from_numpy(np.dtype(model.precision.kv))
        self.graph = GraphBuilder(tensors)
        self._left_kv: dict[bool, list[ir.Value | None]] = {}  # what later layers read, by whether the layer slides

    def build(self, scoring: bool) -> ir.Model:
        """Build the decode graph, or the scoring graph with the logits of all positions."""
        ids = self.graph.input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        mask = self.graph.input("attention_mask", ir.DataType.INT64, ["batch", "total"])
        self.begin(ids, mask)
        residual, delta, scale = self.embedding(ids), None, self.traits.embedding_scale
        if scale is not None:
            residual = self.graph.op("Mul", residual, self.constant("embedding_scale", scale))
        for_layers, mixer = self.per_layer(ids, residual), 0
        for index, sizes in enumerate(self.shape.layers):
            name = f"layers.{index}"
            if sizes.query_heads or sizes.conv or sizes.delta:
                normed, residual = self._entered(residual, delta, f"{name}.attention_norm")
                mix = self.attention if sizes.query_heads else self.convolution if sizes.conv else self.delta_net
                delta = self._left(mix(normed, index, mixer), f"{name}.attention_post_norm")
                mixer += not sizes.reads
            if sizes.ffn:
                normed, residual = self._entered(residual, delta, f"{name}.ffn_norm")
                delta = self._left(self.feed_forward(normed, name, sizes), f"{name}.ffn_post_norm")
            if for_layers:
                residual, delta = self._with_embedding(residual, delta, for_layers[index], name), None
        normed, _ = self.norm(residual, delta, "norm")
        logits = self._finished(self.head(self.graph.last_positions(normed, scoring)))
        if self.traits.vocabulary:
            logits = self._of_all_words(logits, ids, scoring)
        if self.floats != ir.DataType.FLOAT:
            logits = self.graph.op("Cast", logits, to=ir.DataType.FLOAT.value)
        shape = ["batch", "scored" if scoring else 1, self.shape.vocab]
        self.graph.output(logits, "logits", ir.DataType.FLOAT, shape)
        return self.graph.model(self.opsets, IR_VERSION)

    def _of_all_words(self, logits: ir.Value, ids: ir.Value, scoring: bool) -> ir.Value:
        """Logits of all tokens, from the logits of the head's rows.

        For 262,144 words Gather takes 2 ms and GatherElements 0.15 (Zen 4). GatherElements needs an index for each
        logit, which is too much memory for many positions: the scoring graph gathers whole rows instead.
        """
        g = self.graph
        more = g.op("Pad", logits, self.constant("behind", [0, 0, 0, 0, 0, 1]), self.constant("gone", GONE))
        places = g.op("Min", g.weight(WORD_ROWS), g.constant("head_rows", self.shape.head_rows, ir.DataType.INT32))
        if scoring:
            by_word = g.op("Gather", g.op("Transpose", more, perm=[2, 0, 1]), places, axis=0)
            return g.op("Transpose", by_word, perm=[1, 2, 0])
        batch = g.op("Gather", g.op("Shape", ids), self.constant("axis0", [0]))
        shape = g.op("Concat", batch, self.constant("each_word", [1, self.shape.vocab]), axis=0)
        return g.op("GatherElements", more, g.op("Expand", places, shape), axis=-1)

    @abstractmethod
    def begin(self, ids: ir.Value, mask: ir.Value) -> None:
        """Compute what all layers read, from the ids [batch, sequence] and the mask [batch, total]."""

    def per_layer(self, ids: ir.Value, embedded: ir.Value) -> list[ir.Value]:
        """Compute each layer's embedding [batch, sequence, elements]: looked up, and projected from the token's."""
        size, count = self.shape.per_layer, len(self.shape.layers)
        if not size:
            return []
        g = self.graph
        projected = self.matrix_product(embedded, "per_layer_in", self.shape.hidden, count * size)
        projected = g.op("Mul", projected, self.constant("per_layer_scale", self.shape.hidden**-0.5))
        normed, _ = self.norm(self._heads(projected, count, size), None, "per_layer_norm")
        looked_up = g.op("Mul", self.lookup("per_layer", ids, count * size), self.constant("table_scale", size**0.5))
        both = g.op("Add", self._flat(normed, count * size), looked_up)
        return g.split(g.op("Mul", both, self.constant("half", 2**-0.5)), [size] * count)

    def _with_embedding(self, residual: ir.Value, delta: ir.Value | None, own: ir.Value, name: str) -> ir.Value:
        """Add a layer's own embedding to the residual stream behind its blocks, and scale it."""
        g, size = self.graph, self.shape.per_layer
        stream = residual if delta is None else g.op("Add", residual, delta)
        gate = self.activation(self.matrix_product(stream, f"{name}.layer_gate", self.shape.hidden, size))
        added = self.matrix_product(g.op("Mul", gate, own), f"{name}.layer_out", size, self.shape.hidden)
        normed, _ = self.norm(added, None, f"{name}.layer_norm")
        return g.op("Mul", g.op("Add", stream, normed), g.weight(f"{name}.layer_scale"))

    @abstractmethod
    def lookup(self, name: str, ids: ir.Value, width: int) -> ir.Value:
        """Rows [batch, sequence, width] of the table of this name."""

    @abstractmethod
    def activation(self, x: ir.Value) -> ir.Value:
        """Apply the family's activation."""

    @abstractmethod
    def embedding(self, ids: ir.Value) -> ir.Value:
        """Rows of the embedding, [batch, sequence, hidden]."""

    @abstractmethod
    def norm(self, residual: ir.Value, delta: ir.Value | None, weight: str) -> tuple[ir.Value, ir.Value]:
        """(RMS norm of residual + delta, residual + delta)."""

    @abstractmethod
    def attention(self, x: ir.Value, index: int, mixer: int) -> ir.Value:
        """Attention of layer ``index``, which owns the cache ``mixer``."""

    def convolution(self, x: ir.Value, index: int, mixer: int) -> ir.Value:
        """LFM2's short convolution: out(c * conv(b * x)), where one matrix makes b, c and x of every token.

        The state is what the convolution saw last, [batch, channels, kernel - 1]. It is read before it is written, so
        past and present may be one buffer.
        """
        g, name, channels = self.graph, f"layers.{index}", self.shape.layers[index].conv
        both = self.matrix_product(self.real(x), f"{name}.conv_in", self.shape.hidden, 3 * channels)
        gate_in, gate_out, signal = g.split(both, [channels] * 3)
        mixed = self._convolved(g.op("Mul", gate_in, signal), name, channels, mixer)
        product = g.op("Mul", gate_out, mixed)
        return self.matrix_product(product, f"{name}.conv_out", channels, self.shape.hidden)

    def delta_net(self, x: ir.Value, index: int, mixer: int) -> ir.Value:
        """Compute a gated delta net (Yang et al., arXiv 2412.06464), as Qwen3.5 has it.

        Queries, keys and values pass a convolution and SiLU, queries and keys are made as long as 1, and what comes out
        of the recurrence is normed head by head and gated.
        """
        g, name, heads, keys = self.graph, f"layers.{index}", self.shape.delta, self.shape.layers[index].delta
        assert heads is not None, "a layer has a delta net of heads that are described"
        key, value, count = keys * heads.key, keys * heads.width, keys * heads.values
        x = self.real(x)
        both = self.matrix_product(x, f"{name}.delta_in", self.shape.hidden, 2 * key + 2 * value)
        mixed, gate = g.split(both, [2 * key + value, value])
        mixed = self.sigmoid_times(self._convolved(mixed, name, 2 * key + value, mixer))
        query, keyed, valued = g.split(mixed, [key, key, value])
        query, keyed = (self._flat(self.unit(self._heads(part, keys, heads.key), heads.key), key)
                        for part in (query, keyed))  # fmt: skip
        beta, decay = g.split(g.op("MatMul", x, g.weight(f"{name}.rates.weight")), [count] * 2)
        softened = g.op("Softplus", g.op("Add", decay, g.weight(f"{name}.rates.bias")))
        rates = g.op("Sigmoid", beta), g.op("Mul", softened, g.weight(f"{name}.rates.scale"))
        shape: list[int | str] = ["batch", count, heads.key, heads.value]
        past = g.input(f"past_recurrent.{mixer}", self.floats, shape)
        mixed, state = self.recurrence((query, keyed, valued), rates, past, keys)
        g.output(state, f"present_recurrent.{mixer}", self.floats, shape)
        normed, _ = self.norm(self._heads(mixed, count, heads.value), None, f"{name}.rates.norm")
        product = g.op("Mul", self._flat(normed, value), self.sigmoid_times(gate))
        return self.matrix_product(product, f"{name}.delta_out", value, self.shape.hidden)

    def _heads(self, x: ir.Value, count: int, size: int) -> ir.Value:
        """x [batch, sequence, count * size] by heads."""
        name = f"heads{count}" if size == self.shape.head_dim else f"heads{count}.{size}"
        return self.graph.op("Reshape", x, self.constant(name, [0, 0, count, size]))

    def _flat(self, x: ir.Value, width: int) -> ir.Value:
        """x [batch, sequence, heads, size] as [batch, sequence, width]."""
        return self.graph.op("Reshape", x, self.constant(f"flat{width}", [0, 0, width]))

    @abstractmethod
    def unit(self, x: ir.Value, size: int) -> ir.Value:
        """Vectors x [batch, sequence, heads, size] of length 1."""

    @abstractmethod
    def recurrence(
        self, mixed: tuple[ir.Value, ir.Value, ir.Value], rates: tuple[ir.Value, ir.Value], past: ir.Value, keys: int
    ) -> tuple[ir.Value, ir.Value]:
        """Apply the gated delta rule over the sequence.

        Args:
            mixed: queries and keys [batch, sequence, keys * key] and values [batch, sequence, value heads * value].
            rates: shares that are written, and logarithms of what is kept, [batch, sequence, value heads].
            past: the state before, [batch, value heads, key, value].
            keys: how many key heads there are.

        Returns what is read, as values are laid out, and the state after.
        """

    def _convolved(self, x: ir.Value, name: str, channels: int, mixer: int) -> ir.Value:
        """Convolve x [batch, sequence, channels] with the positions before, each channel by itself."""
        g = self.graph
        state: list[int | str] = ["batch", channels, self.shape.conv_kernel - 1]
        past = g.op("Transpose", g.input(f"past_conv.{mixer}", self.floats, state), perm=[0, 2, 1])
        window = g.op("Concat", past, x, axis=1)
        last = g.op("Transpose", self._from(window, 1 - self.shape.conv_kernel), perm=[0, 2, 1])
        g.output(last, f"present_conv.{mixer}", self.floats, state)
        # One product for each token that is seen: Conv with as many groups as channels takes ten times as long, and
        # CausalConvWithState two to five times.
        mixed = None
        for tap in range(self.shape.conv_kernel):
            place = self._from(window, tap, tap + 1 - self.shape.conv_kernel)
            term = g.op("Mul", place, g.weight(f"{name}.conv_kernel.{tap}"))
            mixed = term if mixed is None else g.op("Add", mixed, term)
        if f"{name}.conv_kernel.bias" in self.tensors:
            mixed = g.op("Add", mixed, g.weight(f"{name}.conv_kernel.bias"))
        assert mixed is not None, "a kernel sees tokens"
        return mixed

    def _from(self, x: ir.Value, start: int, end: int = 0) -> ir.Value:
        """Positions of x [batch, positions, ...] from ``start`` to ``end``, which 0 leaves open."""
        ends = self.constant(f"end{end}", [end or 2**63 - 1])
        return self.graph.op("Slice", x, self.constant(f"start{start}", [start]), ends, self.constant("axis1", [1]))

    def queries_and_gate(self, x: ir.Value, name: str, sizes: LayerSizes) -> tuple[ir.Value, ir.Value | None]:
        """Compute queries, keys and values in one, and the gate of each head, [batch, sequence, heads, elements]."""
        own = sizes.query_heads + (0 if sizes.reads else 2 * sizes.kv_heads)
        g, width = self.graph, own * self.shape.head_of(sizes)
        gates = sizes.query_heads * self.shape.gate_width
        qkv = self.matrix_product(x, f"{name}.qkv", self.shape.hidden, width + gates)
        if not gates:
            return qkv, None
        qkv, gate = g.split(qkv, [width, gates])
        return qkv, self._heads(g.op("Sigmoid", gate), sizes.query_heads, self.shape.gate_width)

    def real(self, x: ir.Value) -> ir.Value:
        """x [batch, sequence, hidden] where padding is 0; a graph that is given none leaves it as it is."""
        return x

    @abstractmethod
    def matrix_product(self, x: ir.Value, name: str, k: int, n: int) -> ir.Value:
        """x [..., k] times the matrix [n, k] of this name, with its bias where it has one."""

    @abstractmethod
    def feed_forward(self, x: ir.Value, name: str, sizes: LayerSizes) -> ir.Value:
        """Compute the FFN of a layer."""

    @abstractmethod
    def head(self, x: ir.Value) -> ir.Value:
        """Logits, in the graph's own type."""

    def constant(self, name: str, value: float | list[int] | list[float]) -> ir.Value:
        """Floats of the graph's type or, for integers, an int64 tensor."""
        first = value[0] if isinstance(value, list) else value
        return self.graph.constant(name, value, self.floats if isinstance(first, float) else None)

    def sigmoid_times(self, x: ir.Value) -> ir.Value:
        """SiLU, written as x * sigmoid(x): ONNX Runtime fuses the pair to one QuickGelu."""
        return self.graph.op("Mul", x, self.graph.op("Sigmoid", x))

    def optional_norm(self, x: ir.Value, weight: str) -> ir.Value:
        """Apply a norm to x where the data file has its weight."""
        return self.norm(x, None, weight)[0] if weight in self.tensors else x

    def _entered(self, residual: ir.Value, delta: ir.Value | None, weight: str) -> tuple[ir.Value, ir.Value]:
        """Return a block's input, normed where the data file has the weight, and the residual stream before it."""
        if weight in self.tensors:
            return self.norm(residual, delta, weight)
        stream = residual if delta is None else self.graph.op("Add", residual, delta)
        return stream, stream

    def _left(self, x: ir.Value, weight: str) -> ir.Value:
        """Return what a block adds to the residual stream."""
        x, scale = self.optional_norm(x, weight), self.traits.residual_scale
        return x if scale is None else self.graph.op("Mul", x, self.constant("residual_scale", scale))

    def _finished(self, logits: ir.Value) -> ir.Value:
        if self.traits.logit_scale is not None:
            logits = self.graph.op("Mul", logits, self.constant("logit_scale", self.traits.logit_scale))
        if self.traits.logit_cap is None:
            return logits
        cap = self.constant("logit_cap", float(self.traits.logit_cap))
        return self.graph.op("Mul", self.graph.op("Tanh", self.graph.op("Div", logits, cap)), cap)


class MicrosoftGraph(DecoderGraph):
    """The decoder in operators of ONNX Runtime, over weights in a :class:`export.graph.weights.MicrosoftLayout`."""

    opsets = {"": OPSET, MICROSOFT: 1}  # noqa: RUF012

    def begin(self, ids: ir.Value, mask: ir.Value) -> None:
        """GroupQueryAttention wants the index of each row's last token and the length of the longest row, int32."""
        g, int32 = self.graph, ir.DataType.INT32.value
        summed = g.op("ReduceSum", mask, self.constant("axis1", [1]), keepdims=0)
        last = g.op("Sub", summed, self.constant("one", 1))
        total = g.op("Gather", g.op("Shape", mask), self.constant("axis", 1), axis=0)
        whole = g.op("Cast", last, to=int32), g.op("Cast", total, to=int32)
        # Of each layer, by whether it slides: the two, and the new tokens' positions where the cache does not tell.
        self._places: dict[bool, tuple[ir.Value, ir.Value, ir.Value | None]] = {False: (*whole, None)}
        self._places[True] = self._places[False]
        if self.windows_alone:
            count = g.op("Gather", g.op("Shape", ids), self.constant("axis", 1), axis=0)
            zero, one = self.constant("zero", 0), self.constant("one", 1)
            # A row that is padded behind its text, in the scoring graph, has more columns than tokens.
            before = g.op("Max", g.op("Sub", summed, count), zero)
            start = g.defaulted(WINDOW_START, [0])
            self._places[True] = (
                g.op("Cast", g.op("Sub", last, start), to=int32),
                g.op("Cast", g.op("Sub", total, start), to=int32),
                g.op("Add", g.op("Unsqueeze", before, self.constant("axis1", [1])), g.op("Range", zero, count, one)),
            )

    def embedding(self, ids: ir.Value) -> ir.Value:
        if self.traits.vocabulary and self.shape.tied:  # whose rows stand in another order
            ids = self.graph.op("Gather", self.graph.weight(WORD_ROWS), ids, axis=0)
        return self.lookup("embedding", ids, self.shape.hidden)

    def lookup(self, name: str, ids: ir.Value, width: int) -> ir.Value:
        if self.precision.head_bits == 32:
            return self.graph.op("Gather", self.graph.weight(f"{name}.weight"), ids, axis=0)
        inputs = [self.graph.weight(f"{name}.qweight"), ids, self.graph.weight(f"{name}.scales3")]
        form = self._form(name, width)
        groups = self.graph.op(
            "GatherBlockQuantized", *inputs, domain=MICROSOFT, gather_axis=0, quantize_axis=2,
            block_size=form.group_size, bits=form.bits,
        )  # fmt: skip
        name = "hidden_shape" if width == self.shape.hidden else f"table_shape{width}"
        return self.graph.op("Reshape", groups, self.constant(name, [0, 0, width]))

    def norm(self, residual: ir.Value, delta: ir.Value | None, weight: str) -> tuple[ir.Value, ir.Value]:
        gamma = self.graph.weight(weight)
        if delta is None:
            normed = self.graph.op("SimplifiedLayerNormalization", residual, gamma, axis=-1, epsilon=self.epsilon)
            return normed, residual
        inputs = [residual, delta, gamma]
        outputs = self.graph.multi("SkipSimplifiedLayerNormalization", inputs, 4, MICROSOFT, epsilon=self.epsilon)
        outputs[1].name = outputs[2].name = ""  # mean and inverse deviation are not wanted
        return outputs[0], outputs[3]

    def attention(self, x: ir.Value, index: int, mixer: int) -> ir.Value:
        sizes, traits = self.shape.layers[index], self.traits.layers[index]
        name, dim, slides = f"layers.{index}", self.shape.head_of(sizes), bool(traits.window)
        qkv, gate = self.queries_and_gate(x, name, sizes)
        normed = self._normed_heads(qkv, name, sizes)
        if not sizes.reads:
            past_axis = "past_in_window" if slides and self.windows_alone else "past"
            shape: list[int | str] = ["batch", sizes.kv_heads, past_axis, dim]
            past = [self.graph.input(f"past_key_values.{mixer}.{part}", self.kv, shape) for part in ("key", "value")]
            scales = [self.graph.weight(f"{name}.{part}_scale") for part in ("key", "value")] if self._int8 else []
            self._left_kv[slides] = [*normed[1:], *past, *scales]
        # A layer that reads others' keys and values is given what their layer is, and its copies are let go.
        keys, values, *kept = self._left_kv[slides]
        last, total, positions = self._places[slides]
        inputs = [normed[0], keys, values, *kept[:2], last, total]
        if traits.rotary is not None:
            inputs += [self.graph.weight(table) for table in rotary_names(traits.rotary)]
            inputs += [] if positions is None else [positions]
        if self._int8:
            inputs += [*[None] * (KV_SCALES - len(inputs)), *kept[2:]]
        outputs = self.graph.multi(
            "GroupQueryAttention", inputs, 3, MICROSOFT, num_heads=sizes.query_heads, kv_num_heads=sizes.kv_heads,
            do_rotary=int(traits.rotary is not None), rotary_interleaved=0, **self._attention_options(traits),
        )  # fmt: skip
        for part, value in zip(("key", "value"), () if sizes.reads else outputs[1:], strict=not sizes.reads):
            axis = "total_or_window" if slides and self.windows_alone else "total_or_past"
            self.graph.output(value, f"present.{mixer}.{part}", self.kv, ["batch", sizes.kv_heads, axis, dim])
        mixed, width = outputs[0], sizes.query_heads * dim
        if gate is not None:
            mixed = self._flat(self.graph.op("Mul", self._heads(mixed, sizes.query_heads, dim), gate), width)
        return self.matrix_product(mixed, f"{name}.o", width, self.shape.hidden)

    def _normed_heads(self, qkv: ir.Value, name: str, sizes: LayerSizes) -> list[ir.Value | None]:
        """Return the op's first three inputs: all in one where there are no norms, else queries, keys and values."""
        if f"{name}.query_norm" not in self.tensors:
            return [qkv, None, None]
        dim, counts = self.shape.head_of(sizes), (sizes.query_heads, sizes.kv_heads, sizes.kv_heads)
        if sizes.reads:
            heads, _ = self.norm(self._heads(qkv, sizes.query_heads, dim), None, f"{name}.query_norm")
            return [self._flat(heads, sizes.query_heads * dim)]
        widths = [count * dim for count in counts]
        split = self.constant("split" + "_".join(map(str, widths)), widths)
        parts = self.graph.multi("Split", [qkv, split], 3, axis=-1)
        norms = ("query_norm", "key_norm")
        normed: list[ir.Value | None] = []
        if self.shape.qk_norm == "all":
            return [*(self.norm(parts[i], None, f"{name}.{norm}")[0] for i, norm in enumerate(norms)), parts[2]]
        for part, count, norm in zip(parts[:2], counts[:2], norms, strict=True):
            heads, _ = self.norm(self._heads(part, count, dim), None, f"{name}.{norm}")
            normed.append(self._flat(heads, count * dim))
        if not self.value_norm:
            return [*normed, parts[2]]
        ones = self.constant(f"ones{dim}", [1.0] * dim)
        heads = self._heads(parts[2], sizes.kv_heads, dim)
        values = self.graph.op("SimplifiedLayerNormalization", heads, ones, axis=-1, epsilon=self.epsilon)
        return [*normed, self._flat(values, sizes.kv_heads * dim)]

    @property
    def windows_alone(self) -> bool:
        """Whether sliding layers may have shorter caches.

        The CPU kernel computes over the whole cache, so they save time there. The CUDA kernel skips what is before the
        window, and takes no positions.
        """
        return self.floats == ir.DataType.FLOAT and any(layer.window for layer in self.traits.layers)

    @property
    def _int8(self) -> bool:
        return self.kv == ir.DataType.INT8

    def unit(self, x: ir.Value, size: int) -> ir.Value:
        """Scale by the fused norm, whose mean of squares is 1 / size of the squared length."""
        scale = self.constant(f"unit{size}", [size**-0.5] * size)
        return self.graph.op(
            "SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=UNIT_EPSILON / size
        )  # fmt: skip

    def recurrence(
        self, mixed: tuple[ir.Value, ir.Value, ir.Value], rates: tuple[ir.Value, ir.Value], past: ir.Value, keys: int
    ) -> tuple[ir.Value, ir.Value]:
        heads = self.shape.delta
        assert heads is not None, "a layer has a delta net of heads that are described"
        written, kept = rates
        read, state = self.graph.multi(
            "LinearAttention", [*mixed, past, kept, written], 2, MICROSOFT, q_num_heads=keys,
            kv_num_heads=keys * heads.values, update_rule="gated_delta", scale=heads.key**-0.5,
        )  # fmt: skip
        return read, state

    def _attention_options(self, traits: LayerTraits) -> dict[str, Attribute]:
        options: dict[str, Attribute] = {}
        if self._int8:
            options |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        if traits.window:
            options["local_window_size"] = traits.window
        if self.traits.attention_scale is not None:
            options["scale"] = self.traits.attention_scale
        return options

    def feed_forward(self, x: ir.Value, name: str, sizes: LayerSizes) -> ir.Value:
        both = self.matrix_product(x, f"{name}.gate_up", self.shape.hidden, 2 * sizes.ffn)
        gate, up = self.graph.multi("Split", [both, self.constant(f"split{sizes.ffn}", [sizes.ffn] * 2)], 2, axis=-1)
        product = self.graph.op("Mul", self.activation(gate), up)
        return self.matrix_product(product, f"{name}.down", sizes.ffn, self.shape.hidden)

    def activation(self, x: ir.Value) -> ir.Value:
        if self.traits.activation == "gelu_pytorch_tanh":
            return self.graph.op("FastGelu", x, domain=MICROSOFT)
        return self.sigmoid_times(x)

    def head(self, x: ir.Value) -> ir.Value:
        name = "embedding" if self.shape.tied and not self.traits.vocabulary else "head"
        if self.precision.head_bits == 32:
            return self.graph.op("FusedMatMul", x, self.graph.weight(f"{name}.weight"), domain=MICROSOFT, transB=1)
        inputs = [x, self.graph.weight(f"{name}.qweight"), self.graph.weight(f"{name}.scales")]
        return self._quantised(name, inputs, self.shape.hidden, self.shape.head_rows)

    def matrix_product(self, x: ir.Value, name: str, k: int, n: int) -> ir.Value:
        bias = self.graph.weight(f"{name}.bias") if f"{name}.bias" in self.tensors else None
        if self.precision.bits == 32:
            y = self.graph.op("MatMul", x, self.graph.weight(f"{name}.weight"))
            return y if bias is None else self.graph.op("Add", y, bias)
        inputs: list[ir.Value | None] = [x, self.graph.weight(f"{name}.qweight"), self.graph.weight(f"{name}.scales")]
        inside = bias is not None and self.floats == ir.DataType.FLOAT  # ONNX Runtime's CUDA kernel took none for long
        y = self._quantised(name, [*inputs, None, None, bias] if inside else inputs, k, n)
        return y if bias is None or inside else self.graph.op("Add", y, bias)

    def _quantised(self, name: str, inputs: Sequence[ir.Value | None], k: int, n: int) -> ir.Value:
        bits, group_size = self._form(name, k)
        return self.graph.op(
            "MatMulNBits", *inputs, domain=MICROSOFT, K=k, N=n, bits=bits, block_size=group_size,
            accuracy_level=self.precision.accuracy_level,
        )  # fmt: skip

    def _form(self, name: str, k: int) -> MatrixForm:
        """Each matrix has its own, and the file knows: its integers stand as [N, groups, bytes of a group]."""
        _, groups, size = self.tensors[f"{name}.qweight"].shape.numpy()
        return MatrixForm(size * 8 * groups // k, k // groups)


def save_graphs(
    kind: type[DecoderGraph], model: GraphModel, tensors: Mapping[str, ir.ExternalTensor], directory: Path
) -> None:
    """Write the decode graph and the scoring graph."""
    for name, scoring in ((DECODE_GRAPH, False), (SCORING_GRAPH, True)):
        ir.save(kind(model, tensors).build(scoring), directory / name)

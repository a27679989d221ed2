"""The families of decoders with their own sizes in every layer, and integer weights where one was tuned.

This file is shipped inside every slim directory that plain transformers cannot build, so it imports torch and
transformers only. Four keys of ``config.json`` drive it:

* ``slim_layers``: one ``[query_heads, kv_heads, ffn]`` per layer, and a fourth number in families that have such
  layers: the channels of its short convolution, or the key heads of its gated delta net; 0 query heads means no
  attention, 0 ffn no MLP.
* ``slim_vocabulary``: which tokens the output head can predict, as :func:`packed_ids` writes them; all are read.
* ``slim_bias``: true where what writes to the residual stream has biases that its family does not have.
* ``slim_quant``: ``{"bits", "block", "embedding_bits", "tied"}`` when linears and embedding hold group-wise integers;
  ``"matrices"`` are the bits, ``"blocks"`` the group sizes, of matrices that differ, by name.
"""

from __future__ import annotations

import base64
import functools
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.nn import functional as F

# Linears that are never integers: what they make is a handful of numbers, which rule a whole state.
FLOATS = ("in_proj_a", "in_proj_b")
# The logit of a token that went from the head: its probability is 0, and differences of two such are no NaN.
GONE = -1e4


def packed_ids(words: Collection[int], size: int) -> str:
    """Write ids below ``size`` as a text: a bit for each id, deflated, in base64."""
    bits = bytearray(-(-size // 8))
    for word in words:
        bits[word // 8] |= 1 << word % 8
    return base64.b64encode(zlib.compress(bytes(bits), 9)).decode("ascii")


@functools.lru_cache(maxsize=8)
def unpacked_ids(packed: str, size: int) -> torch.Tensor:
    """Read the ids of such a text, ascending int64. Raises ValueError: damaged, or written for another ``size``."""
    length = -(-size // 8)
    bits = zlib.decompressobj().decompress(base64.b64decode(packed, validate=True), length + 1)
    if len(bits) != length:
        raise ValueError(f"it holds {len(bits)} bytes and {size} tokens take {length}")
    each = torch.frombuffer(bytearray(bits), dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    words = each.flatten().nonzero().flatten()
    if not len(words) or int(words[-1]) >= size:
        raise ValueError("it names no token, or one that is not there")
    return words


def hide_removed(logits: torch.Tensor, packed: str) -> torch.Tensor:
    """Set logits [..., vocab] of tokens that ``packed`` does not name to :data:`GONE`."""
    gone = torch.ones(logits.shape[-1], dtype=torch.bool)
    gone[unpacked_ids(packed, len(gone))] = False
    return logits.masked_fill(gone.to(logits.device), GONE)


def unpack_codes(packed: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Integers of a MatMulNBits weight, low nibble first: [N, K/block, block*bits/8] uint8 -> [N, K/block, block]."""
    if bits == 8:
        return packed
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1)
    return nibbles.reshape(packed.shape[0], packed.shape[1], block)


def unpack_zero_points(packed: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    """Zero points of a MatMulNBits weight: [N, ceil(groups*bits/8)] uint8 -> [N, groups] uint8."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :groups]


class GroupQuantTable(nn.Module):
    """A matrix [rows, columns] held as integers in groups of ``block`` columns: W = scale * (q - zero_point).

    The three buffers are byte for byte the inputs B, scales and zero_points of com.microsoft.MatMulNBits. Scales are
    float32 numbers that float16 can represent, so that every runtime holds the same number.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor

    def __init__(self, rows: int, columns: int, bits: int, block: int) -> None:
        super().__init__()
        self.rows, self.columns, self.bits, self.block = rows, columns, bits, block
        groups = columns // block
        self.register_buffer("qweight", torch.zeros(rows, groups, block * bits // 8, dtype=torch.uint8))
        self.register_buffer("scales", torch.ones(rows, groups, dtype=torch.float32))
        self.register_buffer("zero_points", torch.zeros(rows, (groups * bits + 7) // 8, dtype=torch.uint8))

    def centred(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """q - zero_point as int16, [rows, groups, block]; of the given rows only where asked."""
        packed = self.qweight if rows is None else self.qweight[rows]
        zero_points = self.zero_points if rows is None else self.zero_points[rows]
        codes = unpack_codes(packed, self.bits, self.block).to(torch.int16)
        zeros = unpack_zero_points(zero_points, self.bits, self.columns // self.block).to(torch.int16)
        return codes - zeros.unsqueeze(-1)

    def dequantize(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """W as float32, [rows, columns]."""
        scales = self.scales if rows is None else self.scales[rows]
        return (self.centred(rows).float() * scales.float().unsqueeze(-1)).flatten(1)


class GroupQuantLinear(GroupQuantTable):
    """y = x W^T (+ bias), W held as integers."""

    def __init__(self, in_features: int, out_features: int, bits: int, block: int, bias: bool = False) -> None:
        super().__init__(out_features, in_features, bits, block)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)


class GroupQuantEmbedding(GroupQuantTable):
    """An embedding table held as integers; some families multiply what they look up by ``factor``."""

    factor = 1.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] int -> [..., columns] float32."""
        return self.dequantize(ids.flatten()).reshape(*ids.shape, self.columns) * self.factor


class ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are multiplied by ``factor``."""

    factor = 1.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] int -> [..., columns]."""
        return super().forward(ids) * self.factor


class TiedHead(nn.Module):
    """The output head that reads the embedding's integers and owns nothing."""

    def __init__(self, table: GroupQuantEmbedding) -> None:
        super().__init__()
        self._table = [table]  # in a list, so that it is not registered, saved and moved a second time

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., vocab]."""
        return F.linear(x, self._table[0].dequantize().to(x.dtype))


class NoAttention(nn.Module):
    """Stands where a layer lost its attention: adds nothing to the residual stream."""

    is_sliding = False  # some layers ask which rotary embedding to hand in

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        """[b, s, hidden] -> zeros of that shape."""
        return torch.zeros_like(hidden_states), None


class NoBlock(nn.Module):
    """Stands where a layer lost its MLP, its convolution or its delta net: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        """[b, s, hidden] -> zeros of that shape."""
        return torch.zeros_like(hidden_states)


class LayerConfig:
    """A model's config with one layer's number of query heads."""

    def __init__(self, config: object, query_heads: int) -> None:
        self._config, self.num_attention_heads = config, query_heads

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or name == "_config":  # asked for by copy, before there is a config
            raise AttributeError(name)
        return getattr(self._config, name)


class SlimDecoder:
    """A base of the slim classes that cuts the layers of their family's class to ``config.slim_layers``."""

    def __init__(self, config: object) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        if sizes := getattr(config, "slim_layers", None):
            resize_layers(self, [tuple(s) for s in sizes], bool(getattr(config, "slim_bias", False)))
        if quant := getattr(config, "slim_quant", None):
            quantize_modules(self, quant)


def _hiding_removed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forward of a family: logits of tokens that went from the head are :data:`GONE`."""

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        packed, labels = getattr(self.config, "slim_vocabulary", None), kwargs.get("labels")
        if not packed:
            return forward(self, *args, **kwargs)
        out = forward(self, *args, **{**kwargs, "labels": None})
        out.logits = hide_removed(out.logits, packed)
        if labels is not None:
            out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=out.logits.shape[-1])
        return out

    return wrapped


class SlimClasses(NamedTuple):
    """The two classes of a family, as transformers registers them."""

    config: type[transformers.PretrainedConfig]
    model: type[transformers.PreTrainedModel]


def slim_classes(family: str) -> SlimClasses | None:
    """Return the slim classes of a family, as ``Llama``; None where the installed transformers lacks it."""
    parent = getattr(transformers, f"{family}ForCausalLM", None)
    if parent is None:
        return None
    own, names = globals(), (f"Slim{parent.config_class.__name__}", f"Slim{parent.__name__}")
    if names[1] not in own:
        place = {"__module__": __name__, "__doc__": f"The {family} family with its own sizes in every layer."}
        kind = f"saap_{parent.config_class.model_type}"
        own[names[0]] = type(names[0], (parent.config_class,), {**place, "model_type": kind})
        methods = {"forward": _hiding_removed(parent.forward)}
        own[names[1]] = type(names[1], (SlimDecoder, parent), {**place, **methods, "config_class": own[names[0]]})
    return SlimClasses(own[names[0]], own[names[1]])


def __getattr__(name: str) -> object:
    """Build the classes that ``config.json`` names from those of transformers on first use."""
    for end in ("TextConfig", "Config", "ForCausalLM"):
        if name.startswith("Slim") and name.endswith(end):
            slim_classes(name[len("Slim") : -len(end)])
    if name in globals():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def resize_layers(model: Any, sizes: list[tuple[int, ...]], added_bias: bool = False) -> None:
    """Replace each layer's linears by ones of its own sizes, in place; the weights are fresh."""
    layers = model.model.layers
    if len(sizes) != len(layers):
        raise ValueError(f"slim_layers has {len(sizes)} entries, the model has {len(layers)} layers")
    places = cache_places(getattr(model.config, "layer_types", None) or [""] * len(sizes), sizes)
    for index, (layer, (query_heads, kv_heads, ffn, *rare)) in enumerate(zip(layers, sizes, strict=True)):
        mixer_norms, ffn_norms = _norms(layer)
        if query_heads:
            _resize_attention(layer.self_attn, query_heads, kv_heads, added_bias)
            layer.self_attn.layer_idx = places[index]
        elif any(rare):
            mixer = _present(layer, "conv", "linear_attn")
            resize = _resize_conv if mixer == "conv" else _resize_delta
            resize(getattr(layer, mixer), rare[0], added_bias)
            getattr(layer, mixer).layer_idx = places[index]
        else:
            mixer = _present(layer, "conv", "linear_attn", "self_attn")
            setattr(layer, mixer, NoAttention() if mixer == "self_attn" else NoBlock())
            _remove(layer, mixer_norms)
        mlp = _present(layer, "mlp", "shared_mlp", "feed_forward")
        if ffn:
            _resize_mlp(getattr(layer, mlp), ffn, added_bias)
        else:
            setattr(layer, mlp, NoBlock())
            _remove(layer, ffn_norms)


def cache_places(kinds: list[str], sizes: list[tuple[int, ...]]) -> dict[int, int]:
    """Assign an entry of the cache to each layer that mixes tokens.

    The cache has one entry for each layer, of the layer's kind. Of each kind, transformers reads lengths from the first
    entry: so the layers that mix tokens take the first entries of their kind, and the last stay empty.
    """
    places: dict[int, int] = {}
    for kind in set(kinds):
        entries = [index for index, of in enumerate(kinds) if of == kind]
        mixing = (index for index in entries if sizes[index][0] or any(sizes[index][3:]))
        places.update(zip(mixing, entries, strict=False))
    return places


def _norms(layer: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Name the norms that belong to the block that mixes tokens, and to the MLP; a layer has some of them."""
    if hasattr(layer, "operator_norm"):
        return ("operator_norm", "post_operator_norm"), ("ffn_norm", "post_ffn_norm")
    if hasattr(layer, "post_feedforward_layernorm"):  # then the other "post" is after the attention, not before the MLP
        after = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        return ("input_layernorm", "post_attention_layernorm"), after
    return ("input_layernorm",), ("post_attention_layernorm",)


def _remove(layer: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        if hasattr(layer, name):
            setattr(layer, name, nn.Identity())


def _resize_attention(attention: Any, query_heads: int, kv_heads: int, added_bias: bool) -> None:
    queries, keys = query_heads * attention.head_dim, kv_heads * attention.head_dim
    output = _present(attention, "o_proj", "out_proj")
    if hasattr(attention, "q_proj"):  # whose rows may hold gates, too
        gated = attention.q_proj.out_features // getattr(attention, output).in_features
    else:
        gated = 1
    attention.num_key_value_groups, attention.num_key_value_heads = query_heads // kv_heads, kv_heads
    if hasattr(attention, "qkv_proj"):  # where its packed rows end is asked of the config
        attention.config = LayerConfig(attention.config, query_heads)
    rows = {
        "q_proj": gated * queries,
        "k_proj": keys,
        "v_proj": keys,
        "qkv_proj": queries + 2 * keys,
        "g_proj": query_heads,
    }
    _resize_rows(attention, rows)
    _resize_columns(attention, output, queries, added_bias)


def _resize_conv(conv: Any, channels: int, added_bias: bool) -> None:
    """Resize LFM2's short convolution, whose ``in_proj`` makes two gates and a signal for each channel."""
    conv.conv = _conv_like(conv.conv, channels)
    _resize_rows(conv, {"in_proj": 3 * channels})
    _resize_columns(conv, "out_proj", channels, added_bias)


def _resize_delta(net: Any, key_heads: int, added_bias: bool) -> None:
    """Resize a gated delta net, in which one convolution is over queries, keys and values."""
    value_heads = key_heads * (net.num_v_heads // net.num_k_heads)
    net.num_k_heads, net.num_v_heads = key_heads, value_heads
    net.key_dim, net.value_dim = key_heads * net.head_k_dim, value_heads * net.head_v_dim
    net.conv_dim = 2 * net.key_dim + net.value_dim
    net.conv1d = _conv_like(net.conv1d, net.conv_dim)
    for name in ("A_log", "dt_bias"):
        setattr(net, name, nn.Parameter(getattr(net, name).new_zeros(value_heads)))
    rows = {"in_proj_qkv": net.conv_dim, "in_proj_z": net.value_dim, "in_proj_a": value_heads, "in_proj_b": value_heads}
    _resize_rows(net, rows)
    _resize_columns(net, "out_proj", net.value_dim, added_bias)


def _conv_like(old: Any, channels: int) -> nn.Conv1d:
    """Make a depthwise convolution of ``channels``, otherwise like ``old``."""
    weight, biased = old.weight, old.bias is not None
    return nn.Conv1d(
        channels, channels, old.kernel_size, groups=channels, bias=biased, padding=old.padding, device=weight.device,
        dtype=weight.dtype,
    )  # fmt: skip


def _resize_mlp(mlp: Any, ffn: int, added_bias: bool) -> None:
    mlp.intermediate_size = ffn
    rows = {"gate_proj": ffn, "up_proj": ffn, "w1": ffn, "w3": ffn, "gate_up_proj": 2 * ffn, "input_linear": 2 * ffn}
    _resize_rows(mlp, rows)
    _resize_columns(mlp, _present(mlp, "down_proj", "output_linear", "w2"), ffn, added_bias)


def _present(parent: nn.Module, *names: str) -> str:
    """Return the one of these modules that is there: families name them differently."""
    return next(name for name in names if hasattr(parent, name))


def _resize_columns(parent: nn.Module, name: str, columns: int, added_bias: bool) -> None:
    """Give a linear that writes to the residual stream another number of columns."""
    old = getattr(parent, name)
    setattr(parent, name, _linear_like(old, columns, old.out_features, added_bias))


def _resize_rows(parent: nn.Module, rows: dict[str, int]) -> None:
    """Give those of the named linears that are there other numbers of rows."""
    for name in set(rows) & set(dict(parent.named_children())):
        old = getattr(parent, name)
        setattr(parent, name, _linear_like(old, old.in_features, rows[name]))


def _linear_like(old: nn.Linear, in_features: int, out_features: int, added_bias: bool = False) -> nn.Linear:
    weight, bias = old.weight, added_bias or old.bias is not None
    return nn.Linear(in_features, out_features, bias=bias, device=weight.device, dtype=weight.dtype)


def quantize_modules(model: Any, quant: Mapping[str, Any]) -> None:
    """Replace the decoder's linears, the embedding and the head by holders of integers, in place."""
    if quant.get("branch"):
        raise ValueError("the model was tuned with a branch, which this version does not compute: tune it again")
    own_bits, own_blocks = quant.get("matrices", {}), quant.get("blocks", {})
    outside = [(f"model.{name}", child) for name, child in model.model.named_children() if name.startswith("per_layer")]
    for path, child in [*model.model.layers.named_modules(prefix="model.layers"), *outside]:
        if isinstance(child, nn.Linear) and not path.endswith(FLOATS):
            bits, biased = own_bits.get(path, quant["bits"]), child.bias is not None
            block = own_blocks.get(path, quant["block"])
            fresh = GroupQuantLinear(child.in_features, child.out_features, bits, block, biased)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, fresh.to(child.weight.device))
    table, bits = model.model.embed_tokens, quant["embedding_bits"]
    (rows, columns), device = table.weight.shape, table.weight.device
    block = own_blocks.get("model.embed_tokens", quant["block"])
    model.model.embed_tokens = embedding = GroupQuantEmbedding(rows, columns, bits, block).to(device)
    embedding.factor = getattr(table, "factor", float(columns) ** 0.5 if hasattr(table, "embed_scale") else 1.0)
    block = own_blocks.get("lm_head", quant["block"])
    head = TiedHead(embedding) if quant["tied"] else GroupQuantLinear(columns, rows, bits, block)
    model.lm_head = head.to(device)
    for name, other in list(model.model.named_children()):
        if isinstance(other, nn.Embedding) and name != "embed_tokens":  # of each layer
            block = own_blocks.get(f"model.{name}", quant["block"])
            words, width = other.weight.shape
            of_layers = GroupQuantEmbedding(words, width, bits, block).to(device)
            of_layers.factor = float(getattr(other, "scalar_embed_scale", 1.0))
            setattr(model.model, name, of_layers)

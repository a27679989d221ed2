"""The families of decoders with their own sizes in every layer, and integer weights where one was tuned.

This file is shipped inside every slim directory that plain transformers cannot build, so it imports torch and
transformers only. Three keys of ``config.json`` drive it:

* ``slim_layers``: one ``[query_heads, kv_heads, ffn]`` per layer; 0 query heads means no attention, 0 ffn no MLP.
* ``slim_bias``: true where the output and the down projections have biases that their family does not have.
* ``slim_quant``: ``{"bits", "block", "embedding_bits", "tied"}`` when linears and embedding hold group-wise integers;
  ``"matrices"`` are the bits of linears that differ by name, ``"branch"`` is a rank for all linears or by name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM


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
    """y = x W^T + gsum(x) A^T B^T (+ bias): W held as integers, gsum(x) [..., groups] the sums over groups of columns.

    ``branch_a`` A [rank, groups] and ``branch_b`` B [out, rank] are float32 numbers that float16 represents, or None.
    """

    branch_a: torch.Tensor | None
    branch_b: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bits: int, block: int, bias: bool = False, branch: int = 0
    ) -> None:
        super().__init__(out_features, in_features, bits, block)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        for name, shape in (("branch_a", (branch, in_features // block)), ("branch_b", (out_features, branch))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32) if branch else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        y = F.linear(x, self.dequantize().to(x.dtype), self.bias)
        if self.branch_a is None or self.branch_b is None:
            return y
        sums = x.unflatten(-1, (-1, self.block)).sum(-1)
        return y + F.linear(F.linear(sums, self.branch_a.to(x.dtype)), self.branch_b.to(x.dtype))


class GroupQuantEmbedding(GroupQuantTable):
    """An embedding table held as integers; Gemma multiplies what it looks up by ``factor``."""

    factor = 1.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] int -> [..., columns] float32."""
        return self.dequantize(ids.flatten()).reshape(*ids.shape, self.columns) * self.factor


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

    is_sliding = False  # Gemma 3 asks which rotary embedding to hand in

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        """[b, s, hidden] -> zeros of that shape."""
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """Stands where a layer lost its MLP: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[b, s, hidden] -> zeros of that shape."""
        return torch.zeros_like(hidden_states)


class LayerConfig:
    """A model's config with one layer's number of query heads."""

    def __init__(self, config: Any, query_heads: int) -> None:
        self._config, self.num_attention_heads = config, query_heads

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # asked for by copy, before there is a config
            raise AttributeError(name)
        return getattr(self._config, name)


class SlimDecoder:
    """What the slim classes add to their family's class: layers cut to ``config.slim_layers``."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        if sizes := getattr(config, "slim_layers", None):
            resize_layers(self, [tuple(s) for s in sizes], bool(getattr(config, "slim_bias", False)))
        if quant := getattr(config, "slim_quant", None):
            quantize_modules(self, quant)


class SlimLlamaConfig(LlamaConfig):
    """A LlamaConfig; the extra keys are kept as plain attributes."""

    model_type = "saap_llama"


class SlimLlamaForCausalLM(SlimDecoder, LlamaForCausalLM):  # type: ignore[misc]  # transformers' own bases disagree
    """LlamaForCausalLM whose layers are cut to ``config.slim_layers``."""

    config_class: Any = SlimLlamaConfig


class SlimClasses(NamedTuple):
    """The two classes of a family, as transformers registers them."""

    config: Any
    model: Any


_ENDS = ("Config", "ForCausalLM")
OTHERS = {  # model type of a family: stems of its config and its model class in transformers
    "mistral": ("Mistral", "Mistral"),
    "qwen2": ("Qwen2", "Qwen2"),
    "qwen3": ("Qwen3", "Qwen3"),
    "phi3": ("Phi3", "Phi3"),
    "gemma3_text": ("Gemma3Text", "Gemma3"),
    "smollm3": ("SmolLM3", "SmolLM3"),
}
SLIM_CLASSES = {"llama": SlimClasses(SlimLlamaConfig, SlimLlamaForCausalLM)}  # of the families that transformers has


def _derive(name: str, stems: tuple[str, str]) -> SlimClasses | None:
    """The slim classes of a family, found under their names in this module; None where transformers lacks it."""
    parents: list[Any] = [getattr(transformers, stem + end, None) for stem, end in zip(stems, _ENDS, strict=True)]
    if None in parents:
        return None
    place = {"__module__": __name__, "__doc__": f"The {stems[1]} family with sizes of their own in its layers."}
    config = type(f"Slim{stems[0]}{_ENDS[0]}", (parents[0],), {**place, "model_type": f"saap_{name}"})
    model = type(f"Slim{stems[1]}{_ENDS[1]}", (SlimDecoder, parents[1]), {**place, "config_class": config})
    globals().update({kind.__name__: kind for kind in (config, model)})
    return SlimClasses(config, model)


for _name, _stems in OTHERS.items():
    if (_classes := _derive(_name, _stems)) is not None:
        SLIM_CLASSES[_name] = _classes


def resize_layers(model: Any, sizes: list[tuple[int, ...]], added_bias: bool = False) -> None:
    """Replace each layer's linears by ones of its own sizes, in place; the weights are fresh."""
    layers = model.model.layers
    if len(sizes) != len(layers):
        raise ValueError(f"slim_layers has {len(sizes)} entries, the model has {len(layers)} layers")
    places = cache_places(getattr(model.config, "layer_types", None) or [""] * len(sizes), sizes)
    for index, (layer, (query_heads, kv_heads, ffn)) in enumerate(zip(layers, sizes, strict=True)):
        attention_norms, ffn_norms = _norms(layer)
        if query_heads:
            _resize_attention(layer.self_attn, query_heads, kv_heads, added_bias)
            layer.self_attn.layer_idx = places[index]
        else:
            layer.self_attn = NoAttention()
            _remove(layer, attention_norms)
        if ffn:
            _resize_mlp(layer.mlp, ffn, added_bias)
        else:
            layer.mlp = NoFeedForward()
            _remove(layer, ffn_norms)


def cache_places(kinds: list[str], sizes: list[tuple[int, ...]]) -> dict[int, int]:
    """Which entry of the KV cache each layer that attends uses.

    The cache has one entry for each layer, sliding or not as the layer is. Of each kind, transformers reads lengths
    from the first entry: so the layers that attend take the first entries of their kind, and the last stay empty.
    """
    places: dict[int, int] = {}
    for kind in set(kinds):
        entries = [index for index, of in enumerate(kinds) if of == kind]
        places.update(zip((index for index in entries if sizes[index][0]), entries, strict=False))
    return places


def _norms(layer: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the norms that go with a layer's attention, and with its MLP."""
    if hasattr(layer, "pre_feedforward_layernorm"):
        after = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        return ("input_layernorm", "post_attention_layernorm"), after
    return ("input_layernorm",), ("post_attention_layernorm",)


def _remove(layer: Any, names: tuple[str, ...]) -> None:
    for name in names:
        setattr(layer, name, nn.Identity())


def _resize_attention(attention: Any, query_heads: int, kv_heads: int, added_bias: bool) -> None:
    queries, keys = query_heads * attention.head_dim, kv_heads * attention.head_dim
    attention.num_key_value_groups, attention.num_key_value_heads = query_heads // kv_heads, kv_heads
    if hasattr(attention, "qkv_proj"):  # whose place in the packed rows Phi-3 asks its config for
        attention.config = LayerConfig(attention.config, query_heads)
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "qkv_proj": queries + 2 * keys}
    _resize_rows(attention, rows)
    attention.o_proj = _linear_like(attention.o_proj, queries, attention.o_proj.out_features, added_bias)


def _resize_mlp(mlp: Any, ffn: int, added_bias: bool) -> None:
    mlp.intermediate_size = ffn
    _resize_rows(mlp, {"gate_proj": ffn, "up_proj": ffn, "gate_up_proj": 2 * ffn})
    mlp.down_proj = _linear_like(mlp.down_proj, ffn, mlp.down_proj.out_features, added_bias)


def _resize_rows(parent: Any, rows: dict[str, int]) -> None:
    """Give those of the named linears that are there other numbers of rows."""
    for name in set(rows) & set(dict(parent.named_children())):
        old = getattr(parent, name)
        setattr(parent, name, _linear_like(old, old.in_features, rows[name]))


def _linear_like(old: nn.Linear, in_features: int, out_features: int, added_bias: bool = False) -> nn.Linear:
    weight, bias = old.weight, added_bias or old.bias is not None
    return nn.Linear(in_features, out_features, bias=bias, device=weight.device, dtype=weight.dtype)


def quantize_modules(model: Any, quant: dict[str, Any]) -> None:
    """Replace the decoder's linears, the embedding and the head by holders of integers, in place."""
    own_bits, branch = quant.get("matrices", {}), quant.get("branch", 0)
    for path, child in list(model.model.layers.named_modules(prefix="model.layers")):
        if isinstance(child, nn.Linear):
            bits, biased = own_bits.get(path, quant["bits"]), child.bias is not None
            rank = branch.get(path, 0) if isinstance(branch, dict) else branch
            fresh = GroupQuantLinear(child.in_features, child.out_features, bits, quant["block"], biased, rank)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, fresh.to(child.weight.device))
    table, bits = model.model.embed_tokens, quant["embedding_bits"]
    (rows, columns), device = table.weight.shape, table.weight.device
    model.model.embed_tokens = embedding = GroupQuantEmbedding(rows, columns, bits, quant["block"]).to(device)
    embedding.factor = float(columns) ** 0.5 if hasattr(table, "embed_scale") else 1.0
    head = TiedHead(embedding) if quant["tied"] else GroupQuantLinear(columns, rows, bits, quant["block"])
    model.lm_head = head.to(device)

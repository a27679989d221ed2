"""LLaMA with its own sizes in every layer, and integer weights where it was tuned.

This file is shipped inside every slim directory that plain transformers cannot build, so it imports torch and
transformers only. Two keys of ``config.json`` drive it:

* ``slim_layers``: one ``[query_heads, kv_heads, ffn]`` per layer; 0 query heads means no attention, 0 ffn no MLP.
* ``slim_quant``: ``{"bits", "block", "embedding_bits"}`` when the linears and the embedding hold group-wise integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM


class SlimLlamaConfig(LlamaConfig):
    """A LlamaConfig; the extra keys are kept as plain attributes."""

    model_type = "saap_llama"


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
        return codes - unpack_zero_points(zero_points, self.bits, self.columns // self.block).to(torch.int16).unsqueeze(
            -1
        )

    def dequantize(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """W as float32, [rows, columns]."""
        scales = self.scales if rows is None else self.scales[rows]
        return (self.centred(rows).float() * scales.float().unsqueeze(-1)).flatten(1)


class GroupQuantLinear(GroupQuantTable):
    """y = x W^T (+ bias) with W held as integers."""

    def __init__(self, in_features: int, out_features: int, bits: int, block: int, bias: bool = False) -> None:
        super().__init__(out_features, in_features, bits, block)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)


class GroupQuantEmbedding(GroupQuantTable):
    """An embedding table held as integers."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] int -> [..., columns] float32."""
        return self.dequantize(ids.flatten()).reshape(*ids.shape, self.columns)


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

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        """[b, s, hidden] -> zeros of that shape."""
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """Stands where a layer lost its MLP: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[b, s, hidden] -> zeros of that shape."""
        return torch.zeros_like(hidden_states)


class SlimLlamaForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM whose layers are cut to ``config.slim_layers``."""

    config_class: Any = SlimLlamaConfig

    def __init__(self, config: SlimLlamaConfig) -> None:
        super().__init__(config)
        sizes = getattr(config, "slim_layers", None)
        quant = getattr(config, "slim_quant", None)
        if sizes:
            resize_layers(self, [tuple(s) for s in sizes])
        if quant:
            quantize_modules(self, quant)


def resize_layers(model: Any, sizes: list[tuple[int, ...]]) -> None:
    """Replace each layer's linears by ones of its own sizes, in place; the weights are fresh."""
    if len(sizes) != len(model.model.layers):
        raise ValueError(f"slim_layers has {len(sizes)} entries, the model has {len(model.model.layers)} layers")
    cache_index = 0
    for layer, (query_heads, kv_heads, ffn) in zip(model.model.layers, sizes, strict=True):
        if query_heads:
            _resize_attention(layer.self_attn, query_heads, kv_heads)
            layer.self_attn.layer_idx = cache_index  # the cache has one entry per layer that attends
            cache_index += 1
        else:
            layer.self_attn, layer.input_layernorm = NoAttention(), nn.Identity()
        if ffn:
            _resize_mlp(layer.mlp, ffn)
        else:
            layer.mlp, layer.post_attention_layernorm = NoFeedForward(), nn.Identity()


def _resize_attention(attention: Any, query_heads: int, kv_heads: int) -> None:
    dim, hidden = attention.head_dim, attention.q_proj.in_features
    attention.num_key_value_groups = query_heads // kv_heads
    attention.q_proj = _linear_like(attention.q_proj, hidden, query_heads * dim)
    attention.k_proj = _linear_like(attention.k_proj, hidden, kv_heads * dim)
    attention.v_proj = _linear_like(attention.v_proj, hidden, kv_heads * dim)
    attention.o_proj = _linear_like(attention.o_proj, query_heads * dim, hidden)


def _resize_mlp(mlp: Any, ffn: int) -> None:
    hidden = mlp.gate_proj.in_features
    mlp.intermediate_size = ffn
    mlp.gate_proj = _linear_like(mlp.gate_proj, hidden, ffn)
    mlp.up_proj = _linear_like(mlp.up_proj, hidden, ffn)
    mlp.down_proj = _linear_like(mlp.down_proj, ffn, hidden)


def _linear_like(old: nn.Linear, in_features: int, out_features: int) -> nn.Linear:
    weight = old.weight
    return nn.Linear(in_features, out_features, bias=old.bias is not None, device=weight.device, dtype=weight.dtype)


def quantize_modules(model: Any, quant: dict[str, Any]) -> None:
    """Replace the decoder's linears, the embedding and the head by holders of integers, in place."""
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    fresh = GroupQuantLinear(
                        child.in_features, child.out_features, quant["bits"], quant["block"], child.bias is not None
                    )
                    setattr(parent, name, fresh.to(child.weight.device))
    table = model.model.embed_tokens
    rows, columns = table.weight.shape
    device = table.weight.device
    embedding = GroupQuantEmbedding(rows, columns, quant["embedding_bits"], quant["block"]).to(device)
    model.model.embed_tokens = embedding
    if quant["tied"]:
        model.lm_head = TiedHead(embedding)
    else:
        model.lm_head = GroupQuantLinear(columns, rows, quant["embedding_bits"], quant["block"]).to(device)

"""Where heads, groups, channels and norms are, per ``model_type``: a small table that pruning and export share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saap.errors import SaapError
from saap.structures import LayerSizes, ModelShape


@dataclass(frozen=True)
class Architecture:
    """Module names of one family, relative to a decoder layer or to the model."""

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"

    @property
    def linears(self) -> tuple[str, ...]:
        """The prunable linears of a layer."""
        return (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)


LLAMA = Architecture()
ARCHITECTURES = {"llama": LLAMA, "saap_llama": LLAMA}


def architecture_of(config: Any) -> Architecture:
    """The table row for a transformers config (or its dict).

    Raises:
        SaapError: the architecture is not supported.
    """
    name = _get(config, "model_type")
    if name not in ARCHITECTURES:
        known = ", ".join(k for k in ARCHITECTURES if not k.startswith("saap_"))
        raise SaapError(f"model type {name!r} is not supported; supported: {known}")
    if _get(config, "hidden_act", "silu") != "silu":
        raise SaapError(f"activation {_get(config, 'hidden_act')!r} is not supported; supported: silu")
    return ARCHITECTURES[name]


def shape_of(config: Any) -> ModelShape:
    """Read a model's sizes from its config (or the config's dict)."""
    architecture_of(config)
    heads, hidden = _get(config, "num_attention_heads"), _get(config, "hidden_size")
    slim = _get(config, "slim_layers")
    if slim:
        layers = tuple(LayerSizes(*sizes) for sizes in slim)
    else:
        kv_heads = _get(config, "num_key_value_heads") or heads
        layers = (LayerSizes(heads, kv_heads, _get(config, "intermediate_size")),) * _get(config, "num_hidden_layers")
    quant = _get(config, "slim_quant")
    return ModelShape(
        hidden=hidden,
        head_dim=_get(config, "head_dim") or hidden // heads,
        vocab=_get(config, "vocab_size"),
        tied=bool(quant["tied"] if quant else _get(config, "tie_word_embeddings", False)),
        layers=layers,
        attention_bias=bool(_get(config, "attention_bias", False)),
        mlp_bias=bool(_get(config, "mlp_bias", False)),
    )


def _get(config: Any, key: str, default: Any = None) -> Any:
    return config.get(key, default) if isinstance(config, dict) else getattr(config, key, default)

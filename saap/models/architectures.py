"""Names of the modules of each family, per ``model_type``: a small table that pruning and export share.

A family differs from LLaMA in names (packed matrices, more norms) and in what its forward pass does (windows, layers
without rotary embedding, scales, caps). Both are data: a row of the table, and :class:`Traits` read from a config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from typing import Any, Literal, Protocol

import msgspec

from saap.base.errors import UserError
from saap.models.config_fields import built
from saap.models.shape import ATTENTION, CONV, DELTA, FFN, MIXERS, BlockKind, DeltaHeads, LayerSizes, ModelShape


class ModelConfig(Protocol):
    """The fields of a transformers config that are read by name; :func:`field_of` reads those of some families only."""

    model_type: str
    max_position_embeddings: int
    bos_token_id: int | None

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """The ids that end a text."""

    def update(self, config_dict: dict[str, object]) -> None:
        """Set fields."""


@dataclass(frozen=True)
class DeltaNames:
    """Modules of a gated delta net (arXiv 2412.06464), relative to a decoder layer; two of them are parameters."""

    mixed: str = "linear_attn.in_proj_qkv"  # queries, keys and values, in this order
    kernel: str = "linear_attn.conv1d"  # of the convolution that these pass
    gate: str = "linear_attn.in_proj_z"  # what the output is multiplied by
    beta: str = "linear_attn.in_proj_b"  # how much of a value is written
    decay: str = "linear_attn.in_proj_a"  # how much of the state is kept
    log_decay: str = "linear_attn.A_log"
    decay_bias: str = "linear_attn.dt_bias"
    norm: str = "linear_attn.norm"  # of each value head
    output: str = "linear_attn.out_proj"


@dataclass(frozen=True)
class PerLayerNames:
    """Modules of embeddings that each layer has of its own (Gemma 3n and 4), relative to the model and to a layer.

    What a layer looks up, and what a matrix makes of the embedding, enter its residual stream behind a gate.
    """

    table: str = "model.embed_tokens_per_layer"  # of all layers, side by side
    matrix: str = "model.per_layer_model_projection"
    norm: str = "model.per_layer_projection_norm"
    gate: str = "per_layer_input_gate"  # of a layer
    output: str = "per_layer_projection"
    output_norm: str = "post_per_layer_input_norm"
    scale: str = "layer_scalar"  # a number that the residual stream is multiplied by behind all blocks


@dataclass(frozen=True)
class Architecture:
    """One family: module names, relative to a decoder layer or to the model, and what sets it apart from LLaMA.

    A norm whose name is empty is one that the family does not have.
    """

    family: str = "Llama"  # the stem of its classes in transformers
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    head_gate: str = ""  # a number for each query head, whose sigmoid its output is multiplied by
    gated_queries: bool = False  # behind each head's query stand rows whose sigmoid its output is multiplied by
    packed_qkv: str = ""  # one module that holds query, key and value, in this order; empty where they are three
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    packed_gate_up: str = ""  # one module that holds gate and up, in this order; empty where they are two
    down: str = "mlp.down_proj"
    conv_in: str = (
        ""  # of a short convolution: input gate, output gate and signal, in this order; empty: no such layers
    )
    conv_kernel: str = ""
    conv_out: str = ""
    delta: DeltaNames | None = None  # None: no gated delta nets
    per_layer: PerLayerNames | None = None  # None: no embeddings for each layer
    attention_norm: str = "input_layernorm"  # of what the block reads that mixes tokens, a convolution too
    query_norm: str = ""  # before the rotary embedding
    key_norm: str = ""
    qk_norm_spans_heads: bool = False  # one norm over all heads, not one for each
    attention_post_norm: str = ""  # of what the block adds to the residual stream
    ffn_norm: str = "post_attention_layernorm"
    ffn_post_norm: str = ""
    offset_norms: bool = False  # the norms' weights are stored minus one
    value_norm: bool = False  # values are normed head by head, without weights
    attention_scale: float | None = None  # factor of the attention scores; None: as the config says
    scaled_embedding: bool = False  # the embedding is multiplied by the square root of the hidden size
    qkv_bias: bool = False  # query, key and value always have a bias, the output projection never
    activation: str = "silu"
    activation_key: str = "hidden_act"
    window: Literal["none", "all", "by layer"] = "none"  # which layers slide, or convolve; by ``config.layer_types``
    local_rotary: bool = False  # sliding layers have a rotary base of their own
    skips_rotary: bool = False  # ``config.no_rope_layers`` is 0 for the layers without rotary embedding
    multipliers: bool = False  # factors of the embedding, attention scores, what a block adds, and logits
    ffn_width: str = "intermediate_size"  # the field of the config
    epsilon: str = "rms_norm_eps"  # of the norms; the field of the config
    stored_as: tuple[str, str] = ("", "")  # part of a module's name in files, where transformers renames it, and here
    always: tuple[str, ...] = ()  # fields of the config that no graph of ours does without
    switched_rotary: bool = False  # ``config.position_embedding_type`` is rope, or there is no rotary embedding at all
    transformers: int = 4  # the oldest release whose classes are what we read
    gguf: Literal["no", "any widths", "one width"] = "no"  # whether llama.cpp holds it, and FFNs of many widths

    @property
    def qkv(self) -> tuple[str, ...]:
        """The modules whose rows, stacked, are queries, keys and values, and gates of heads where there are."""
        if self.packed_qkv:
            return (self.packed_qkv,)
        return (self.query, self.key, self.value, *([self.head_gate] if self.head_gate else []))

    @property
    def modules(self) -> frozenset[str]:
        """All modules and parameters that a layer may have."""
        owners = [self, *(names for names in (self.delta, self.per_layer) if names is not None)]
        named = (getattr(owner, each.name) for owner in owners for each in fields(owner))
        return frozenset(name for name in named if isinstance(name, str) and name)

    @property
    def gate_up(self) -> tuple[str, ...]:
        """The modules whose rows, stacked, are gate and up."""
        return (self.packed_gate_up,) if self.packed_gate_up else (self.gate, self.up)

    @property
    def matrices(self) -> dict[str, tuple[str, ...]]:
        """The modules of each matrix of a graph: ``qkv``, ``o``, ``gate_up``, ``down``, of a convolution its two."""
        parts = {"qkv": self.qkv, "o": (self.output,), "gate_up": self.gate_up, "down": (self.down,)}
        if self.delta is not None:
            parts |= {"delta_in": (self.delta.mixed, self.delta.gate), "delta_out": (self.delta.output,)}
        if self.per_layer is not None:
            parts |= {"layer_gate": (self.per_layer.gate,), "layer_out": (self.per_layer.output,)}
        return parts | ({"conv_in": (self.conv_in,), "conv_out": (self.conv_out,)} if self.conv_in else {})

    @property
    def tables(self) -> tuple[str, ...]:
        """The embedding, the head, and what else is looked up by token, by their names in the model."""
        return (self.embedding, self.head, *([self.per_layer.table] if self.per_layer else []))

    @property
    def floats(self) -> tuple[str, ...]:
        """Matrices that stay floats, as they are small and what they make is touchy."""
        return (self.delta.beta, self.delta.decay) if self.delta else ()

    def is_float(self, module: str) -> bool:
        """Whether a module, by its name in a layer or in the model, stays floats."""
        return module.endswith(self.floats)

    @property
    def rare(self) -> BlockKind | None:
        """The kind of block that mixes tokens in layers without attention; None where there are no such layers."""
        return CONV if self.conv_in else DELTA if self.delta else None

    @property
    def beside(self) -> dict[str, tuple[str, ...]]:
        """Parameters that are no matrices but have their rows: names, and the roles whose rows they have, stacked."""
        if self.delta is None:
            return {self.conv_kernel: ("signal",)} if self.conv_in else {}
        decay = (self.delta.log_decay, self.delta.decay_bias)
        return {self.delta.kernel: DELTA.roles[:3]} | dict.fromkeys(decay, ("delta_decay",))

    def writing(self, kind: BlockKind) -> str:
        """Return the module by which a kind of block writes to the residual stream; empty where there is none."""
        delta = self.delta.output if self.delta else ""
        return {ATTENTION: self.output, CONV: self.conv_out, DELTA: delta, FFN: self.down}[kind]

    def norm_before(self, kind: BlockKind) -> str:
        """Return the norm in front of a kind of block; empty where it has none."""
        return self.ffn_norm if kind is FFN else self.attention_norm

    def kind_of(self, module: str, sizes: LayerSizes) -> BlockKind | None:
        """Return the block that a module belongs to, by its name in a layer of these sizes; None: to no block."""
        if self.per_layer and module in asdict(self.per_layer).values():
            return None
        for kind in MIXERS:
            writes = self.writing(kind)
            if writes and f"{module}.".startswith(writes.rpartition(".")[0] + "."):
                return kind
        return sizes.mixer if module in (self.attention_norm, self.attention_post_norm) else FFN


SLIM = "saap_"  # before the name of a family in the model type of a model whose layers differ
MOST_SIZE, MOST_LAYERS, MOST_VOCABULARY = 1 << 20, 1 << 12, 1 << 24  # beyond these a config is damaged
MOST_POSITIONS = 1 << 24
DTYPES = ("float32", "float16", "bfloat16", "auto")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "su", "llama3", "proportional")
MOST_NUMBER = 1e15  # of a base, an epsilon or a factor
MOST_KERNEL = 64  # tokens that a short convolution sees
LAYER_TYPES = {CONV: "conv", DELTA: "linear_attention"}  # of layers that mix tokens otherwise than by attention
POSITIONS = 2048  # what transformers takes where a LLaMA config names none
UNREAD = "time_step_limit"  # of state space layers; it holds an infinity, for which JSON has only ways around
PER_LAYER = ("layer_types", "no_rope_layers")  # fields of a config that have one entry for each layer
QUERY_NORM, KEY_NORM = "self_attn.q_norm", "self_attn.k_norm"
LLAMA = Architecture(gguf="any widths")
LFM2 = Architecture(  # short convolutions, and attention in every third layer or so
    "Lfm2", final_norm="model.embedding_norm", output="self_attn.out_proj", gate="feed_forward.w1",
    up="feed_forward.w3", down="feed_forward.w2", conv_in="conv.in_proj", conv_kernel="conv.conv",
    conv_out="conv.out_proj", attention_norm="operator_norm", query_norm="self_attn.q_layernorm",
    key_norm="self_attn.k_layernorm", ffn_norm="ffn_norm", window="by layer", epsilon="norm_eps", transformers=5,
    gguf="one width",
)  # fmt: skip
FAMILIES = {
    "llama": LLAMA,
    "mistral": Architecture("Mistral", window="all", gguf="any widths"),
    "qwen2": Architecture("Qwen2", qkv_bias=True, window="by layer", gguf="any widths"),
    "qwen3": Architecture(
        "Qwen3", query_norm=QUERY_NORM, key_norm=KEY_NORM, window="by layer", gguf="one width"
    ),
    "phi3": Architecture(
        "Phi3", packed_qkv="self_attn.qkv_proj", packed_gate_up="mlp.gate_up_proj", window="all"
    ),
    "gemma3_text": Architecture(
        "Gemma3", query_norm=QUERY_NORM, key_norm=KEY_NORM, attention_post_norm="post_attention_layernorm",
        ffn_norm="pre_feedforward_layernorm", ffn_post_norm="post_feedforward_layernorm", offset_norms=True,
        scaled_embedding=True, activation="gelu_pytorch_tanh", activation_key="hidden_activation", window="by layer",
        local_rotary=True,
    ),
    "smollm3": Architecture("SmolLM3", window="by layer", skips_rotary=True),
    "olmo2": Architecture(
        "Olmo2", attention_norm="", query_norm=QUERY_NORM, key_norm=KEY_NORM, qk_norm_spans_heads=True,
        attention_post_norm="post_attention_layernorm", ffn_norm="", ffn_post_norm="post_feedforward_layernorm",
    ),
    "granite": Architecture("Granite", multipliers=True, gguf="one width"),
    "granitemoehybrid": Architecture(  # Granite 4: its dense models are layers of attention and the shared MLP
        "GraniteMoeHybrid", packed_gate_up="shared_mlp.input_linear", down="shared_mlp.output_linear",
        ffn_width="shared_intermediate_size", window="by layer", multipliers=True, switched_rotary=True, transformers=5,
        gguf="one width",
    ),
    "ministral3": Architecture("Ministral3", window="all", transformers=5, gguf="any widths"),
    "lfm2": LFM2,
    "lfm3": replace(
        LFM2, family="Lfm3", gguf="no", output="self_attn.o_proj", query_norm=QUERY_NORM, key_norm=KEY_NORM,
        head_gate="self_attn.g_proj", stored_as=("self_attn.gate_proj", "self_attn.g_proj"),
        attention_post_norm="post_operator_norm", ffn_post_norm="post_ffn_norm", local_rotary=True,
        always=("use_sandwich_norm", "use_attention_gate"),
    ),
    "gemma4_text": Architecture(  # embeddings for each layer; the last layers read keys and values of earlier ones
        "Gemma4", query_norm=QUERY_NORM, key_norm=KEY_NORM, attention_post_norm="post_attention_layernorm",
        ffn_norm="pre_feedforward_layernorm", ffn_post_norm="post_feedforward_layernorm", scaled_embedding=True,
        value_norm=True, attention_scale=1.0, activation="gelu_pytorch_tanh", activation_key="hidden_activation",
        window="by layer", local_rotary=True, per_layer=PerLayerNames(), transformers=5, gguf="any widths",
    ),
    "qwen3_5_text": Architecture(  # gated delta nets, and attention in every fourth layer
        "Qwen3_5", query_norm=QUERY_NORM, key_norm=KEY_NORM, gated_queries=True, delta=DeltaNames(), offset_norms=True,
        window="by layer", transformers=5, gguf="one width",
    ),
}  # fmt: skip
ARCHITECTURES = FAMILIES | {SLIM + name: row for name, row in FAMILIES.items()}


@dataclass(frozen=True)
class LayerTraits:
    """Properties of one layer's attention."""

    window: int = 0  # tokens that a token sees, itself included; 0 is all before it
    rotary: Literal["default", "local"] | None = "default"  # its tables; local: of a second base, where layers slide


@dataclass(frozen=True)
class Traits:
    """Properties of a model's forward pass beyond its sizes."""

    layers: tuple[LayerTraits, ...]
    activation: str = "silu"  # of the gate, by its name in transformers
    attention_scale: float | None = None  # factor of the attention scores; None is 1 / sqrt(head_dim)
    embedding_scale: float | None = None  # factor of the embedding; None is 1
    residual_scale: float | None = None  # factor of what a block adds to the residual stream; None is 1
    logit_scale: float | None = None  # factor of the logits; None is 1
    logit_cap: float | None = None  # c in logits = c * tanh(logits / c); None caps nothing
    vocabulary: str = ""  # the tokens that the head predicts, as ``slim_vocabulary`` of the config; empty: all


class UnknownFamilyError(UserError):
    """A family that is not in the table; ``nearest`` by its name, empty where none is like it."""

    def __init__(self, name: object, *, strange: str = "") -> None:
        self.name, self.nearest = name, next(iter(get_close_matches(str(name), FAMILIES, n=1)), "")
        nearest = f" (the nearest that is: {self.nearest}{strange})" if self.nearest else ""
        super().__init__(
            f"model type {name!r} is not supported{nearest}; supported: {', '.join(FAMILIES)}; docs/extending.md says "
            "how to add one"
        )


def architecture_of(config: object) -> Architecture:
    """Return the table row for a transformers config (or its dict). Raises UserError: not supported."""
    name = field_of(config, "model_type")
    if name is None:
        raise UserError("config.json has no model_type: it is damaged, or of no transformers model")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnknownFamilyError(name)
    architecture = ARCHITECTURES[name]
    activation = field_of(config, architecture.activation_key, architecture.activation)
    if activation != architecture.activation:
        raise UserError(f"activation {activation!r} is not supported; supported: {architecture.activation}")
    if architecture.transformers > 4:
        _require_transformers5(f"{name} models are", "install transformers 5")
    # Older ones overlook ``rope_parameters`` and turn by another base, without a word.
    if isinstance(config, dict) and config.get("rope_parameters") and "rope_theta" not in config:
        instead = "install transformers 5, or write rope_theta and rope_scaling there"
        _require_transformers5("config.json (it has rope_parameters) is", instead)
    return architecture


def _require_transformers5(what: str, instead: str) -> None:
    if int((installed := _installed_transformers()).split(".")[0]) < 5:
        raise UserError(f"{what} of transformers 5, which {installed} misreads: {instead}")


@cache  # 6 ms a call, and a config is read ten times for an export
def _installed_transformers() -> str:
    return version("transformers")


def shape_of(config: object) -> ModelShape:
    """Read a model's sizes from its config (or the config's dict).

    Raises UserError: a size that no model has, or query heads that are not a multiple of their layer's KV heads.
    """
    architecture = architecture_of(config)
    config = with_defaults(config)
    _check_dense(config, architecture)
    heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    layers = _slim_layers(config, architecture) or _whole_layers(config, architecture)
    if architecture.per_layer:
        layers = _of_gemma4(config, layers, whole=not field_of(config, "slim_layers"))
    for index, sizes in enumerate(layers):
        if sizes.query_heads and (not sizes.kv_heads or sizes.query_heads % sizes.kv_heads):
            raise UserError(
                f"layer {index} has {sizes.query_heads} query heads on {sizes.kv_heads} KV heads: must be a multiple; "
                "mend config.json"
            )
    quant = field_of(config, "slim_quant")
    head_dim = _count(config, "head_dim", max(1, hidden // heads))
    return ModelShape(
        hidden=hidden,
        head_dim=head_dim,
        vocab=_count(config, "vocab_size", most=MOST_VOCABULARY),
        tied=bool(quant.get("tied") if isinstance(quant, dict) else field_of(config, "tie_word_embeddings", False)),
        layers=layers,
        attention_bias=architecture.qkv_bias or bool(field_of(config, "attention_bias", False)),
        mlp_bias=bool(field_of(config, "mlp_bias", False)),
        output_bias=not architecture.qkv_bias,
        qk_norm="all" if architecture.qk_norm_spans_heads else "head" if architecture.query_norm else "none",
        norms=bool(architecture.attention_norm) + bool(architecture.attention_post_norm),
        added_bias=bool(field_of(config, "slim_bias")),
        conv_kernel=_kernel(config, architecture),
        conv_bias=bool(architecture.conv_in and field_of(config, "conv_bias")),
        gate_width=1 if architecture.head_gate else head_dim if architecture.gated_queries else 0,
        gated_queries=architecture.gated_queries,
        delta=_delta_heads(config) if architecture.delta else None,
        sources=_sources(config) if architecture.per_layer else (),
        per_layer=_per_layer(config) if architecture.per_layer else 0,
        head_tokens=_head_tokens(config),
    )


def _check_dense(config: object, architecture: Architecture) -> None:
    """Refuse mixtures of experts, and models without a part that their family always has."""
    if off := [key for key in architecture.always if not field_of(config, key)]:
        raise UserError(f"config.json has {off[0]} off, which is not supported; supported: {off[0]} true")
    experts = field_of(config, "num_local_experts")
    if field_of(config, "enable_moe_block"):
        experts = field_of(config, "num_experts") or "some"
    if experts:
        raise UserError(f"the model is a mixture of {experts} experts, which is not supported; supported: dense models")


def _slim_layers(config: object, architecture: Architecture) -> tuple[LayerSizes, ...]:
    """Read ``slim_layers``; empty in a dense model. Raises UserError: other than whole sizes of each layer."""
    if not (slim := field_of(config, "slim_layers")):
        return ()
    rare = architecture.rare
    names = ("query_heads", "kv_heads", "ffn", *(rare.sizes if rare else ()))
    try:
        entries = msgspec.convert(slim, list[list[object]])
    except ValueError:
        entries = [[]]
    if any(len(entry) != len(names) for entry in entries):
        raise UserError(f"config.json has slim_layers that are not {len(names)} sizes per layer: make it again")
    checked = ([_checked("slim_layers", size, 0) for size in entry] for entry in entries)
    return tuple(msgspec.convert(dict(zip(names, entry, strict=True)), LayerSizes) for entry in checked)


def _whole_layers(config: object, architecture: Architecture) -> tuple[LayerSizes, ...]:
    """Read the sizes of layers that are whole, by the kind of each."""
    heads = _count(config, "num_attention_heads")
    attends = LayerSizes(heads, _count(config, "num_key_value_heads", heads), _ffn_width(config, architecture))
    other = LayerSizes(ffn=attends.ffn)
    if architecture.conv_in:
        other = replace(other, conv=_count(config, "hidden_size"))
    elif architecture.delta:
        other = replace(other, delta=_count(config, "linear_num_key_heads"))
    count = _count(config, "num_hidden_layers", most=MOST_LAYERS)
    return tuple(other if _is_rare(config, architecture, index) else attends for index in range(count))


def _head_tokens(config: object) -> int:
    from saap.models.modeling_slim import unpacked_ids

    packed = head_vocabulary(config)
    return len(unpacked_ids(packed, _count(config, "vocab_size", most=MOST_VOCABULARY))) if packed else 0


def _of_gemma4(config: object, layers: tuple[LayerSizes, ...], whole: bool) -> tuple[LayerSizes, ...]:
    """Layers with their own head sizes and KV heads, and which of them read those of others.

    ``whole``: they have the widths of the config, some of them twice.

    Raises UserError: keys that are values, or layers that were left out.
    """
    own, sharing = config.per_layer_config, config.kv_sharing_modes  # type: ignore[attr-defined]
    if len(layers) != len(sharing):
        raise UserError(f"slim_layers has {len(layers)} entries for {len(sharing)} layers: make it again")
    if field_of(config, "attention_k_eq_v"):
        raise UserError("config.json has attention_k_eq_v on: keys that are values are not supported")
    result, dim = [], _count(config, "head_dim")
    for index, sizes in enumerate(layers):
        reads = sharing[index] == "reuse"
        if not sizes.query_heads:
            result.append(sizes)
            continue
        if whole:
            doubled = reads and bool(field_of(config, "use_double_wide_mlp"))
            sizes = replace(sizes, kv_heads=own[index].num_key_value_heads, ffn=sizes.ffn * (2 if doubled else 1))
        head_dim = 0 if own[index].head_dim == dim else own[index].head_dim
        result.append(replace(sizes, head_dim=head_dim, reads=reads))
    return tuple(result)


def _sources(config: object) -> tuple[int, ...]:
    """Return each layer's source of keys and values: the last layer of its kind with its own, or itself."""
    sharing = config.kv_sharing_modes  # type: ignore[attr-defined]
    last: dict[object, int] = {}
    sources = []
    for index, kind in enumerate(entries_of(config, "layer_types")):
        if sharing[index] != "reuse":
            last[kind] = index
        sources.append(last[kind])
    return tuple(sources)


def _per_layer(config: object) -> int:
    """Elements of a token's embedding for each layer. Raises UserError: none, or a vocabulary of its own."""
    if not field_of(config, "hidden_size_per_layer_input"):
        raise UserError("config.json has no embeddings for each layer (hidden_size_per_layer_input), as others expect")
    if field_of(config, "vocab_size_per_layer_input") != field_of(config, "vocab_size"):
        raise UserError("config.json has vocab_size_per_layer_input other than vocab_size, which is not supported")
    return _count(config, "hidden_size_per_layer_input")


def _kernel(config: object, architecture: Architecture) -> int:
    """Tokens that a convolution sees; 0 where the family has none."""
    if architecture.rare is None:
        return 0
    return _count(config, "linear_conv_kernel_dim" if architecture.delta else "conv_L_cache", most=MOST_KERNEL)


def _delta_heads(config: object) -> DeltaHeads:
    """Sizes of a key head and of its value heads. Raises UserError: value heads that are not a multiple."""
    keys, values = _count(config, "linear_num_key_heads"), _count(config, "linear_num_value_heads")
    if values % keys:
        raise UserError(
            f"config.json has {values} value heads on {keys} key heads (linear_num_value_heads): must be a multiple; "
            "get it again"
        )
    key, value = (_count(config, f"linear_{part}_head_dim") for part in ("key", "value"))
    return DeltaHeads(key, value, values // keys)


def _ffn_width(config: object, architecture: Architecture) -> int:
    """Channels of a dense feed-forward block; LFM2 takes two thirds of what its config says, in whole multiples."""
    width = _count(config, architecture.ffn_width)
    if not field_of(config, "block_auto_adjust_ff_dim"):
        return width
    width = int(2 * width / 3)
    if field_of(config, "block_ffn_dim_multiplier") is None:
        return width
    step = _count(config, "block_multiple_of")
    return -(-int(number_of(config, "block_ffn_dim_multiplier") * width) // step) * step


def _is_rare(config: object, architecture: Architecture, index: int) -> bool:
    """Whether a layer mixes tokens otherwise than by attention."""
    kinds = entries_of(config, "layer_types") if architecture.rare else []
    return bool(kinds) and kinds[index] == LAYER_TYPES.get(architecture.rare)  # type: ignore[arg-type]


def head_vocabulary(config: object) -> str:
    """Read ``slim_vocabulary`` of a config, empty where the head has all tokens. Raises UserError: damaged."""
    packed = field_of(config, "slim_vocabulary")
    if packed is None:
        return ""
    import zlib

    from saap.models.modeling_slim import unpacked_ids

    try:
        if not isinstance(packed, str):
            raise ValueError("it is no text")
        unpacked_ids(packed, _count(config, "vocab_size", most=MOST_VOCABULARY))
    except (ValueError, zlib.error) as error:
        raise UserError(f"config.json has a slim_vocabulary that cannot be read ({error}): make it again") from None
    return packed


def traits_of(config: object) -> Traits:
    """Read what a model's forward pass does from its config (or the config's dict).

    ``attn_logit_softcapping`` of Gemma 3 is not read: transformers, whose numbers are the reference, does not apply it.

    Raises UserError: the config asks for something that no graph of ours computes.
    """
    architecture = architecture_of(config)
    config = with_defaults(config)
    if field_of(config, "use_bidirectional_attention") not in (None, False, "vision"):  # text sees what is before it
        raise UserError("attention in both directions is not supported; supported: causal attention")
    scalar, cap = "query_pre_attn_scalar", "final_logit_softcapping"
    count = _count(config, "num_hidden_layers", most=MOST_LAYERS)
    traits = Traits(
        layers=tuple(_layer_traits(config, architecture, i) for i in range(count)),
        activation=architecture.activation,
        attention_scale=number_of(config, scalar) ** -0.5 if field_of(config, scalar) else architecture.attention_scale,
        embedding_scale=_count(config, "hidden_size") ** 0.5 if architecture.scaled_embedding else None,
        logit_cap=number_of(config, cap) if field_of(config, cap) else None,
        vocabulary=head_vocabulary(config),
    )
    if not architecture.multipliers:
        return traits
    return replace(
        traits,
        embedding_scale=number_of(config, "embedding_multiplier"),
        attention_scale=number_of(config, "attention_multiplier"),
        residual_scale=number_of(config, "residual_multiplier"),
        logit_scale=1 / number_of(config, "logits_scaling"),
    )


def _layer_traits(config: object, architecture: Architecture, index: int) -> LayerTraits:
    kinds = entries_of(config, "layer_types")
    kind = kinds[index] if architecture.window == "by layer" and kinds else "full_attention"
    known = ("full_attention", "sliding_attention", *([LAYER_TYPES[architecture.rare]] if architecture.rare else []))
    if kind not in known:
        raise UserError(f"layers of type {kind!r} are not supported; supported: {', '.join(known)}")
    if architecture.rare and kind == LAYER_TYPES[architecture.rare]:
        return LayerTraits(rotary=None)
    slides = architecture.window == "all" or kind == "sliding_attention"
    rotary: Literal["default", "local"] | None = "local" if architecture.local_rotary and slides else "default"
    if architecture.skips_rotary and not entries_of(config, "no_rope_layers")[index]:
        rotary = None
    if architecture.switched_rotary and field_of(config, "position_embedding_type") != "rope":
        rotary = None
    window = _count(config, "sliding_window") if slides and field_of(config, "sliding_window") else 0
    return LayerTraits(window, rotary)


def entries_of(config: object, key: str) -> list[object]:
    """Return a field with one entry for each layer; empty where the config does without."""
    entries = field_of(config, key)
    return entries if isinstance(entries, list) else []


def with_defaults(config: object) -> object:
    """Turn a config's dict into its family's config object, which has the defaults; LLaMA's is complete."""
    if not isinstance(config, dict) or architecture_of(config) is LLAMA:
        return config
    return config_object(config)


def config_object(config: dict[str, Any]) -> object:
    """Build the config object of a supported family. Raises UserError: names the field that transformers refuses."""
    from transformers import CONFIG_MAPPING

    readable = {key: value for key, value in config.items() if key != UNREAD}
    return built(CONFIG_MAPPING[config["model_type"].removeprefix(SLIM)], readable, "config.json")


def positions_of(config: object) -> int:
    """Tokens that a model holds, by default what transformers takes.

    Beyond ``original_max_position_embeddings`` Ministral 3 scales its queries by the position, which no operator of
    attention does; before it the factor is 1, so that much is offered.

    Raises UserError: the config names something else than a number.
    """
    config = with_defaults(config)
    most = _count(config, "max_position_embeddings", POSITIONS, MOST_POSITIONS)
    rope = rope_of(config)
    if not rope.get("llama_4_scaling_beta"):
        return most
    return min(most, _count(rope, "original_max_position_embeddings", most, MOST_POSITIONS))


def epsilon_of(config: object) -> float:
    """Return the number that the norms add to a mean square."""
    config = with_defaults(config)
    return number_of(config, architecture_of(config).epsilon)


def layer_count(config: object) -> int:
    return _count(with_defaults(config), "num_hidden_layers", most=MOST_LAYERS)


def check_config(config: Mapping[str, object]) -> None:
    """Refuse what no model has, before transformers makes anything of it.

    Raises UserError: names the field, its value and what is allowed.
    """
    if (quantized := config.get("quantization_config")) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UserError(
            f"the model is quantised already ({str(method)[:40]}): give the float model that it was made of; "
            "saap quantises it itself"
        )
    # Counts first: transformers' config objects make a list entry for each layer and each label.
    for key, least, most in (
        ("num_hidden_layers", 0, MOST_LAYERS), ("num_labels", 0, MOST_SIZE), ("vocab_size", 1, MOST_VOCABULARY),
        ("max_position_embeddings", 1, MOST_POSITIONS), ("hidden_size", 1, MOST_SIZE), ("head_dim", 2, MOST_SIZE),
        ("num_attention_heads", 1, MOST_SIZE), ("num_key_value_heads", 1, MOST_SIZE),
    ):  # fmt: skip
        if config.get(key) is not None:
            _checked(key, config[key], least, most)
    head_dim = config.get("head_dim")
    if isinstance(head_dim, int) and head_dim % 2:
        raise UserError(
            f"config.json has head_dim {head_dim}: rotary embedding turns pairs, so it is even; get it again"
        )
    multipliers = (key for key in config if key.endswith("_multiplier"))
    for key in ("rms_norm_eps", "norm_eps", "rope_theta", "rope_local_base_freq", *multipliers):
        if config.get(key) is not None:
            number_of(config, key)
    rope = {} if config.get("rope_scaling") is None else config["rope_scaling"]
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if isinstance(rope, dict) and kind in ("linear", "dynamic", "yarn", "llama3"):
        number_of(rope, "factor")
    for key, value, allowed in (
        ("dtype", config.get("dtype"), DTYPES),
        ("torch_dtype", config.get("torch_dtype"), DTYPES),
        ("rope_scaling of type", kind, ROPE_TYPES),
    ):
        if value is not None and value not in allowed:
            raise UserError(f"config.json has {key} {str(value)[:40]!r}: must be {', '.join(allowed)}; get it again")


def _count(config: object, key: str, default: int | None = None, most: int = MOST_SIZE) -> int:
    """Return a size of the config, or its default."""
    value = field_of(config, key)
    return _checked(key, default if value is None and default is not None else value, 1, most)


def _checked(key: str, value: object, least: int, most: int = MOST_SIZE) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(
            f"config.json has {key} {str(value)[:40]!r}: must be a whole number of {least} to {most}; get it again"
        )
    return value


def number_of(config: object, key: str) -> float:
    """Return a positive number of the config."""
    value = field_of(config, key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MOST_NUMBER:
        raise UserError(
            f"config.json has {key} {str(value)[:40]!r}: must be a number above 0 up to {MOST_NUMBER:g}; get it again"
        )
    return float(value)


def field_of(config: object, key: str, default: object = None) -> object:
    """Return a field of a transformers config or of its dict.

    Where layers differ in it, transformers gives no value of a config by name: then it is the one of the other layers.
    """
    if isinstance(config, dict):
        return config.get(key, default)
    own = vars(config) if hasattr(config, "__dict__") else {}
    return own[key] if key in own else getattr(config, key, default)


def rope_of(config: object) -> dict[str, object]:
    """Return the parameters of the rotary embedding, by transformers 5's name or that of 4; empty where it is plain."""
    rope = field_of(config, "rope_parameters") or field_of(config, "rope_scaling")
    return rope if isinstance(rope, dict) else {}

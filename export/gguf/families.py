"""Families for which llama.cpp has an architecture of its own, as the fields and tensors of a GGUF file.

llama.cpp reads sizes by layer in few of them: ``gemma4`` takes an FFN width for each layer; ``granite``, ``lfm2``,
``qwen3`` and ``qwen35`` have one for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from export.gguf.layout import Family, GGUFSource, Tensor, model_type_of, vector
from export.gguf.rotary import RotaryFields, partial_factors
from export.gguf.tensors import BLOCK, take_columns
from saap.base.errors import UserError
from saap.models.architectures import PerLayerNames, entries_of, field_of, number_of, rope_of, traits_of
from saap.models.checkpoint import transformers_config
from saap.models.shape import ATTENTION, CONV, DELTA, LayerSizes

Field = int | float | bool | list[int] | list[bool]


GRANITE = Family("granite", pairs=True, biases=True)
OWN = {
    "granite": GRANITE,
    "granitemoehybrid": GRANITE,  # without experts and state spaces it is the same
    "qwen3": Family("qwen3"),
    "lfm2": Family("lfm2", output_norm="token_embd_norm"),
    "qwen3_5_text": Family("qwen35", ffn_norm="post_attention_norm"),
    "gemma4_text": Family("gemma4", attention_post_norm="post_attention_norm", ffn_post_norm="post_ffw_norm"),
}


class FamilySource(GGUFSource):
    """A model directory of such a family."""

    def __init__(self, directory: Path, kind: str | None, head_kind: str | None) -> None:
        super().__init__(directory, kind, head_kind)
        self._family = OWN[model_type_of(directory)]
        self._uneven, self._traits = self.architecture.gguf == "any widths", traits_of(self.config)
        self._full = transformers_config(directory)
        self._check_alike()

    @property
    def uniform(self) -> bool:
        return False

    @classmethod
    def holds(cls, model_type: str) -> bool:
        return model_type in OWN

    def _check_alike(self) -> None:
        """Raise UserError: sizes that differ, in an architecture that has one for all layers."""
        layers, heads = self.shape.layers, self.shape.delta
        heads_by_layer = [] if self._uneven else layers
        whole: dict[str, set[int]] = {
            "width of the FFN": set() if self._uneven else {sizes.ffn for sizes in layers},
            "number of query heads": {sizes.query_heads for sizes in heads_by_layer if sizes.has(ATTENTION)},
            "number of KV heads": {sizes.kv_heads for sizes in heads_by_layer if sizes.has(ATTENTION)},
            "number of channels of a convolution": {sizes.conv for sizes in layers if sizes.has(CONV)},
            "number of key heads of a delta net": {sizes.delta for sizes in layers if sizes.has(DELTA)},
        }
        for what, values in whole.items():
            if len(values) > 1:
                raise UserError(
                    f"llama.cpp's {self.name!r} has one {what} for all layers, and {self.directory} has "
                    f"{min(values)} to {max(values)}: prune it with --for llama.cpp, or export it for the cpu target"
                )
        if not self._family.biases and (bias := next((name for name in self.names if name.endswith(".bias")), "")):
            raise UserError(
                f"llama.cpp's {self.name!r} has no biases, and {self.directory} has {bias}: "
                "export it for the cpu target"
            )
        mixing = [sizes.mixer for sizes in layers if any(map(sizes.has, (ATTENTION, CONV, DELTA)))]
        if not self._uneven and (len(mixing) < len(layers) or 0 in whole["width of the FFN"]):
            raise UserError(
                f"llama.cpp's {self.name!r} has all blocks in every layer, and {self.directory} lacks some: prune it "
                "with --for llama.cpp, or export it for the cpu target"
            )
        if heads is not None and heads.key != heads.value:
            raise UserError(
                f"llama.cpp's 'qwen35' has values as wide as keys, and {self.directory} has {heads.value} and "
                f"{heads.key}: export it for the cpu target"
            )
        attends = next(sizes for sizes in layers if sizes.has(ATTENTION))
        kinds = [bool(layer.window) for layer in self._traits.layers]
        own = [slides for index, slides in enumerate(kinds) if not self._reads(index)]
        if self.name == "gemma4" and len(own) < len(layers) and own[-2:] != [True, False]:
            raise UserError(
                "llama.cpp's 'gemma4' reads keys and values of the last layer with full attention and of a sliding one "
                f"right before it, and {self.directory} has others there: export it for the cpu target"
            )
        if self.name == "lfm2":
            hidden, conv = self.shape.hidden, max(whole["number of channels of a convolution"], default=0)
            if attends.query_heads * self.shape.head_dim != hidden or conv not in (0, hidden):
                raise UserError(
                    f"llama.cpp's 'lfm2' has heads and channels that fill the hidden size of {hidden}: prune with "
                    "--for llama.cpp, or export it for the cpu target"
                )

    def counts(self) -> dict[str, list[int]]:
        if self.name == "qwen35":  # which has one number of them
            return {}
        layers = [self._written_sizes(sizes, index) for index, (_, sizes) in enumerate(self.layers)]
        keys = {"attention.head_count_kv": [sizes.kv_heads for sizes in layers]}
        return keys | ({"attention.head_count": [sizes.query_heads for sizes in layers]} if self._uneven else {})

    def _written_sizes(self, sizes: LayerSizes, index: int) -> LayerSizes:
        """Return a layer's sizes in the file: one head of zeros for each KV head where the attention was pruned."""
        if not self._uneven or sizes.has(ATTENTION):
            return sizes
        read = self.shape.layers[self.shape.sources[index]]
        groups = read.kv_heads or 1
        return replace(sizes, query_heads=groups, kv_heads=groups)

    def _reads(self, index: int) -> bool:
        """Whether a layer reads keys and values of an earlier one, or did before its attention went."""
        return bool(self.shape.sources) and self.shape.sources[index] != index

    @property
    def _kinds(self) -> list[object]:
        return entries_of(self._full, "layer_types")

    def fields(self, rotary: RotaryFields) -> Mapping[str, Field]:
        """Build the architecture's own fields."""
        layers = [sizes for _, sizes in self.layers]
        attends = next(sizes for sizes in layers if sizes.has(ATTENTION))
        common: dict[str, Field] = {
            **({} if self._uneven else {"attention.head_count": attends.query_heads}),
            "feed_forward_length": [s.ffn or BLOCK for s in layers] if self._uneven else layers[0].ffn,
        }
        if self.name == "lfm2":
            return common | {"shortconv.l_cache": self.shape.conv_kernel}
        if self.name == "qwen35":
            return common | self._of_delta(layers)
        if self.name == "granite":
            return common | self._of_granite()
        return common | self._of_gemma4(layers) if self.name == "gemma4" else common

    def _of_delta(self, layers: list[LayerSizes]) -> dict[str, Field]:
        heads = self.shape.delta
        assert heads is not None, "the family has delta nets"
        keys = next((sizes.delta for sizes in layers if sizes.has(DELTA)), 0)
        share = number_of(rope_of(self._full), "partial_rotary_factor")
        turned = int(self.shape.head_dim * share)
        sections = field_of(rope_of(self._full), "mrope_section")
        # Pairs take turns among three axes, whose positions are the same for text; each pair has to be of one of them.
        split = (
            list(map(int, sections)) if isinstance(sections, list) else [(turned // 2 + 2 - n) // 3 for n in range(3)]
        )
        return {
            "attention.head_count_kv": max(sizes.kv_heads for sizes in layers),
            "ssm.conv_kernel": self.shape.conv_kernel, "ssm.state_size": heads.key, "ssm.group_count": keys,
            "ssm.time_step_rank": keys * heads.values, "ssm.inner_size": keys * heads.width,
            "attention.recurrent_layers": [sizes.has(DELTA) for sizes in layers],
            "rope.dimension_count": turned, "rope.dimension_sections": [*split, 0],
        }  # fmt: skip

    def _of_granite(self) -> dict[str, Field]:
        traits = self._traits
        factors: dict[str, Field | None] = {
            "attention.scale": traits.attention_scale, "embedding_scale": traits.embedding_scale,
            "residual_scale": traits.residual_scale, "logit_scale": traits.logit_scale and 1 / traits.logit_scale,
        }  # fmt: skip
        turns = traits.layers[0].rotary is not None
        return {name: value for name, value in factors.items() if value} | {"rope.scaling.finetuned": turns}

    def _of_gemma4(self, layers: list[LayerSizes]) -> dict[str, Field]:
        kinds, wide = self._kinds, max(map(self.shape.head_of, layers))
        narrow, bases = self.shape.head_dim, rope_of(self._full)
        fields: dict[str, Field] = {
            "attention.shared_kv_layers": sum(map(self._reads, range(len(layers)))),
            "attention.sliding_window": max(layer.window for layer in self._traits.layers),
            "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in kinds],
            "embedding_length_per_layer_input": self.shape.per_layer,
            "attention.key_length_swa": narrow, "attention.value_length_swa": narrow,
            "attention.key_length": wide, "attention.value_length": wide,
            "rope.dimension_count": wide, "rope.dimension_count_swa": narrow,
        }  # fmt: skip
        for name, kind in (("freq_base", "full_attention"), ("freq_base_swa", "sliding_attention")):
            fields[f"rope.{name}"] = number_of(field_of(bases, kind), "rope_theta")
        if self._traits.logit_cap is not None:
            fields["final_logit_softcapping"] = self._traits.logit_cap
        return fields

    def _tables(self, rope_factors: torch.Tensor | None) -> Iterator[Tensor]:
        arch, hidden, vocab = self.architecture, self.shape.hidden, self.shape.vocab
        yield from super()._tables(partial_factors(self._full, self.shape) if self.name == "gemma4" else rope_factors)
        if (names := arch.per_layer) is not None:
            width = len(self.layers) * self.shape.per_layer
            yield self._matrix("per_layer_token_embd", names.table, vocab, width, self.head_kind)
            yield self._matrix("per_layer_model_proj", names.matrix, width, hidden, self.kind)
            yield self._norm("per_layer_proj_norm", names.norm)

    def _layer(self, prefix: str, block: str, sizes: LayerSizes, index: int) -> Iterator[Tensor]:
        yield from super()._layer(prefix, block, sizes, index)
        if (names := self.architecture.per_layer) is not None:
            yield from self._per_layer(prefix, block, names)

    def _mix(self, prefix: str, block: str, sizes: LayerSizes) -> Iterator[Tensor]:
        mixers = {ATTENTION: self._heads, CONV: self._convolution, DELTA: self._delta_net}
        return mixers[sizes.mixer](prefix, block, sizes)

    def _no_attention(self, block: str, index: int) -> Iterator[Tensor]:
        """Zeros in the place of an attention that went; only ``gemma4`` has layers of their own and none without."""
        kind, hidden, sizes = (
            self._kinds[index],
            self.shape.hidden,
            self._written_sizes(self.shape.layers[index], index),
        )
        dim = max(map(self.shape.head_of, self.shape.layers)) if kind == "full_attention" else self.shape.head_dim
        norms = {"attn_norm": hidden, "attn_q_norm": dim, self._family.attention_post_norm: hidden}
        yield self._zeros(block + "attn_q", sizes.query_heads * dim, hidden)
        if not self._reads(index):
            yield self._zeros(block + "attn_k", sizes.kv_heads * dim, hidden)
            yield self._zeros(block + "attn_v", sizes.kv_heads * dim, hidden)
            norms["attn_k_norm"] = dim
        yield self._zeros(block + "attn_output", hidden, sizes.query_heads * dim)
        yield from (vector(f"{block}{name}.weight", torch.ones(width)) for name, width in norms.items())

    def _convolution(self, prefix: str, block: str, sizes: LayerSizes) -> Iterator[Tensor]:
        arch, hidden = self.architecture, self.shape.hidden
        yield self._floats(block + "shortconv.conv.weight", prefix + arch.conv_kernel + ".weight", _without_axis)
        yield from self._linear(block + "shortconv.in_proj", prefix + arch.conv_in, 3 * sizes.conv, hidden)
        yield from self._linear(block + "shortconv.out_proj", prefix + arch.conv_out, hidden, sizes.conv)

    def _delta_net(self, prefix: str, block: str, sizes: LayerSizes) -> Iterator[Tensor]:
        names, heads, hidden = self.architecture.delta, self.shape.delta, self.shape.hidden
        assert names is not None and heads is not None, "the family has delta nets"
        value, mixed = sizes.delta * heads.width, sizes.delta * (2 * heads.key + heads.width)
        # llama.cpp repeats the key heads as a whole: all of their first value heads come first, then all second ones.
        turns = torch.arange(sizes.delta * heads.values).view(sizes.delta, heads.values).t().flatten()
        values = (turns[:, None] * heads.value + torch.arange(heads.value)).flatten()
        keys = mixed - value  # and queries
        channels = torch.cat([torch.arange(keys), keys + values])
        yield from self._linear(block + "attn_qkv", prefix + names.mixed, mixed, hidden, channels)
        yield from self._linear(block + "attn_gate", prefix + names.gate, value, hidden, values)
        yield self._floats(
            block + "ssm_conv1d.weight", prefix + names.kernel + ".weight", lambda kernel: kernel[channels, 0]
        )
        yield self._floats(block + "ssm_dt.bias", prefix + names.decay_bias, lambda bias: bias[turns])
        yield self._floats(block + "ssm_a", prefix + names.log_decay, lambda log: -log.exp()[turns])
        yield self._floats(block + "ssm_beta.weight", prefix + names.beta + ".weight", lambda rate: rate[turns])
        yield self._floats(block + "ssm_alpha.weight", prefix + names.decay + ".weight", lambda rate: rate[turns])
        yield self._floats(block + "ssm_norm.weight", prefix + names.norm + ".weight")
        for tensor in self._linear(block + "ssm_out", prefix + names.output, hidden, value):
            yield self._with_columns(tensor, values) if heads.values > 1 else tensor

    def _with_columns(self, tensor: Tensor, order: torch.Tensor) -> Tensor:
        return replace(tensor, load=lambda: take_columns(tensor.load(), order))

    def _per_layer(self, prefix: str, block: str, names: PerLayerNames) -> Iterator[Tensor]:
        hidden, size = self.shape.hidden, self.shape.per_layer
        yield from self._linear(block + "inp_gate", prefix + names.gate, size, hidden)
        yield from self._linear(block + "proj", prefix + names.output, hidden, size)
        yield self._norm(block + "post_norm", prefix + names.output_norm)
        yield self._floats(block + "layer_output_scale.weight", prefix + names.scale)

    def _floats(self, name: str, stored: str, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Tensor:
        """Read a tensor that stays floats."""
        self._written.add(stored)
        values = self.numbers(stored)
        return vector(name, values if change is None else change(values))


def _without_axis(kernel: torch.Tensor) -> torch.Tensor:
    """[channels, 1, tokens] as [channels, tokens]."""
    return kernel[:, 0]


def open_source(directory: Path, kind: str | None, head_kind: str | None) -> GGUFSource:
    """Open a model directory for llama.cpp's architecture of its family.

    Raises UserError: none does, or not with these sizes.
    """
    kinds = FamilySource if FamilySource.holds(model_type_of(directory)) else GGUFSource
    return kinds(directory, kind, head_kind)

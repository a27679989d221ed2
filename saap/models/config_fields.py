"""Types of the fields in ``config.json`` and ``generation_config.json``, as transformers fails late on others."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from saap.base.errors import UserError, first_line

Token = Annotated[int, Meta(ge=-1, lt=1 << 24)]  # -1: some configs' way to say that there is none
Above0 = Annotated[float, Meta(gt=0, le=1e15)]
TYPES: tuple[tuple[str, object, tuple[str, ...]], ...] = (
    ("a token's id", Token, ("bos_token_id", "pad_token_id")),
    ("a token's id or a list of them", Token | list[Token], ("eos_token_id",)),
    ("true or false", bool, (
        "attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache", "do_sample", "use_sliding_window",
    )),
    ("a list of names", list[str], ("architectures", "layer_types")),
    ("a list of numbers", list[float], ("short_factor", "long_factor", "no_rope_layers")),
    ("an object", dict[str, Any], (
        "rope_parameters", "id2label", "label2id", "base_model_tp_plan", "base_model_pp_plan", "attribute_map",
    )),
    ("a name", str, ("rope_type", "tokenizer_class")),
    ("a name without a path: it would be code from the hub", Annotated[str, Meta(pattern=r"^\w+$")], (
        "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    )),
    ("a whole number of at least 0", Annotated[int, Meta(ge=0)], (
        "sliding_window", "top_k", "max_length", "max_new_tokens", "num_beams",
    )),
    ("a number", float, (
        "initializer_range", "attention_dropout", "temperature", "top_p", "min_p", "repetition_penalty",
        "attention_factor", "mscale", "mscale_all_dim",
    )),
    ("a number above 0", Above0, (
        "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
        "original_max_position_embeddings",
    )),
    ("null: it is of models of several parts", None, ("text_config", "text_encoder", "decoder", "generator")),
)  # fmt: skip
ALLOWED = {key: (words, kind) for words, kind, keys in TYPES for key in keys}
MOST_FIELDS = 500  # of a config, that are tried one by one


def check_fields(file: str, document: Mapping[str, object]) -> None:
    """Refuse a field of another type than the table's, also in the objects of rotary embedding.

    Raises UserError: names the file, the field and what is allowed.
    """
    for key, value in document.items():
        words, kind = ALLOWED.get(key, ("", Any))
        try:
            msgspec.convert(value, kind if value is not None else Any)
        except ValueError:
            raise UserError(f"{file} has {key} {str(value)[:40]!r}: must be {words}; get it again") from None
        if isinstance(value, dict) and (key.startswith("rope_") or key.endswith("_attention")):
            check_fields(file, value)


def built(kind: Any, document: dict[str, Any], file: str) -> object:
    """Build an object of a class of transformers.

    Raises UserError: names the first field without which it could be built.
    """
    try:
        return kind.from_dict(document)
    except Exception as error:  # fields fail somewhere in it, each in its own way
        for key in [*document][:MOST_FIELDS]:
            try:
                kind.from_dict({other: value for other, value in document.items() if other != key})
            except Exception:
                continue
            raise UserError(
                f"{file} has {key} {str(document[key])[:40]!r}, which transformers {version('transformers')} does not "
                "take: mend it, or get it again"
            ) from error
        raise UserError(f"{file} cannot be read by transformers ({first_line(error)}): get it again") from error

"""``genai_config.json``, with which onnxruntime-genai runs a graph.

A bundle's is made of its manifest. One that somebody else wrote is read field by field: whatever else it says, such as
a library of operators that genai would load into the process, does not reach genai.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from export.bundle.manifest import DECODE_GRAPH, PREFILL_CHUNK, BundleError, BundleManifest
from export.bundle.small_files import LARGEST_JSON
from saap.base.files import read_whole

GENAI_CONFIG = "genai_config.json"
# The pattern is a block of memory for each length of prompt, much larger where layers differ in width.
_SESSION = {"log_id": "onnxruntime-genai", "provider_options": [], "enable_mem_pattern": False}

Size = Annotated[int, Meta(ge=1, lt=2**31)]
Count = Annotated[int, Meta(ge=0, lt=2**31)]
Name = Annotated[str, Meta(min_length=1, max_length=255)]


Names = dict[Name, Name]  # of a graph's inputs or outputs, by genai's names; ``%d`` stands for the layer


class SlidingWindow(Struct, frozen=True):
    """The cache of a model whose layers see a window only."""

    window_size: Size
    pad_value: int | UnsetType = UNSET
    alignment: str | UnsetType = UNSET
    slide_key_value_cache: bool | UnsetType = UNSET
    slide_inputs: bool | UnsetType = UNSET
    layers: list[Count] | UnsetType = UNSET


class Decoder(Struct, frozen=True):
    """The graph, and the sizes of its cache."""

    filename: Name
    head_size: Size
    hidden_size: Size
    num_attention_heads: Count
    num_key_value_heads: Count
    num_hidden_layers: Count
    inputs: Names
    outputs: Names
    sliding_window: SlidingWindow | UnsetType | None = UNSET
    layer_types: list[str] | UnsetType = UNSET  # where some layers keep states


class Model(Struct, frozen=True, kw_only=True):
    """A decoder-only model as genai describes it."""

    type: Annotated[str, Meta(pattern=r"^[\w.-]{1,40}$")]
    vocab_size: Size
    context_length: Size
    bos_token_id: int | UnsetType = UNSET
    eos_token_id: int | list[int]
    pad_token_id: int | UnsetType = UNSET
    decoder: Decoder


class _File(Struct, frozen=True):
    model: Model


def genai_model(manifest: BundleManifest) -> Model:
    """Describe a bundle's ``model.onnx`` to onnxruntime-genai.

    Layers may differ in their KV heads: genai takes those from the graph's input shapes, and the counts given here
    are the largest ones. ``num_hidden_layers`` counts the layers that have a KV cache, since genai makes one pair of
    ``past_key_values.N`` for each.

    A bundle with short convolutions, or with gated delta nets, is of genai's own type for them, which takes one shape
    for all caches and one for all states; where layers differ in them genai refuses the graph.
    """
    cached, mixing = manifest.kv_layers, manifest.mixing_layers
    types = ("full_attention", "conv", "linear_attention")
    kinds = [types[1 if layer.conv else 2 if layer.delta else 0] for layer in mixing]
    recurs = "linear_attention" in kinds
    states = recurs or "conv" in kinds
    positions = {} if shares_cache(manifest) else {"position_ids": "position_ids"}
    reads = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    writes = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    for kind in (["conv"] if states else []) + (["recurrent"] if recurs else []):
        reads[f"past_{kind}_names"], writes[f"present_{kind}_names"] = f"past_{kind}.%d", f"present_{kind}.%d"
    pad = manifest.eos_token_ids[0] if manifest.eos_token_ids else 0  # nothing is padded in a single stream
    return Model(
        # genai's names for any decoder-only model with these inputs
        type="qwen3_5_text" if recurs else "lfm2" if states else "decoder",
        vocab_size=manifest.vocab_size,
        context_length=manifest.context_length,
        # genai insists on a number; it adds no BOS by itself, the tokenizer's template does.
        bos_token_id=pad if manifest.bos_token_id is None else manifest.bos_token_id,
        eos_token_id=list(manifest.eos_token_ids),
        pad_token_id=pad,
        decoder=Decoder(
            filename=DECODE_GRAPH,
            head_size=manifest.head_dim,
            hidden_size=manifest.hidden_size,
            num_attention_heads=max((layer.query_heads for layer in cached), default=0),
            num_key_value_heads=max((layer.kv_heads for layer in cached), default=0),
            num_hidden_layers=len(mixing),
            inputs={"input_ids": "input_ids", "attention_mask": "attention_mask", **positions, **reads},
            outputs={"logits": "logits", **writes},
            layer_types=kinds if states else UNSET,
        ),
    )


def read_genai_model(directory: Path) -> Model:
    """Read the model's part of somebody else's ``genai_config.json``, and nothing else of it.

    Raises:
        BundleError: names the file, the field and what is allowed.
    """
    path = directory / GENAI_CONFIG
    if not path.is_file():
        raise BundleError(f"no {GENAI_CONFIG} in {directory}: give a bundle, or a folder of genai's model builder")
    try:
        model = msgspec.json.decode(read_whole(path, LARGEST_JSON), type=_File).model
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be used ({error}): make the folder again") from None
    graph = model.decoder.filename
    if Path(graph).name != graph or "\0" in graph or not (directory / graph).is_file():
        raise BundleError(f"{path} names the graph {graph!r}, which is not there: make the folder again")
    return model


def genai_document(model: Model, *, shared: bool = True) -> dict[str, Any]:
    """Build the content of ``genai_config.json``: the model, our session options, and greedy search.

    ``shared``: the graph writes keys and values into the buffers that it reads them from.
    """
    document = msgspec.to_builtins(model)
    document["decoder"] = {"session_options": dict(_SESSION), **document["decoder"]}
    return {"model": document, "search": _greedy(model.context_length, shared)}


def genai_config(manifest: BundleManifest) -> dict[str, Any]:
    """Build the content of a bundle's ``genai_config.json``."""
    return genai_document(genai_model(manifest), shared=shares_cache(manifest))


def shares_cache(manifest: BundleManifest) -> bool:
    """Return whether GroupQueryAttention writes into the cache's buffer; standard operators concatenate the cache."""
    return manifest.target != "portable"


def _greedy(max_length: int, shared: bool) -> dict[str, object]:
    return {
        "chunk_size": PREFILL_CHUNK,
        "do_sample": False,
        "early_stopping": True,
        "max_length": max_length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": shared,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }

"""Writes the files that let other programs run a bundle.

``genai_config.json`` is for onnxruntime-genai, ``config.json`` for optimum's ``ORTModelForCausalLM``. The latter's
batches must not be padded on bundles of the ``cpu`` target: their operator takes padding on the left for text.
``export.generate.ort_model`` has no such limit.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from export.bundle.genai import GENAI_CONFIG, genai_config
from export.bundle.manifest import BundleManifest
from export.bundle.tokenizer import BundleTokenizer
from saap.base.files import write_text
from saap.models.architectures import PER_LAYER, SLIM, entries_of

CONFIG = "config.json"
PROBES = (  # what tokenizers disagree about: spaces, digits, code, other scripts, joined emoji, special tokens
    "The quick brown fox jumps over the lazy dog.",
    " It's I'LL  don't\n\n  two\tspaces\r\n",
    "In 1998: 1234567 x 3.14159, 12:30.",
    "def f(x):\n    return x ** 2  # {'a': [1]}",
    "naïve café, Ελλάδα, 日本語, 👩\u200d👩\u200d👧 🤷🏽",
)


def optimum_config(config: dict[str, object], manifest: BundleManifest) -> dict[str, object] | None:
    """Build the ``config.json`` with which optimum's ``ORTModelForCausalLM`` runs a bundle; None where it cannot.

    optimum takes one KV shape for all layers: ``num_key_value_heads``, and ``hidden_size / num_attention_heads`` as the
    head size (optimum-onnx 0.1.0 reads ``head_dim`` for few model types only). So the layers with attention must have
    equal KV heads, and ``num_attention_heads`` is the number that gives the right quotient, not the one of any layer.
    There is no place for the states of convolutions.
    """
    kv_heads = {layer.kv_heads for layer in manifest.kv_layers}
    if len(kv_heads) != 1 or not manifest.can_forget or manifest.hidden_size % manifest.head_dim:
        return None
    ours = (
        "slim_layers", "slim_quant", "slim_bias", "slim_vocabulary", "auto_map", "quantization_config", "_name_or_path",
    )  # fmt: skip
    cached = [index for index, layer in enumerate(manifest.layers) if layer.query_heads]
    lists = {key: [entries[i] for i in cached] for key in PER_LAYER if (entries := entries_of(config, key))}
    return {
        **{key: value for key, value in config.items() if key not in ours},
        **lists,
        "model_type": str(config["model_type"]).removeprefix(SLIM),
        "num_hidden_layers": len(manifest.kv_layers),
        "num_attention_heads": manifest.hidden_size // manifest.head_dim,
        "num_key_value_heads": kv_heads.pop(),
        "head_dim": manifest.head_dim,
    }


def write_client_files(directory: Path, config: dict[str, object], manifest: BundleManifest) -> BundleManifest:
    """Write what onnxruntime-genai and optimum read, before the manifest hashes the files.

    Returns the manifest, with what is known of genai's tokenizer.
    """
    for name, document in ((GENAI_CONFIG, genai_config(manifest)), (CONFIG, optimum_config(config, manifest))):
        if document is not None:
            write_text(directory / name, json.dumps(document, indent=2) + "\n")
    has_tokenizer = (directory / "tokenizer.json").is_file()
    note = genai_tokenizer_note(directory) if has_tokenizer else "not compared: the model came without tokenizer.json"
    return replace(manifest, lineage={**manifest.lineage, "genai_tokenizer": note})


def genai_tokenizer_note(directory: str | Path) -> str | None:
    """None when onnxruntime-genai's own tokenizer agrees with the bundle's; else one line that says where it does not.

    It loads the tokenizer only, not the model. A bundle with a note still runs in genai: give it ids.
    """
    try:
        import onnxruntime_genai as genai
    except ImportError:
        return "onnxruntime-genai is not installed, so its tokenizer was not compared"
    name = f"onnxruntime-genai {genai.__version__}"
    ours = BundleTokenizer(directory)
    try:
        theirs = genai.Tokenizer(str(directory))
        for text in PROBES:
            ids, expected = [int(token) for token in theirs.encode(text)], ours.encode(text)
            if ids != expected:
                return f"{name} encodes {text!r} as {ids}, not {expected}: give it ids"
            stream = theirs.create_stream()
            pieces = "".join(stream.decode(token) for token in ids)
            if pieces != ours.decode(ids):
                return f"{name} decodes {ids} to {pieces!r}, not {ours.decode(ids)!r}: decode with another tokenizer"
    except RuntimeError as error:  # what its binding raises for a tokenizer that it does not know
        return f"{name} cannot read the tokenizer ({str(error).splitlines()[0]}): give it ids"
    return None

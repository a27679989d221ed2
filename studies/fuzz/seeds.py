"""Valid documents that targets.py starts from; small, so that a change hits something."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure.result import OK, Bandwidth, Measurement, ModelFacts, Result, Sample
from export.bundle.manifest import BundleManifest, LayerSizes

FILES = {"model.onnx": {"bytes": 3, "sha256": "ab" * 32}}
MANIFEST = asdict(
    BundleManifest(
        "cpu", "llama", 320, 96, 16, 256, [LayerSizes(6, 3, 128), LayerSizes(2, 1, 64)], 4, 32, 4, 100_000, 60_000, 200,
        "float32", 1, [2, 0], "1.23", {"method": "saap"}, {"kl": 0.001},
    )
) | {"files": FILES}  # fmt: skip
RECORD: dict[str, Any] = {
    "format": 1, "method": "saap", "files": {"config.json": {"bytes": 2, "sha256": "ab" * 32}},
    "plan": {"asked": {"ratio": 0.2}, "layers": [{"query_heads": [0], "kv_heads": [0], "ffn": [0, 1]}]},
}  # fmt: skip
CONFIGS: tuple[dict[str, Any], ...] = (
    {
        "model_type": "llama", "vocab_size": 320, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "tie_word_embeddings": True,
    },
    {
        "model_type": "slim_llama", "vocab_size": 320, "hidden_size": 96, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16,
        "slim_layers": [[4, 2, 64], [0, 0, 32]],
        "slim_quant": {"bits": 4, "block": 32},
    },
    {
        "model_type": "gemma3_text", "vocab_size": 320, "hidden_size": 96, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
)  # fmt: skip
COSTS: dict[str, Any] = {
    "kind": "saap costs", "schema": 1, "device": {"fingerprint": "abc", "onnxruntime": "1.32.0"}, "depth": 192,
    "model": {"hidden": 576, "head_dim": 64, "vocab": 49152, "bits": 4, "block": 32},
    "threads": [{
        "n_threads": 1, "constant_ms": 100.0, "node_ms": 0.5,
        "attention": [{"query_heads": 9, "kv_heads": 3, "ms": 42.0}, {"query_heads": 3, "kv_heads": 1, "ms": 14.0}],
        "ffn": [{"width": 64, "ms": 5.0}, {"width": 1536, "ms": 40.0}],
    }],
}  # fmt: skip


def _sample(order: int) -> Sample:
    return Sample("2026-01-01T00:00:00+00:00", order, 0.5, [0.2], 0.02, 0.021, [0.01] * 3, 10**8, 10**8, 10**7, 10**7)


_RESULT = Result(
    {"fingerprint": "f" * 16, "cpu_model": "a CPU", "board": None},
    [
        Measurement(name, f"out/{name}", "onnx", "ab" * 32, ModelFacts(1000, 3000, 2000, 10), 8, 3, 1, [0],
                    [_sample(0), _sample(1)], OK)
        for name in ("dense", "slim")
    ],
    [Bandwidth(1, 10**8, [1e10, 1.1e10])], ["saap", "bench"], {"saap": "0.1.0"}, "2026-01-01T00:00:00+00:00",
)  # fmt: skip
RESULT = asdict(_RESULT)
BASELINE = {"baseline": 1, "name": "a", "results": [asdict(_RESULT) | {"measurements": RESULT["measurements"][:1]}]}
QUALITY: dict[str, Any] = {
    "kind": "saap-quality", "version": 1, "reference": None,
    "protocol": {"text": "a.txt", "text_sha256": "a", "tokens_sha256": "b", "tokenizer_sha256": "c", "chunk": 16,
                 "chunks": 3, "stride": 16, "bos": False, "join": "raw", "predictions": 45},
    "rows": [{"name": "a", "parameters": 1000, "bytes": 2000, "nll": 3.0, "perplexity": 20.1,
              "window_nll": [45.0, 46.5, 43.5]}],
    "tasks": [{"model": "a", "task": "piqa", "source": "piqa.jsonl", "sha256": "d", "acc": 0.5, "acc_norm": 0.5,
               "examples": [{"index": index, "target": 0, "loglikelihoods": [-1.0, -2.0], "acc": 1.0, "acc_norm": 1.0}
                            for index in range(3)]}],
}  # fmt: skip
CHATS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"},
                  {"role": "assistant", "content": "c"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "context": "b", "response": "c"},
    {"text": "a b"},
)  # fmt: skip
TOKENIZER: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [{"id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": False, "special": True}],
    "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                          "use_regex": True},
    "post_processor": None, "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
              "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]},
}  # fmt: skip
TOKENIZER_CONFIG: dict[str, Any] = {
    "bos_token": "<s>", "eos_token": {"content": "<s>"}, "added_tokens_decoder": {"0": {"content": "<s>"}},
    "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}",
}  # fmt: skip
TEGRASTATS = (
    b"RAM 2462/7620MB (lfb 2x4MB) SWAP 0/3810MB (cached 0MB) CPU [2%@729,0%@729,off,off] EMC_FREQ 0%@2133 "
    b"GR3D_FREQ 0%@305 cpu@48.2C soc2@46.7C VDD_IN 4660mW/4660mW VDD_CPU_GPU_CV 580mW/580mW",
    b"01-02-2024 10:11:12 RAM 1903/3964MB (lfb 5x4MB) IRAM 0/252kB(lfb 252kB) CPU [9%@102,4%@102] APE 25 PLL@26C",
)


def gguf(place: Path) -> tuple[bytes, ...]:
    """A model of one layer with a tokenizer of four words."""
    from gguf import GGUFWriter

    path = place / "seed.gguf"
    writer = GGUFWriter(path, "llama")
    for key, value in (
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 8),
        ("feed_forward_length", 16),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "b", "ab"])
    writer.add_array("tokenizer.ggml.token_type", [3, 1, 1, 1])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (path.read_bytes(),)


def onnx_graphs() -> tuple[bytes, ...]:
    """Graphs of one tensor of their own and one in a file, the second inside a node."""
    from onnx import TensorProto, helper

    inline, kept = (TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2]) for name in ("a", "b"))
    inline.raw_data = bytes(8)
    kept.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.data"), ("offset", "0"), ("length", "8")):
        kept.external_data.add(key=key, value=value)
    node = helper.make_node("Constant", [], ["c"], value=kept)
    graphs = helper.make_graph([], "g", [], [], [inline, kept]), helper.make_graph([node], "g", [], [], [inline])
    return tuple(helper.make_model(graph).SerializeToString() for graph in graphs)


def safetensors() -> tuple[bytes, ...]:
    """Three tensors."""
    import torch
    from safetensors.torch import save

    tensors = {"a": torch.ones(3, 2), "b.weight": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(0)}
    return (save(tensors, {"format": "pt"}),)


def sealed(place: Path) -> tuple[bytes, ...]:
    """The same with their own sha256."""
    import torch

    from saap.system.sealed_tensors import save_sealed

    save_sealed({"a": torch.ones(3, 2)}, place / "sealed", {"c": "1.0"})
    return ((place / "sealed").read_bytes(),)

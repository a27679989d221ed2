"""Models to export, and what their bundles are held against."""

from math import prod

import numpy as np
import onnx
import onnx_ir as ir
import torch
from support.cuts import cut

from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineOptions
from export.engine.scoring import BundleScorer, empty_past
from saap.models.checkpoint import load_model
from saap.prune.plan import LayerPlan, PrunePlan

IDS = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(5))
UNEVEN = (
    LayerPlan((), (), tuple(range(0, 128, 4))),  # no attention first
    LayerPlan((0, 1, 4, 5), (0, 2), tuple(range(64))),
    LayerPlan((0, 2), (0, 1), ()),  # no FFN last
)
MODELS = {
    "dense": {},
    "untied": {"tie_word_embeddings": False},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                                     "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}  # fmt: skip
WINDOW = 8  # five windows in the 40 tokens
PIECES = (7, 5, 1, 1, 20, 1, 1, 4)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.6,
               "logits_scaling": 2.0}  # fmt: skip
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_scaling": YARN}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral without window": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen2 without window": ("qwen2", {"sliding_window": WINDOW, "tie_word_embeddings": True, "rope_scaling": YARN}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "qwen3 with windows": ("qwen3", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2,
                                     "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3 with partial rotary": ("phi3", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW, "layer_types": SLIDING, "query_pre_attn_scalar": 24,
                               "final_logit_softcapping": 3.0}),
    "gemma3 scaled": ("gemma3_text", {"sliding_window": WINDOW, "layer_types": SLIDING, "attention_bias": True,
                                      "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                                      "tie_word_embeddings": False}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "attention_bias": True, "mlp_bias": True}),
    "smollm3 with windows": ("smollm3", {"no_rope_layers": [0, 1, 1], "use_sliding_window": True,
                                         "sliding_window": WINDOW, "rope_scaling": LLAMA3}),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "olmo2 with groups": ("olmo2", {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16,
                                    "tie_word_embeddings": True, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "granite": ("granite", {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True}),
    "granite tied": ("granite", {"embedding_multiplier": 12.0, "attention_multiplier": 0.015625,
                                 "residual_multiplier": 0.22, "logits_scaling": 0.5, "tie_word_embeddings": True}),
    "granite 4": ("granitemoehybrid", {**MULTIPLIERS, "attention_bias": True}),
    "granite 4 without positions": ("granitemoehybrid", {**MULTIPLIERS, "position_embedding_type": None}),
    "ministral 3": ("ministral3", {"rope_parameters": {**YARN, "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}}),
    "lfm3": ("lfm3", {"layer_types": ["conv", "sliding_attention", "full_attention"], "sliding_window": WINDOW}),
    "gemma4": ("gemma4_text", {"final_logit_softcapping": 3.0, "num_hidden_layers": 4, "num_kv_shared_layers": 2}),
    "gemma4 untied": ("gemma4_text", {"tie_word_embeddings": False, "use_double_wide_mlp": False, "sliding_window": 5}),
    "qwen3.5": ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    "qwen3.5 with one value head": ("qwen3_5_text", {
        "layer_types": ["full_attention", "linear_attention", "linear_attention"], "tie_word_embeddings": True,
        "attention_bias": True, "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 3,
    }),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
    "lfm2 with biases": ("lfm2", {"layer_types": ["full_attention", "conv", "full_attention"], "conv_bias": True,
                                  "conv_L_cache": 4, "tie_word_embeddings": False,
                                  "block_auto_adjust_ff_dim": False}),
}  # fmt: skip


def draw_biases(path):
    model = load_model(path)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)


def model_of(kind, tiny_model, directory):
    path = tiny_model(**MODELS.get(kind, {}))
    if kind == "biased":
        draw_biases(path)
    return path if kind in MODELS else cut(path, directory / "slim", PrunePlan(UNEVEN))


def logits_of(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.numpy()


def tensors_of(bundle):
    graph = ir.load(bundle / "model.onnx").graph
    return {name: value.const_value.numpy() for name, value in graph.initializers.items()}


def bytes_read(bundle):
    """Bytes that every token reads of the weights: of a table that is only looked up in, a row is."""
    looked_up = {"Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding"}
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    sizes = {}
    for tensor in model.graph.initializer:
        place = tuple(entry.value for entry in tensor.external_data if entry.key in ("location", "offset"))
        readers = {node.op_type for node in model.graph.node if tensor.name in node.input}
        if place and not readers <= looked_up:
            name = onnx.TensorProto.DataType.Name(tensor.data_type)
            bits = 4 if "INT4" in name else 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            sizes[place] = prod(tensor.dims) * bits // 8
    return sum(sizes.values())


def largest_differences(bundle, expected):
    """Of a whole prefill, of one in pieces, of one token after the other."""
    yield np.abs(BundleScorer(bundle).logits(IDS.numpy()) - expected).max()
    row, position = IDS[0].numpy(), 0
    decoder, found = OnnxRuntimeEngine(bundle, EngineOptions(1, 48)), []
    for length in PIECES:
        position += length
        found.append(decoder.prefill(row[position - length : position]) - expected[0, position - 1])
    yield np.abs(found).max()
    decoder.rewind(0)
    decoder.prefill(row[:1])
    yield max(np.abs(decoder.step(int(row[i])) - expected[0, i]).max() for i in range(1, len(row)))


def check_standard(bundle):
    for name in ("model.onnx", "scoring.onnx"):
        onnx.checker.check_model(str(bundle / name), full_check=True)
        graph = onnx.load(bundle / name, load_external_data=False)
        assert {n.domain for n in graph.graph.node} <= {"", "ai.onnx"}
        assert {o.domain for o in graph.opset_import} <= {"", "ai.onnx"}


def feed(manifest, ids, mask=None, positions=None):
    mask = np.ones_like(ids) if mask is None else mask
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape) if positions is None else positions
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **empty_past(manifest, len(ids))}

"""Families for which llama.cpp has an architecture of its own: its logits are those of torch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.export_cases import MULTIPLIERS
from support.family_cuts import cut
from support.llama_cpp_run import run
from support.slim_integers import write_integers

from export.gguf.write import export_gguf
from saap.base.errors import UserError
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.prune.plan import PrunePlan, whole_layer

IDS = torch.randint(3, 300, (24,), generator=torch.Generator().manual_seed(3)).tolist()  # beyond a window of 8
KINDS = {
    "qwen3": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_num_value_heads": 3,
                     "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    "granite": {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True},
    "granitemoehybrid": {**MULTIPLIERS, "attention_bias": True, "tie_word_embeddings": False},
    "gemma4_text": {"num_kv_shared_layers": 2, "final_logit_softcapping": 3.0},
}  # fmt: skip


@pytest.fixture(params=KINDS)
def family(request):
    return request.param


@pytest.fixture
def dense(tiny_family, family):
    return tiny_family(family, num_hidden_layers=4, **KINDS[family])


def narrowed(dense, out, widths):
    layers = [whole_layer(sizes) for sizes in shape_of(read_config(dense)).layers]
    cut_layers = (replace(keep, ffn=keep.ffn[:width]) for keep, width in zip(layers, widths, strict=True))
    return cut(dense, out, PrunePlan(tuple(cut_layers)))


def check(directory, out):
    model = load_model(directory)
    export_gguf(directory, out, kind="F32")
    found = run(out, ids=IDS, greedy=16)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([IDS])).logits[0].numpy()
        greedy = model.generate(torch.tensor([IDS]), max_new_tokens=16, do_sample=False, eos_token_id=None)
    most = 2e-2 if found["architecture"] == "gemma4" else 2e-3  # ggml looks GELU up in a table of float16
    assert np.abs(found["logits"] - expected).max() <= most
    assert found["tokens"] == greedy[0, len(IDS) :].tolist()
    return found["architecture"]


def test_llama_cpp_computes_what_torch_does(dense, family, tmp_path):
    names = {"qwen3_5_text": "qwen35", "gemma4_text": "gemma4", "granitemoehybrid": "granite"}
    assert check(dense, tmp_path / "model.gguf") == names.get(family, family)


def test_layers_of_one_width_are_held(dense, family, tmp_path):
    widths = [64] * 4 if family != "gemma4_text" else [64, 32, 128, 0]
    check(narrowed(dense, tmp_path / "slim", widths), tmp_path / "model.gguf")


def test_layers_of_many_widths_are_refused_before_anything_is_written(dense, family, tmp_path):
    if family == "gemma4_text":
        pytest.skip("it has a width for each layer")
    slim = narrowed(dense, tmp_path / "slim", [64, 32, 128, 64])
    with pytest.raises(
        UserError, match=r"one width of the FFN for all layers, and .* has 32 to 128: prune it with --for"
    ):
        export_gguf(slim, tmp_path / "model.gguf", kind="F32")
    assert not (tmp_path / "model.gguf").exists()


def test_fewer_heads_and_no_positions_are_held(tiny_family, tmp_path):
    dense = tiny_family("granitemoehybrid", num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
                        position_embedding_type=None, **MULTIPLIERS)  # fmt: skip
    layers = [whole_layer(sizes) for sizes in shape_of(read_config(dense)).layers]
    fewer = [replace(each, query_heads=(1, 4), kv_heads=(0, 2)) for each in layers]
    slim = cut(dense, tmp_path / "slim", PrunePlan(tuple(fewer)))
    check(slim, tmp_path / "slim.gguf")
    report = export_gguf(write_integers(slim, tmp_path / "tuned"), tmp_path / "tuned.gguf")
    assert {entry.carried for entry in report.tensors.values()} == {1.0} and report.worst_error_carried == 0
    uneven = cut(dense, tmp_path / "uneven", PrunePlan((*layers[:2], fewer[2])))
    with pytest.raises(UserError, match=r"one number of query heads for all layers, and .* has 2 to 6"):
        export_gguf(uneven, tmp_path / "uneven.gguf", kind="F32")


def test_keys_are_read_where_llama_cpp_reads_them(tiny_family, tmp_path):
    path = tiny_family("gemma4_text", num_hidden_layers=4)  # the last layer of its own slides
    with pytest.raises(UserError, match="reads keys and values of the last layer with full attention"):
        export_gguf(path, tmp_path / "model.gguf", kind="F32")


def test_value_heads_may_share_a_key_head(tiny_family, tmp_path):
    several = {**KINDS["qwen3_5_text"], "linear_num_value_heads": 6}
    dense = tiny_family("qwen3_5_text", num_hidden_layers=4, **several)
    check(dense, tmp_path / "dense.gguf")
    layers = [whole_layer(sizes) for sizes in shape_of(read_config(dense)).layers]
    kept = tuple(replace(keep, delta=keep.delta[1:]) for keep in layers)  # the second and third key head
    slim = cut(dense, tmp_path / "slim", PrunePlan(kept))
    check(slim, tmp_path / "slim.gguf")
    report = export_gguf(write_integers(slim, tmp_path / "tuned"), tmp_path / "tuned.gguf")
    assert {entry.carried for entry in report.tensors.values()} == {1.0} and report.worst_error_carried == 0


def test_layers_that_share_keys_have_heads_of_their_own_number_or_none(tiny_family, tmp_path):
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2}
    more = {"num_attention_heads": 6, "num_key_value_heads": 3, "final_logit_softcapping": 2.0}
    dense = tiny_family("gemma4_text", num_hidden_layers=6, **kinds, **more)
    layers = [whole_layer(sizes) for sizes in shape_of(read_config(dense)).layers]
    assert shape_of(read_config(dense)).sources == (0, 1, 2, 3, 2, 3)
    for index, heads in ((0, ()), (1, (0, 4)), (2, (2, 3, 4, 5)), (3, (1, 3, 5)), (4, (2, 4)), (5, ())):
        groups = tuple(sorted({head // 2 for head in heads}))
        facts = {} if heads else {"head_dim": 0, "reads": False}
        layers[index] = replace(layers[index], query_heads=heads, kv_heads=groups, **facts)
    slim = cut(dense, tmp_path / "slim", PrunePlan(tuple(layers)))
    check(slim, tmp_path / "slim.gguf")
    report = export_gguf(write_integers(slim, tmp_path / "tuned"), tmp_path / "tuned.gguf")
    assert {entry.carried for entry in report.tensors.values()} == {1.0} and report.worst_error_carried == 0


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text", "gemma4_text"])
def test_biases_are_refused_where_llama_cpp_has_none(tiny_family, family, tmp_path):
    path = tiny_family(family, num_hidden_layers=4, attention_bias=True, **KINDS[family])
    with pytest.raises(UserError, match=r"has no biases, and .* has model\..*\.bias: export it for the cpu target"):
        export_gguf(path, tmp_path / "model.gguf", kind="F32")


def test_values_of_another_width_than_keys_are_refused(tiny_family, tmp_path):
    path = tiny_family("qwen3_5_text")
    with pytest.raises(UserError, match=r"'qwen35' has values as wide as keys, and .* has 16 and 24"):
        export_gguf(path, tmp_path / "model.gguf", kind="F32")

"""What becomes a GGUF file and what is refused, in one line and with nothing left behind."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import llama_cpp_run
from support.cuts import cut
from support.export_cases import IDS, YARN
from support.gguf_texts import TEXTS

from export import ExportOptions, export
from export.gguf.write import export_gguf
from saap.base.errors import UserError
from saap.models.checkpoint import load_model
from saap.models.resolve import load_tokenizer
from saap.models.shape import LayerSizes
from saap.models.weight_files import weights_hash
from saap.prune.plan import LayerPlan, PrunePlan, whole_layer

SIZES = {
    "vocab_size": 320, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
MINISTRAL = {**YARN, "original_max_position_embeddings": 256, "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}


def family(tiny_model, name, **config):
    """Write a random model of another family with the tiny model's tokenizer."""
    import transformers

    path = tiny_model()
    torch.manual_seed(0)
    fields = getattr(transformers, f"{name}Config")(**SIZES, **config)
    model = getattr(transformers, f"{name}ForCausalLM")(fields)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, mean=float(parameter.dim() == 1))
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("name, config, window", [
    ("Mistral", {"head_dim": 32, "sliding_window": None}, 256),
    ("Mistral", {"sliding_window": 64}, 64),
    ("Qwen2", {}, 256),
    ("Ministral3", {"rope_parameters": MINISTRAL, "sliding_window": None}, 256),
])  # fmt: skip
def test_families_that_compute_as_llama_does(tiny_model, tmp_path, name, config, window):
    path = family(tiny_model, name, **config)
    report = export_gguf(path, tmp_path / "model.gguf", kind="F32")
    context = gguf.GGUFReader(tmp_path / "model.gguf").get_field("llama.context_length").contents()
    assert context == window
    assert len(report.notes) == (window < 256)
    found = llama_cpp_run.run(tmp_path / "model.gguf", ids=IDS[0].tolist())["logits"]
    with torch.inference_mode():
        expected = load_model(path)(input_ids=IDS[:1], use_cache=False).logits[0].numpy()
    assert np.abs(found - expected).max() <= 2e-3


def test_ministral_3_is_written_as_far_as_its_queries_are_not_scaled(tiny_model, tmp_path):
    path = family(tiny_model, "Ministral3", rope_parameters={**MINISTRAL, "original_max_position_embeddings": 64})
    layers = (LayerPlan((0, 1, 4, 5), (0, 2), tuple(range(64))), LayerPlan((), (), tuple(range(0, 128, 4))))
    slim = cut(path, tmp_path / "slim", PrunePlan(layers))
    export_gguf(slim, tmp_path / "model.gguf", kind="F32")
    assert gguf.GGUFReader(tmp_path / "model.gguf").get_field("deci.context_length").contents() == 64
    found = llama_cpp_run.run(tmp_path / "model.gguf", ids=IDS[0].tolist())["logits"]
    with torch.inference_mode():
        expected = load_model(slim)(input_ids=IDS[:1], use_cache=False).logits[0].numpy()
    assert np.abs(found - expected).max() <= 2e-3


def test_the_real_model_cut_unevenly_and_its_tokenizer(real_model, data_dir, tmp_path):
    llama_cpp_run.interpreter()  # skips, where there is none
    whole = whole_layer(LayerSizes(9, 3, 1536))
    layers = [whole] * 6 + [LayerPlan((), (), ())] * 24  # the sizes of all thirty cost seconds and show no more
    layers[0] = LayerPlan((), (), whole.ffn)
    layers[2] = LayerPlan((0, 1, 3, 4), (0, 1), whole.ffn[:1000])
    layers[4] = LayerPlan(whole.query_heads, whole.kv_heads, ())
    path = cut(real_model, tmp_path / "slim", PrunePlan(tuple(layers)))
    export_gguf(path, tmp_path / "model.gguf", kind="F32")
    tokenizer, model = load_tokenizer(real_model), load_model(path)
    ids = tokenizer("The river rose by 12 centimetres, and", return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits[0].numpy()
        tokens = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=2)
    text = (data_dir / "wikitext2_valid_tokens.txt").read_text(encoding="utf-8")[:20_000]
    messages = [{"role": "user", "content": "Why is the sky blue? 蓝 🟦\n"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    texts = [*TEXTS, *text.splitlines(keepends=True), prompt]
    found = llama_cpp_run.run(tmp_path / "model.gguf", ids=ids[0].tolist(), greedy=16, texts=texts)
    assert np.abs(found["logits"] - expected).max() <= 2e-3
    assert found["tokens"] == tokens[0, ids.shape[1] :].tolist()
    assert found["architecture"] == "deci"
    for line, encoded in zip(texts, found["encoded"], strict=True):
        assert encoded == tokenizer(line, add_special_tokens=False).input_ids, line
    assert found["special"] == [1, 2, False] and {0, 2} <= set(found["ends"])
    assert found["template"] == tokenizer.chat_template


def test_where_the_file_comes_from_is_in_it(tiny_model, tmp_path):
    path = tiny_model()
    steps = []
    export_gguf(path, tmp_path / "sub/model.gguf", kind="F16", progress=lambda *step: steps.append(step))
    reader = gguf.GGUFReader(tmp_path / "sub/model.gguf")
    said = {key: reader.get_field(key).contents() for key in ("general.name", "general.license", "saap.model_sha256")}
    assert said == {"general.name": "tiny", "general.license": "apache-2.0", "saap.model_sha256": weights_hash(path)}
    assert steps[0] == ("writing GGUF (tensors)", 0, len(reader.tensors))
    assert steps[-1] == ("writing GGUF (tensors)", len(reader.tensors), len(reader.tensors))


def edit_config(path, **fields):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_weights(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


REFUSED = {
    "another family": (lambda p: edit_config(p, model_type="olmo2"), {}, "'olmo2': GGUF files.*cpu target"),
    "q/k norm by tensor": (
        lambda p: edit_weights(p, lambda t: t.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(16)})),
        {},
        "model.layers.1.self_attn.q_norm.weight, for which llama.cpp's 'llama' architecture has no place",
    ),
    "a tensor missing": (
        lambda p: edit_weights(p, lambda t: t.pop("model.norm.weight")),
        {},
        "has no tensor model.norm.weight",
    ),
    "other sizes": (
        lambda p: edit_config(p, intermediate_size=160),
        {},
        r"blk.0.ffn_gate.weight is \(128, 96\) in the weights and \(160, 96\) by config.json",
    ),
    "rope by length": (
        lambda p: edit_config(p, rope_scaling={"rope_type": "dynamic", "factor": 2.0}, rope_parameters=None),
        {},
        "rope type 'dynamic' cannot be written as GGUF; allowed: default, linear",
    ),
    "type": (lambda p: None, {"kind": "Q4_K"}, "'Q4_K' is not written; allowed: F32, F16, Q8_0, Q4_0, Q4_1"),
    "head type": (lambda p: None, {"head_kind": "4"}, "'4' is not written; allowed: F32"),
}


@pytest.mark.parametrize("break_it, options, message", REFUSED.values(), ids=REFUSED.keys())
def test_refusals_are_one_line_and_leave_nothing(tiny_model, tmp_path, break_it, options, message):
    path = tiny_model()
    break_it(path)
    with pytest.raises(UserError, match=message) as error:
        export_gguf(path, tmp_path / "model.gguf", **options)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


def test_a_hidden_size_of_no_whole_blocks_needs_a_float_type(tiny_model, tmp_path):
    path = tiny_model(hidden_size=80, num_attention_heads=5, num_key_value_heads=5)
    with pytest.raises(UserError, match=r"hidden size of 80, not a multiple of the 32 columns .* choose F16 or F32"):
        export_gguf(path, tmp_path / "model.gguf")
    assert export_gguf(path, tmp_path / "model.gguf", kind="F16").worst_error_rounded <= 2**-11


def test_what_is_there_and_no_gguf_is_not_written_over(tiny_model, tmp_path):
    path, thesis = tiny_model(), tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    with pytest.raises(UserError, match="is not a GGUF file of saap, and is not written over"):
        export(path, ExportOptions(target="gguf"), output=thesis)
    assert thesis.read_text() == "years of work"
    with pytest.raises(UserError, match="is a directory: give the name of a file"):
        export(path, ExportOptions(target="gguf"), output=tmp_path)
    sizes = [export_gguf(path, tmp_path / "model.gguf", kind=kind).bytes for kind in ("F32", "F16")]
    assert sizes[0] > sizes[1] == (tmp_path / "model.gguf").stat().st_size

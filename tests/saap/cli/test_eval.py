"""`saap eval` of what llama.cpp runs."""

from __future__ import annotations

import json

import pytest
from support.command_line import here, refused

from export import ExportOptions, export
from export.gguf.llama_cpp import quantizer
from saap.base.errors import UserError
from saap.models.resolve import load_tokenizer, tokenizer_of_gguf
from saap.text.windows import tokenizer_hash


@pytest.mark.parametrize("vocab", [320, 384])
def test_a_gguf_file_has_the_tokenizer_of_its_model(tiny_model, tmp_path, vocab):
    path = tiny_model(vocab_size=vocab)
    export(path, ExportOptions(target="gguf", bits=16), output=tmp_path / "model.gguf")
    found = tokenizer_of_gguf(tmp_path / "model.gguf")
    assert tokenizer_hash(load_tokenizer(found)) == tokenizer_hash(load_tokenizer(path))
    assert not [*found.glob("*.safetensors")]


def test_zero_shot_tasks_are_not_asked_of_llama_cpp():
    message = refused("eval", "llama.cpp:model.gguf", "--tasks", "piqa", "--task-dir", ".")
    assert "llama.cpp:model.gguf: only ONNX Runtime is asked zero-shot tasks" in message


def test_a_file_in_llama_cpp_is_judged_like_the_others(tiny_model, tmp_path):
    try:
        quantizer()
    except UserError as error:
        pytest.skip(str(error))
    path, judge = tiny_model(), tmp_path / "judge.txt"
    lines = (f"She sold {i} boats in a year that had {i + 3} storms and some wind." for i in range(60))
    judge.write_text("\n".join(lines))
    kinds = {"floats": {"bits": 16}, "q4": {"integers": "llama.cpp"}}
    for name, options in kinds.items():
        export(path, ExportOptions(target="gguf", **options), output=tmp_path / f"{name}.gguf")
    specs = [f"llama.cpp:{tmp_path / name}.gguf" for name in kinds]
    here("eval", *specs, "--reference", path, "--text", judge, "--chunk", "32", "--max-chunks", "3",
         "--json", tmp_path / "q.json")  # fmt: skip
    dense, floats, q4 = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert [floats["name"], q4["name"]] == specs
    assert floats["nll"] == pytest.approx(dense["nll"], abs=2e-3) and floats["kl"] < 1e-3 < q4["kl"]
    assert floats["parameters"] == dense["parameters"] and q4["bytes"] < floats["bytes"]

"""`saap eval` of what llama.cpp runs, and the table of zero-shot tasks."""

import json

import pytest
from support.command_line import here, refused

from export import ExportOptions, export
from export.gguf.llama_cpp import quantizer
from saap.base.errors import UserError
from saap.base.quality import Quality, TaskExample, TaskScore
from saap.cli.eval import show_tasks
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


def test_five_tasks_of_two_models_fit_a_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names, models = ("boolq", "piqa", "hellaswag", "winogrande", "arc_challenge"), ("out/dense-int4", "out/slim-int4")
    scores = tuple(
        TaskScore(model, task, "a file", "ab", 10042, 0.643, 0.0112, None if task == "boolq" else 0.5, 0.02,
                  (TaskExample(0, 0, ()),) * 10042)
        for model in models for task in names
    )  # fmt: skip
    show_tasks(Quality(None, None, (), scores))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if any(line.split()[:1] == [name] for name in names)]
    assert [row[:2] for row in rows] == [[task, model] for task in names for model in models]
    assert rows[0][2:] == ["10042", "64.3%", "+-", "1.1", "-"]
    assert rows[2][2:] == ["10042", "64.3%", "+-", "1.1", "50.0%", "+-", "2.0"]
    assert "out/dense-int4 52.9%, out/slim-int4 52.9%" in " ".join(" ".join(lines).split())


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

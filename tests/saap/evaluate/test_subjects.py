"""Bundles and engines that are named like on the command line, from Python."""

import pytest

from export import ExportOptions, export
from saap.base.errors import UserError
from saap.evaluate import EvalOptions, evaluate
from saap.evaluate.subjects import subject_of


@pytest.fixture
def bundle(tiny_model, tmp_path):
    export(tiny_model(), ExportOptions(engines=("onnxruntime", "openvino"), parity="none"), output=tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_bundle_is_evaluated_in_the_engine_that_is_named(bundle, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr("export.engine.fastest.fastest_engine", lambda *_, **__: "openvino")
    (tmp_path / "text.txt").write_text("\n".join(f"She sold {i} boats in a year of {i + 3} storms." for i in range(60)))
    notes = Notes()
    models = [bundle, f"{bundle}@onnxruntime", f"{bundle}@openvino", f"{bundle}@fastest"]
    options = EvalOptions(chunk=32, max_chunks=3)
    quality = evaluate(models, options, text=tmp_path / "text.txt", progress=notes)
    first, named, other, fastest = quality.rows
    assert [row.name for row in quality.rows] == list(map(str, models))
    assert first.nll == named.nll and other.nll == fastest.nll == pytest.approx(first.nll, abs=0.02)
    assert f"evaluation text: {tmp_path / 'text.txt'}" in notes


class Notes(list):
    note = list.append

    def __call__(self, label, done, total):
        pass


def test_what_only_gives_logits_is_asked_nothing_else(bundle, tiny_model):
    for models in ([f"{bundle}@openvino"], [tiny_model(), "llama.cpp:model.gguf"]):
        with pytest.raises(UserError, match=r"(@openvino|model.gguf): only ONNX Runtime is asked zero-shot tasks"):
            evaluate(models, EvalOptions(tasks=("piqa",)))
        with pytest.raises(UserError, match="only ONNX Runtime is given prompts"):
            evaluate(models, EvalOptions(answers=2))


def test_an_engine_that_nobody_knows_is_refused(bundle):
    with pytest.raises(UserError, match="there is no engine 'nonsense'"):
        subject_of(f"{bundle}@nonsense")

"""A vocabulary that is trimmed for reading, too: one that any client has, whose ids are places among the kept words."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import llama_cpp_run
from support.exported import export_bundle

from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineOptions
from export.gguf.write import export_gguf
from export.write import SPELT
from saap.base.errors import UserError
from saap.evaluate.evaluation import evaluate
from saap.evaluate.options import EvalOptions
from saap.evaluate.subjects import Bundle
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.models.modeling_slim import unpacked_ids
from saap.models.record import read_record
from saap.models.resolve import load_tokenizer
from saap.prune.options import PruneOptions
from saap.prune.pruning import prune
from saap.prune.renumber import named_ids
from saap.prune.vocabulary import Chosen, choose_words, trim
from saap.quantize.bundle_size import bundle_size
from saap.text.closed_words import forest_of
from saap.text.documents import EVALUATION_SAMPLE, documents_of, load_documents, samples_of
from saap.text.encoding import writing_tokenizer
from saap.tune.options import TuneOptions
from saap.tune.teacher import Question, StudentWords, check_same_vocabulary, teacher_targets
from saap.tune.tuning import tune, tuning_text

SENTENCES = ["the quick brown fox jumps over the lazy dog, and the cat sat on the mat " * 40] * 6


@pytest.fixture
def chosen(tiny_tokenizer):
    document = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    forest = forest_of(document, 320, {310})
    return Chosen(tuple(forest.kept([0] * 320, len(forest.least) + 12)), 320, 0.01, "dice", input=True)


@pytest.fixture(params=[True, False])
def models_of(request, tiny_model, chosen, tmp_path):
    """(dense, slim), with a tied table and without."""
    dense = tiny_model(tie_word_embeddings=request.param)
    (dense / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 310], "suppress_tokens": [5], "max_new_tokens": 7})
    )
    return dense, trim(dense, chosen, tmp_path / "slim")


def test_it_is_a_plain_model_of_the_kept_words(models_of, chosen, tmp_path):
    dense, slim = models_of
    words, config = list(chosen.words), read_config(slim)
    assert config["model_type"] == "llama" and config["vocab_size"] == len(words) and "slim_vocabulary" not in config
    told = json.loads((slim / "generation_config.json").read_text())
    assert told == {"eos_token_id": [words.index(2), words.index(310)], "suppress_tokens": [words.index(5)],
                    "max_new_tokens": 7}  # fmt: skip
    reads, before = load_tokenizer(slim), writing_tokenizer(dense)
    assert reads.eos_token_id == words.index(before.eos_token_id)
    ids = reads("the quick brown fox")["input_ids"]
    assert reads.decode(ids) == "the quick brown fox" and len(ids) > len(before("the quick brown fox")["input_ids"])
    rows = torch.tensor([ids])
    with torch.inference_mode():
        found = load_model(slim)(input_ids=rows).logits
        expected = load_model(dense)(input_ids=torch.tensor(words)[rows]).logits[..., words]
    assert torch.equal(found, expected)
    manifest = export_bundle(slim, tmp_path / "bundle", bits=32, ids=rows)
    logits = OnnxRuntimeEngine(tmp_path / "bundle", EngineOptions(1, 64)).prefill(rows[0].numpy())
    assert np.abs(logits - found[0, -1].numpy()).max() < 1e-4
    assert manifest.vocab_size == len(words) and not manifest.words
    export_bundle(slim, tmp_path / "portable", bits=32, target="portable", ids=rows)
    export_gguf(slim, tmp_path / "model.gguf", kind="F32")
    ran = llama_cpp_run.run(tmp_path / "model.gguf", ids=ids, texts=["the quick brown fox"])
    assert ran["encoded"] == [ids] and np.abs(ran["logits"] - found[0].numpy()).max() < 1e-3


def test_a_bundle_knows_how_long_its_tokens_are(tiny_model, chosen, tmp_path):
    dense = tiny_model()
    head = trim(dense, Chosen(chosen.words, 320, 0.01, "dice"), tmp_path / "head")
    lengths = [export_bundle(path, tmp_path / f"b{n}", bits=32).spelling for n, path in enumerate((dense, head))]
    text = samples_of("evaluation").text[:SPELT]
    for each, path in zip(lengths, (dense, head), strict=True):
        assert each.text == EVALUATION_SAMPLE
        assert each.characters_per_token == len(text) / len(writing_tokenizer(path)(text)["input_ids"])
    assert lengths[1].characters_per_token < lengths[0].characters_per_token


def test_its_file_is_as_large_as_was_planned(models_of, chosen, tmp_path):
    dense, _ = models_of
    for name, words in (("input", chosen), ("head", Chosen(chosen.words, 320, 0.01, "dice"))):
        slim = trim(dense, words, tmp_path / name)
        manifest = export_bundle(slim, tmp_path / f"{name}-bundle", bits=4)
        config = read_config(slim)
        planned = bundle_size(config, 4, 32).total(shape_of(config))
        assert manifest.files["model.onnx.data"].bytes == planned


def test_pruned_and_tuned_by_the_dense_model(tiny_model, chosen, tmp_path):
    dense = tiny_model()
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES))
    ids = torch.randint(3, 300, (24, 32), generator=torch.Generator().manual_seed(1))
    result = prune(dense, PruneOptions(max_params=120_000), output=tmp_path / "slim", calibration=ids, words=chosen)
    record = read_record(tmp_path / "slim")
    assert unpacked_ids(record["vocabulary"]["kept"], 320).tolist() == list(chosen.words)
    assert result.achieved["parameters"] == shape_of(read_config(tmp_path / "slim")).parameters <= 120_000
    assert record["plan"]["planned"]["parameters"] == result.achieved["parameters"]
    options = TuneOptions(tokens=2048)
    rows, _ = tuning_text(tmp_path / "slim", options, dense, text)
    assert int(rows.ids.max()) < len(chosen.words)
    tune(tmp_path / "slim", options, output=tmp_path / "tuned", data=text, teacher=dense)
    assert read_record(tmp_path / "tuned")["vocabulary"] == record["vocabulary"]
    targets = teacher_targets(dense, rows.ids, Question(k=4, words=StudentWords.of(tmp_path / "tuned")))
    tokens, logprobs = targets.batch(0, 2)
    with torch.inference_mode():
        words = torch.tensor(chosen.words)
        logits = load_model(dense)(input_ids=words[rows.ids[:2]]).logits[:, :-1, words]
    expected = logits.log_softmax(-1)
    assert (expected.gather(-1, tokens) - logprobs).abs().max() < 5e-3
    other = tiny_model("other", vocab_size=400)
    with pytest.raises(UserError, match="a teacher must have the student's vocabulary"):
        check_same_vocabulary(tmp_path / "slim", other)


def test_a_head_learns_from_words_that_it_has(tiny_model, chosen, tmp_path):
    dense, text = tiny_model(), tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES))
    slim = trim(dense, Chosen(chosen.words, 320, 0.01, "dice"), tmp_path / "slim")
    rows, _ = tuning_text(slim, TuneOptions(tokens=2048), dense, text)
    assert rows.ids.shape == (2048 // TuneOptions().length, TuneOptions().length)
    assert set(rows.ids.flatten().tolist()) <= set(chosen.words)


def test_other_segmentations_are_not_compared_by_perplexity(models_of, tmp_path):
    dense, slim = models_of
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES))
    with pytest.raises(UserError, match="token"):
        evaluate([str(dense), str(slim)], EvalOptions(chunk=32, max_chunks=2), text=str(text))


def test_a_trimmed_or_tuned_model_is_not_trimmed(models_of, tiny_model, tmp_path):
    dense, slim = models_of
    documents = documents_of(SENTENCES, "sentences")
    with pytest.raises(UserError, match="has a trimmed vocabulary already"):
        choose_words(slim, "auto", documents)
    tune(dense, TuneOptions(), output=tmp_path / "tuned", data=torch.randint(3, 300, (32, 32)))
    with pytest.raises(UserError, match="holds tuned integers, which cannot be trimmed"):
        choose_words(tmp_path / "tuned", "auto", documents)


def test_tables_of_each_layer_lose_rows_too(tiny_family, chosen, tmp_path):
    dense = tiny_family("gemma4_text")
    slim = trim(dense, chosen, tmp_path / "slim")
    rows = torch.arange(40)[None]
    with torch.inference_mode():
        found = load_model(slim)(input_ids=rows).logits
        expected = load_model(dense)(input_ids=torch.tensor(chosen.words)[rows]).logits[..., list(chosen.words)]
    assert torch.allclose(found, expected, atol=1e-5)


def test_which_fields_name_ids():
    config = {"eos_token_id": [1, 2], "bos_token_id": None, "image_token_index": 9, "suppress_tokens": [4],
              "bad_words_ids": [[5, 6]], "max_new_tokens": 77, "num_tokens": 3, "pad_token_id": -1}  # fmt: skip
    assert named_ids(config) == {1, 2, 9, 4, 5, 6}


@pytest.mark.parametrize("reads_all", [True, False])
def test_text_that_chose_the_words_is_not_what_a_model_is_judged_by(tiny_model, tmp_path, reads_all):
    dense, text = tiny_model(), tmp_path / "text.txt"
    lines = [f"{sentence} number {n} of them\n" for n, sentence in enumerate(SENTENCES)]
    text.write_text("".join(lines))
    documents = load_documents(text, split="calibration")
    slim = trim(dense, replace(choose_words(dense, "290", documents), input=not reads_all), tmp_path / "slim")
    bundle = tmp_path / "bundle"
    export_bundle(slim, bundle, bits=32)
    other = tmp_path / "other.txt"
    other.write_text("a river rose and a bridge was closed " * 60)
    for model in (slim, Bundle("bundle", bundle)):
        with pytest.raises(UserError, match="hold the same text: a model is not evaluated on what"):
            evaluate([model], EvalOptions(chunk=32, max_chunks=2), text=text)
        assert evaluate([model], EvalOptions(chunk=32, max_chunks=2), text=other).rows[0].bits_per_byte


@pytest.mark.parametrize("wrong", [{"kept": "none"}, {"of": 1000}, {"of": 1 << 60}, {"kept": "eNoDAAAAAAE="}])
def test_a_record_whose_words_mean_nothing_is_refused(tiny_model, chosen, tmp_path, wrong):
    dense = tiny_model()
    slim = trim(dense, chosen, tmp_path / "slim")
    record = json.loads((slim / "saap.json").read_text())
    record.pop("checksum", None)
    (slim / "saap.json").write_text(json.dumps({**record, "vocabulary": {**record["vocabulary"], **wrong}}))
    with pytest.raises(UserError, match="has a damaged vocabulary in its record"):
        check_same_vocabulary(dense, slim)

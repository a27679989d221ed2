"""A head that says some words only: what torch, the bundle, tuning and the teacher make of it."""

import json
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.exported import export_bundle
from support.unicode_texts import texts

from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineOptions
from export.engine.scoring import BundleScorer
from export.generate.ort_model import BundleForCausalLM
from export.gguf.write import export_gguf
from saap.base.errors import UserError
from saap.evaluate.evaluation import continuation_model
from saap.evaluate.subjects import Directory
from saap.models.architectures import head_vocabulary, shape_of
from saap.models.checkpoint import load_model, read_config
from saap.models.modeling_slim import GONE, packed_ids, unpacked_ids
from saap.models.resolve import load_tokenizer
from saap.prune.options import PruneOptions
from saap.prune.pruning import prune
from saap.prune.vocabulary import LONGER, TRIED, WORTH, Chosen, choose_words, fewest_words, read_less, rows_of, trim
from saap.text.closed_words import forest_of
from saap.text.documents import load_documents
from saap.text.encoding import head_words_of, long_spelling, writing_tokenizer
from saap.tune.options import TuneOptions
from saap.tune.teacher import Question, StudentWords, teacher_targets
from saap.tune.tuning import tune

WORDS = sorted(random.Random(3).sample(range(320), 150))
CHOSEN = Chosen(tuple(WORDS), 320, 0.01, "dice")
IDS = torch.tensor([WORDS])[:, torch.randint(150, (40,), generator=torch.Generator().manual_seed(1))].repeat(2, 1)


def test_which_words_are_kept_is_packed_into_the_config():
    assert unpacked_ids(packed_ids(WORDS, 320), 320).tolist() == WORDS
    assert head_vocabulary({"vocab_size": 320}) == ""
    for wrong in ("no base64", packed_ids(WORDS, 800), packed_ids([], 320), 7):
        with pytest.raises(UserError, match="slim_vocabulary that cannot be read"):
            head_vocabulary({"vocab_size": 320, "slim_vocabulary": wrong})


def test_sizes_are_numbers_shares_or_the_best():
    assert rows_of("24k", 49152) == 24576 and rows_of("0.5", 100) == 50 and rows_of("auto", 10) is None
    for wrong in ("all", "49152", "0", "-3", "1e400", "nan"):
        with pytest.raises(UserError, match="give a number such as 24k"):
            rows_of(wrong, 49152)


@pytest.fixture(params=[True, False])
def models_of(request, tiny_model, tmp_path):
    """(dense, slim, its bundle), with a tied table and without."""
    dense = tiny_model(tie_word_embeddings=request.param)
    slim = trim(dense, CHOSEN, tmp_path / "slim")
    export_bundle(slim, tmp_path / "bundle", bits=32, ids=IDS)
    return dense, slim, tmp_path / "bundle"


def test_logits_of_kept_words_are_those_of_the_dense_model(models_of):
    dense, slim, bundle = models_of
    with torch.inference_mode():
        expected, found = (load_model(path)(input_ids=IDS).logits for path in (dense, slim))
    assert torch.equal(found[..., WORDS], expected[..., WORDS])
    gone = sorted(set(range(320)) - set(WORDS))
    assert (found[..., gone] == GONE).all()
    by_graph = BundleScorer(bundle).logits(IDS.numpy())
    assert np.abs(by_graph - found.numpy()).max() <= 1e-4
    decoder = OnnxRuntimeEngine(bundle, EngineOptions(1, 64))
    assert np.abs(decoder.prefill(IDS[0].numpy()) - found[0, -1].numpy()).max() <= 1e-4


def test_the_table_is_there_once(tiny_model, tmp_path):
    dense = tiny_model(tie_word_embeddings=True)
    before = export_bundle(dense, tmp_path / "before", bits=4)
    after = export_bundle(trim(dense, CHOSEN, tmp_path / "slim"), tmp_path / "after", bits=4)
    more = after.files["model.onnx.data"].bytes - before.files["model.onnx.data"].bytes
    assert 0 <= more <= 4 * 320 + 2 * 4096, "a row for each word"
    assert after.weight_bytes_per_token < before.weight_bytes_per_token


def test_a_penalty_is_as_in_transformers(models_of):
    _, slim, bundle = models_of
    ids = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2,
               "eos_token_id": None, "repetition_penalty": 1.3}  # fmt: skip
    found = BundleForCausalLM.from_bundle(bundle).generate(ids, **options)
    assert found.tolist() == load_model(slim).generate(ids, **options).tolist()
    assert set(found[:, 9:].flatten().tolist()) <= set(WORDS)


def test_pruned_tuned_and_exported_it_stays_so(tiny_model, tmp_path):
    dense = tiny_model()
    options = PruneOptions(ratio=0.3, group_size=32)
    prune(dense, options, output=tmp_path / "slim", calibration=IDS.repeat(6, 1), words=CHOSEN)
    assert unpacked_ids(read_config(tmp_path / "slim")["slim_vocabulary"], 320).tolist() == WORDS
    tune(tmp_path / "slim", TuneOptions(), output=tmp_path / "tuned", data=IDS.repeat(8, 1), teacher=dense)
    with torch.inference_mode():
        logits = load_model(tmp_path / "tuned")(input_ids=IDS).logits
    assert set((logits > GONE / 2).any(0).any(0).nonzero().flatten().tolist()) == set(WORDS)
    manifest = export_bundle(tmp_path / "tuned", tmp_path / "bundle", dotprod=False, ids=IDS)
    assert manifest.words and manifest.parity.top1_agreement > 0.99


def test_a_teacher_is_asked_for_these_words_alone(tiny_model):
    dense, words = tiny_model(), torch.tensor(WORDS)
    targets = teacher_targets(dense, IDS, Question(k=8, words=StudentWords(words)))
    tokens, logprobs = targets.batch(0, 2)
    assert set(tokens.flatten().tolist()) <= set(WORDS)
    with torch.inference_mode():
        expected = load_model(dense)(input_ids=IDS).logits[:, :-1, words].log_softmax(-1).topk(8).values
    assert (logprobs - expected).abs().max() < 5e-3


def test_what_cannot_hold_it_says_so(models_of, tmp_path):
    _, slim, _ = models_of
    with pytest.raises(UserError, match="which no graph of standard operators does: give --target cpu"):
        export_bundle(slim, tmp_path / "portable", bits=32, target="portable")
    with pytest.raises(UserError, match=r"llama.cpp has one vocabulary .* predicts 150 of 320 tokens"):
        export_gguf(slim, tmp_path / "model.gguf", kind="F32")


def test_what_is_read_and_what_is_said(real_model, tmp_path, monkeypatch):
    """The packaged model's tokenizer, half of it: prompts as before, answers of kept words."""
    monkeypatch.setattr("saap.prune.vocabulary.PREDICTED", 512)
    documents = load_documents(None, split="calibration")
    chosen = choose_words(real_model, "0.5", documents)
    assert len(chosen.words) == 24576 and 0 < chosen.longer < 0.06
    slim = trim(real_model, chosen, tmp_path / "slim")
    reads, says = load_tokenizer(slim), writing_tokenizer(slim)
    assert reads.get_vocab() == load_tokenizer(real_model).get_vocab()
    for text in (*texts(), "Schifffahrtsgesellschaft und Donaudampf"):
        ids = says(text)["input_ids"]
        assert set(ids) <= set(chosen.words)
        assert says.decode(ids) == reads.decode(reads(text)["input_ids"])  # which lacks some bytes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "asked"), [("smollm2-135m", "24k"), ("gemma3-270m", "auto")])
def test_hundred_thousand_strings_and_each_word_can_be_said(name, asked, tmp_path):
    from saap.models.resolve import resolve

    directory = resolve(name)
    chosen = choose_words(directory, asked, load_documents(None, split="calibration"))
    slim = trim(directory, chosen, tmp_path / "slim")
    reads, says = load_tokenizer(slim), writing_tokenizer(slim)
    special, words = set(reads.all_special_ids), np.isin(np.arange(chosen.size), chosen.words)
    spelt = [reads.decode([word]) for word in range(len(reads)) if word not in special]
    for text in (*texts(100_000), *spelt):
        ids = says(text, add_special_tokens=False)["input_ids"]
        assert words[ids].all(), text
        assert says.decode(ids) == reads.decode(reads(text, add_special_tokens=False)["input_ids"]), text


@pytest.fixture
def spelling(tiny_model, tiny_tokenizer, tmp_path):
    """A model whose head says hardly more than bytes."""
    forest = forest_of(json.loads(tiny_tokenizer.backend_tokenizer.to_str()), 320)
    words = tuple(forest.kept([0] * 320, len(forest.least) + 3))
    return trim(tiny_model(), Chosen(words, 320, 0.01, "dice"), tmp_path / "slim")


def test_a_question_is_read_in_all_words_and_answered_in_those_of_the_head(spelling):
    make = continuation_model(Directory("slim", spelling))
    asked = make(None)
    pairs = [("The quick brown fox ", "jumps over"), ("the lazy dog", " sat on the mat")]
    reads, says = load_tokenizer(spelling), writing_tokenizer(spelling)
    for context, tail in pairs:
        ids, answer = asked._encode_pair(context, tail)
        assert ids == reads(context.rstrip())["input_ids"]
        assert set(answer) <= set(unpacked_ids(read_config(spelling)["slim_vocabulary"], 320).tolist())
        assert says.decode(answer) == (context + tail)[len(context.rstrip()) :]
    assert len(says("The quick brown fox")["input_ids"]) > len(reads("The quick brown fox")["input_ids"])
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    model = load_model(spelling)
    for (found, _), (context, tail) in zip(asked.loglikelihood(requests), pairs, strict=True):
        ids, answer = asked._encode_pair(context, tail)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids + answer])).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(ids) + n - 1, word]) for n, word in enumerate(answer))
        assert found == pytest.approx(expected, abs=1e-3)


def test_where_there_is_little_to_gain_auto_says_so(tiny_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and the cat sat on the mat\n" * 400)
    documents = load_documents(text, split="calibration")
    deep = tiny_model("deep", num_hidden_layers=4, intermediate_size=512)
    assert read_less(shape_of(read_config(deep)), 260) < WORTH
    with pytest.raises(UserError, match=r"reads only 0\.\d% less: leave --vocabulary out, or give a number of words"):
        choose_words(deep, "auto", documents)
    assert read_less(shape_of(read_config(tiny_model("flat", num_hidden_layers=1))), 160) > WORTH
    assert len(choose_words(deep, "290", documents).words) == 290


def test_what_the_chat_template_writes_stays(tiny_model, tmp_path):
    dense, text = tiny_model(), tmp_path / "text.txt"
    text.write_text("zzz yyy xxx www " * 2000)
    tokenizer = load_tokenizer(dense)
    around = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True, return_dict=False)
    documents = load_documents(text, split="calibration")
    forest = forest_of(json.loads(tokenizer.backend_tokenizer.to_str()), 320)
    assert set(around) & forest.parts.keys(), "the template has words that could go"
    with pytest.raises(UserError, match=r"cannot be closed: 2\d\d must stay"):
        choose_words(dense, str(len(forest.least)), documents)
    assert set(around) <= set(choose_words(dense, "290", documents).words)


def test_a_text_that_is_spelt_out_is_told(spelling, tiny_model):
    text = "the quick brown fox jumps over the lazy dog " * 20
    ids = writing_tokenizer(spelling)(text)["input_ids"]
    share = len(ids) / len(load_tokenizer(spelling)(text)["input_ids"]) - 1
    assert f"takes {share:.0%} more tokens for this text than the whole one" in long_spelling(spelling, ids)
    assert long_spelling(spelling, writing_tokenizer(spelling)("żółć " * 50)["input_ids"]) is None
    assert long_spelling(tiny_model("other"), ids) is None


def test_auto_takes_the_fewest_words_that_make_a_text_hardly_longer():
    tried = []

    def longer(count, scale):
        tried.append(count)
        return scale * (20_000 - count) ** 2

    assert fewest_words(partial(longer, scale=LONGER / 5_000**2), 10_000, 20_000) == 15_000
    assert len(tried) == TRIED == len(set(tried)) and min(tried) >= 10_000 and max(tried) < 20_000
    assert fewest_words(partial(longer, scale=0.0), 10_000, 20_000) == 10_000
    assert fewest_words(partial(longer, scale=1.0), 10_000, 20_000) is None


def test_a_tokenizer_alone_says_all_its_words(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "alone")
    assert head_words_of(tmp_path / "alone") is None
    assert writing_tokenizer(tmp_path / "alone").get_vocab() == tiny_tokenizer.get_vocab()

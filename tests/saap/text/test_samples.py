"""The texts that ship: what they hold, that they are the default, and what is said where they do not serve."""

import gzip
import hashlib
import json
import re
import shutil

import pytest
from support.command_line import here, last_line

pytest.importorskip("transformers")
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saap.base.errors import UserError
from saap.models.record import read_record
from saap.text import samples
from saap.text.documents import EVALUATION_SAMPLE, TRAINING_SAMPLES, Sequences, documents_of, load_documents
from saap.text.overlap import refuse_overlap
from saap.text.rows import training_rows, tuning_rows
from saap.text.windows import Cut, windows_of

FEW = ("--sequences", 4, "--length", 32)


@pytest.fixture(autouse=True)
def no_other_text(monkeypatch):
    monkeypatch.delenv("SAAP_DATA", raising=False)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Samples that may be damaged."""
    folder = tmp_path / "samples"
    shutil.copytree(samples.FOLDER, folder)
    monkeypatch.setattr(samples, "FOLDER", folder)
    return folder


def thirteen_words(text):
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + 13]) for i in range(len(words) - 12)}


def test_the_test_of_wikitext_2_is_as_it_was_published():
    raw = gzip.decompress((samples.FOLDER / f"{samples.EVALUATION}.gz").read_bytes())
    assert hashlib.sha256(raw).hexdigest() == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    found = load_documents(None, split="evaluation")
    assert found.text.encode() == raw and found.source == EVALUATION_SAMPLE


def test_no_document_shares_thirteen_words_with_the_test_or_with_another():
    seen = thirteen_words(samples.read_sample(samples.EVALUATION))
    texts = load_documents(None, split="calibration").texts
    assert len(texts) > 1400 and len(seen) > 200_000
    for text in texts:
        found = thirteen_words(text)
        assert not found & seen, text[:200]
        seen |= found


def test_articles_name_their_authors_place_and_are_none_of_the_test_s():
    rows = [json.loads(line) for line in samples.read_sample("encyclopedia.jsonl").splitlines()]
    headings = re.findall(r"^ = ([^=\n]+) = $", samples.read_sample(samples.EVALUATION), re.MULTILINE)
    titles = {"".join(filter(str.isalnum, heading.lower())) for heading in headings}
    assert len(titles) >= 60
    for row in rows:
        assert row["url"].startswith("https://en.wikipedia.org/wiki") and row["title"]
        assert "".join(filter(str.isalnum, row["title"].lower())) not in titles


def test_the_notice_names_every_file_and_how_much_it_holds():
    notice = (samples.FOLDER / "NOTICE.md").read_text()
    for name in samples.TRAINING:
        assert f"{len(samples.read_sample(name).splitlines())} " in notice
    assert {f"`{name}.gz`" for name in samples.SHA256} == set(re.findall(r"^\| (`.*?`) \|", notice, re.MULTILINE))


def test_the_samples_take_little_room():
    assert sum((samples.FOLDER / f"{name}.gz").stat().st_size for name in samples.SHA256) <= 1.5e6


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "other"])
def test_a_damaged_sample_is_one_line(copied, damage):
    path = copied / "web.jsonl.gz"
    raw = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        other = gzip.compress(b'{"text": "another"}\n')
        changed = raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:]
        path.write_bytes({"cut": raw[:-100], "changed": changed, "other": other}[damage])
    with pytest.raises(UserError, match=r"the sample .*web\.jsonl\.gz is damaged: install saap again") as caught:
        load_documents(None, split="calibration")
    assert "\n" not in str(caught.value)
    assert load_documents(None, split="evaluation")  # which is whole


def test_what_is_given_comes_before_the_samples(tmp_path, monkeypatch, copied):
    own = tmp_path / "own.txt"
    own.write_text("A text of my own.\n")
    for name in samples.SHA256:  # none is read
        (copied / f"{name}.gz").unlink()
    for split in ("calibration", "tuning", "evaluation"):
        assert load_documents(own, split=split).texts == ("A text of my own.\n",)
    monkeypatch.setenv("SAAP_DATA", str(tmp_path))
    (tmp_path / "wikitext2_test_raw.txt").write_text("Another.\n")
    assert load_documents(None, split="evaluation").texts == ("Another.\n",)


def test_tuning_learns_from_what_calibration_did_not_read(tiny_model):
    path = tiny_model()
    calibration = training_rows(path, None, "calibration", Sequences(16, 64, seed=5))
    tuning = tuning_rows(path, None, Sequences(8, 128, 5, skip=8))
    both = tuning_rows(path, None, Sequences(16, 128, 5))
    assert torch.equal(both.ids.flatten(), torch.cat([calibration.ids.flatten(), tuning.ids.flatten()]))
    assert calibration.source == tuning.source == TRAINING_SAMPLES and calibration.sha256 == tuning.sha256
    assert not torch.equal(calibration.ids, training_rows(path, None, "calibration", Sequences(16, 64, seed=6)).ids)


def test_without_any_text_commands_take_the_samples_and_say_so(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pruned = here("prune", tiny_model(), "-o", "slim", "--ratio", 0.2, *FEW)
    assert f"calibration text: {TRAINING_SAMPLES}\n" in pruned.stderr
    tuned = here("tune", "slim", "-o", "tuned", "--tokens", 128, "--length", 32)
    assert f"tuning text: {TRAINING_SAMPLES}\n" in tuned.stderr
    here("export", "tuned", "-o", "bundle")
    here("eval", "slim", "bundle", "--chunk", 16, "--max-chunks", 2, "--json", "quality.json")
    quality, bundle = (json.loads((tmp_path / name).read_text()) for name in ("quality.json", "bundle/bundle.json"))
    of_samples = load_documents(None, split="calibration").sha256
    assert read_record(tmp_path / "slim")["lineage"]["calibration"]["text_sha256"] == of_samples
    assert read_record(tmp_path / "tuned")["tuning"]["text"]["text_sha256"] == of_samples
    assert bundle["parity"]["sample"] == TRAINING_SAMPLES
    assert quality["protocol"]["text"] == EVALUATION_SAMPLE
    assert all(row["perplexity"] > 1 for row in quality["rows"])

    article = json.loads(samples.read_sample("encyclopedia.jsonl").splitlines()[3])
    (tmp_path / "page.txt").write_text(article["text"])
    for path in ("slim", "tuned", "bundle"):
        done = here("eval", path, "--text", "page.txt", "--chunk", 16, code=2)
        assert f"{path}: {TRAINING_SAMPLES} and page.txt hold the same text" in last_line(done)
    model = tiny_model("longer", max_position_embeddings=512)
    done = here("run", model, "-o", "all", "--text", "page.txt", "--set", "chunk=64", code=2)
    assert f"{TRAINING_SAMPLES} and page.txt hold the same text" in last_line(done)


def test_the_samples_do_not_overlap_and_the_test_as_training_text_does(tmp_path):
    evaluation = load_documents(None, split="evaluation")
    refuse_overlap(load_documents(None, split="tuning"), evaluation)
    (tmp_path / "part.txt").write_text(evaluation.text[100_000:200_000])
    with pytest.raises(UserError, match="hold the same text"):
        refuse_overlap(load_documents(tmp_path / "part.txt", split="tuning"), evaluation)


def of_words(words, unknown=None):
    """A tokenizer that knows some words; others are its unknown token, or vanish."""
    special = {"unk_token": unknown} if unknown else {}
    vocabulary = {word: i for i, word in enumerate([*filter(None, [unknown]), *words])}
    known = models.WordLevel(vocabulary, unk_token=unknown) if unknown else models.BPE(vocabulary, [])
    tokenizer = Tokenizer(known)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize(
    "tokenizer", [of_words(["собака", "бежит"], "<unk>"), of_words(["дом", "лес"])], ids=["unk", "-"]
)
def test_a_tokenizer_that_does_not_know_the_text_is_one_line(tiny_model, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    path = tiny_model()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    tokenizer.save_pretrained(path)
    says = rf"the tokenizer of {re.escape(str(path))} knows \d+ of the first \d+ letters of .* samples?\): give a text"
    for command in (
        ("prune", path, "-o", "slim", "--ratio", 0.2, *FEW),
        ("tune", path, "-o", "tuned", "--tokens", 1024, "--length", 32),
        ("export", path, "-o", "bundle"),
        ("eval", path, "--chunk", 16),
    ):
        assert re.search(says, last_line(here(*command, code=2))), command
    (tmp_path / "own.txt").write_text("собака бежит " * 400)
    if tokenizer.unk_token:
        here("prune", path, "-o", "slim", "--ratio", 0.2, *FEW, "--calibration", "own.txt")


def test_token_ids_that_the_model_does_not_have_are_one_line(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tiny_model(vocab_size=256)
    for command in (
        ("prune", path, "-o", "slim", "--ratio", 0.2, *FEW),
        ("tune", path, "-o", "tuned", "--tokens", 1024, "--length", 32),
        ("export", path, "-o", "bundle"),
        ("eval", path, "--chunk", 16),
    ):
        assert "beyond the vocabulary of 256: copy the tokenizer files of" in last_line(here(*command, code=2)), command


@pytest.mark.parametrize(("chunk", "stride", "most"), [(16, None, 3), (64, 16, 40), (128, None, None)])
def test_no_more_of_a_text_is_read_than_is_needed(tiny_tokenizer, monkeypatch, chunk, stride, most):
    read = []

    def encode(text, tokenizer):
        read.append(len(text))
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    monkeypatch.setattr("saap.text.windows.encode", encode)
    text = samples.read_sample(samples.EVALUATION)[:200_000]
    cut = Cut(chunk, stride=stride, max_chunks=most)
    ids, step = encode(text, tiny_tokenizer), stride or chunk
    starts = list(range(0, len(ids) - chunk + 1, step))[:most]
    read.clear()
    windows = windows_of(documents_of([text], "text"), tiny_tokenizer, cut)
    assert windows.ids.tolist() == [ids[start : start + chunk] for start in starts]
    assert sum(read) == len(text) if most is None else sum(read) < 10_000

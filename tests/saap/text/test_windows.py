"""How a text becomes predictions."""

import copy
import json
import math

import pytest
import torch
from support.command_line import here, last_line

from export.bundle.manifest import read_manifest
from saap.base.errors import UserError
from saap.evaluate.evaluation import evaluate
from saap.evaluate.options import EvalOptions
from saap.evaluate.perplexity import score_models, torch_scorer
from saap.models.checkpoint import load_model
from saap.text.documents import documents_of
from saap.text.encoding import bytes_of_tokens
from saap.text.windows import Cut, joined, tokenizer_hash, windows_of

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "home", "by", "day"]
TEXT = documents_of([" ".join(WORDS[n * n % 12] for n in range(400))], "text")


def test_chunks_lie_side_by_side(tiny_tokenizer):
    windows = windows_of(TEXT, tiny_tokenizer, Cut(16, max_chunks=3))
    ids = tiny_tokenizer(TEXT.text, add_special_tokens=False)["input_ids"]
    assert windows.ids.flatten().tolist() == ids[:48]
    assert windows.counted.all() and windows.protocol.predictions == 3 * 15
    assert (windows.protocol.chunks, windows.protocol.stride, windows.protocol.bos) == (3, 16, False)


def test_with_a_stride_every_token_after_the_first_is_predicted_once(tiny_tokenizer):
    windows = windows_of(TEXT, tiny_tokenizer, Cut(16, stride=5, max_chunks=6))
    ids = tiny_tokenizer(TEXT.text, add_special_tokens=False)["input_ids"]
    rows, places = windows.counted.nonzero().t()
    assert (5 * rows + places + 1).tolist() == list(range(1, 16 + 5 * 5))
    assert [windows.ids[row, 0].item() for row in range(6)] == [ids[5 * row] for row in range(6)]


def test_a_stride_of_one_gives_every_token_the_whole_window(tiny_model, tiny_tokenizer):
    model = load_model(tiny_model())
    windows = windows_of(TEXT, tiny_tokenizer, Cut(8, stride=1, max_chunks=10))
    (found,) = score_models({"m": torch_scorer(model)}, windows.ids, windows.counted)
    ids = torch.tensor(tiny_tokenizer(TEXT.text, add_special_tokens=False)["input_ids"])
    total = 0.0
    for place in range(1, 17):
        before = ids[max(0, place - 7) : place]
        with torch.no_grad():
            total -= model(before[None]).logits[0, -1].double().log_softmax(-1)[ids[place]].item()
    assert found.nll == pytest.approx(total / 16, abs=1e-5)
    assert sum(found.window_nll) == pytest.approx(total, abs=1e-4)


def test_a_beginning_lets_the_first_token_count(tiny_tokenizer, beginning_tokenizer):
    windows = windows_of(TEXT, tiny_tokenizer, Cut(16, bos=True, max_chunks=2))
    assert windows.ids.shape == (2, 17) and (windows.ids[:, 0] == tiny_tokenizer.bos_token_id).all()
    set_by_itself = windows_of(TEXT, beginning_tokenizer, Cut(16, max_chunks=2))
    assert torch.equal(set_by_itself.ids, windows.ids) and set_by_itself.protocol.bos is True
    assert windows.protocol.predictions == set_by_itself.protocol.predictions == 32
    without = windows_of(TEXT, beginning_tokenizer, Cut(16, bos=False, max_chunks=2))
    assert without.protocol.bos is False
    assert torch.equal(without.ids, windows_of(TEXT, tiny_tokenizer, Cut(16, max_chunks=2)).ids)
    strided = windows_of(TEXT, tiny_tokenizer, Cut(16, stride=4, bos=True, max_chunks=3))
    assert strided.counted.sum(1).tolist() == [16, 4, 4]


def test_tokens_stand_for_all_bytes_of_a_text(tiny_tokenizer):
    text = "the cat saß on a 猫, 🐈‍⬛.  the dog\n\nran"
    ids, lengths = tiny_tokenizer(text, add_special_tokens=False)["input_ids"], bytes_of_tokens(text, tiny_tokenizer)
    assert len(lengths) == len(ids) and lengths.sum() == len(text.encode())
    ascii_text = "the cat sat on a mat"
    pieces = [len(tiny_tokenizer.decode([token])) for token in tiny_tokenizer(ascii_text)["input_ids"]]
    assert bytes_of_tokens(ascii_text, tiny_tokenizer).tolist() == pieces


@pytest.mark.parametrize("cut", [Cut(16, max_chunks=5), Cut(16, stride=5), Cut(8, stride=3, bos=True, max_chunks=7)])
def test_bits_per_byte_are_of_the_bytes_that_are_predicted(tiny_model, tiny_tokenizer, cut, tmp_path):
    windows, total = windows_of(TEXT, tiny_tokenizer, cut), 0
    for row, place in windows.counted.nonzero().tolist():
        total += len(tiny_tokenizer.decode(windows.ids[row, place + 1]))
    assert windows.predicted_bytes == total
    (tmp_path / "text.txt").write_text(TEXT.text)
    options = EvalOptions(cut.chunk, cut.stride, cut.bos, max_chunks=cut.max_chunks)
    (row,) = evaluate([tiny_model()], options, text=tmp_path / "text.txt").rows
    assert row.bits_per_byte == pytest.approx(row.nll * windows.protocol.predictions / math.log(2) / total)


def test_lines_are_joined_as_the_papers_do():
    text = " a b \n \n= c =\n"
    assert joined(text, "raw") == text
    assert joined(text, "paragraphs") == " a b \n\n\n\n= c =\n\n"
    rows = [" a b \n", "", "= c =\n"]  # as Hugging Face's loaders read that file
    assert joined(text, "wikitext") == joined(text.removesuffix("\n"), "wikitext") == "\n\n".join(rows)
    assert joined(text, "spaces") == " ".join(row.strip() for row in rows if row)


def test_protocols_tell_texts_and_tokenizers_apart(tiny_tokenizer):
    one, two = (windows_of(TEXT, tiny_tokenizer, Cut(size, max_chunks=2)).protocol for size in (16, 8))
    assert one.tokens_sha256 != two.tokens_sha256 and one.text_sha256 == two.text_sha256
    before = tokenizer_hash(tiny_tokenizer)
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["quite new"])
    assert tokenizer_hash(other) != before == one.tokenizer_sha256


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 1}, "cannot predict anything"),
        ({"max_chunks": 0}, "cannot predict anything"),
        ({"stride": 0}, "a stride of 0 is not allowed: give 1 to 256"),
        ({"stride": 257}, "a stride of 257"),
        ({"join": "commas"}, "--join commas is not known"),
    ],
)
def test_what_cannot_be_cut_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Cut(**fields)


def test_too_little_text_and_a_tokenizer_without_a_beginning_are_refused(tiny_tokenizer):
    with pytest.raises(UserError, match=r"too little text: .* tokens, a chunk needs 5000"):
        windows_of(TEXT, tiny_tokenizer, Cut(5000))
    other = copy.deepcopy(tiny_tokenizer)
    other.bos_token = None
    with pytest.raises(UserError, match="leave --bos out"):
        windows_of(TEXT, other, Cut(16, bos=True))


def test_from_the_command_line_also_where_a_config_names_no_positions(tiny_model, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.text)
    path, text = tiny_model(), ("--text", tmp_path / "text.txt")
    config = json.loads((path / "config.json").read_text())
    del config["max_position_embeddings"]
    (path / "config.json").write_text(json.dumps(config))
    cut = ("--chunk", 16, "--stride", 8, "--bos", "--join", "spaces", "--max-chunks", 5)
    done = here("eval", path, *text, *cut, "--json", tmp_path / "quality.json")
    assert "5 chunks of 16 tokens, stride 8, BOS, lines spaces, 48 predictions" in " ".join(done.stdout.split())
    here("export", path, "-o", tmp_path / "bundle", *text)
    assert read_manifest(tmp_path / "bundle").context_length == 2048


def test_models_that_would_read_other_tokens_are_refused(tiny_model, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.text)
    one, other = tiny_model("one"), tiny_model("other", max_position_embeddings=32)
    done = here("eval", one, other, "--text", tmp_path / "text.txt", "--chunk", 40, code=2)
    assert f"{other} holds 32 tokens, a window has 40: give a smaller --chunk" in last_line(done)
    path = other / "tokenizer.json"
    vocabulary = json.loads(path.read_text())
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(vocabulary))
    done = here("eval", one, other, "--text", tmp_path / "text.txt", "--chunk", 16, code=2)
    assert f"{other} cuts a text into other tokens than the first model" in last_line(done)

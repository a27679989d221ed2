"""The number of words that a head says as something that the search chooses, in one budget with all else."""

import json
from dataclasses import replace

import pytest
import torch
from support.command_line import here
from support.cost_files import cost_file

from export import ExportOptions, export
from saap.base.errors import UserError
from saap.models.architectures import head_vocabulary, shape_of
from saap.models.checkpoint import load_model, read_config
from saap.models.record import read_record
from saap.models.resolve import load_tokenizer
from saap.prune import PruneOptions, prune
from saap.prune.pruning import budget_of
from saap.prune.vocabulary import PIECE, PIECES, Chosen, trim, words_to_try
from saap.text.documents import load_documents
from saap.text.encoding import writing_tokenizer

IDS = torch.randint(320, (8, 16), generator=torch.Generator().manual_seed(0))
HALF, FEW = (Chosen(tuple(range(count)), 320, longer, "dice") for count, longer in ((160, 0.05), (80, 0.5)))


@pytest.fixture
def costs(tmp_path):
    """Of a step 4 ms are outside the layers, 2 with half of the words."""
    path = cost_file(tmp_path / "cost.json")
    table = json.loads(path.read_text())
    heads = [{"rows": 80, "ms": 1.0}, {"rows": 160, "ms": 2.0}]
    attention = [{"query_heads": 1, "kv_heads": 1, "ms": 0.2}, {"query_heads": 6, "kv_heads": 3, "ms": 0.9}]
    ffn = [{"width": 32, "ms": 0.2}, {"width": 128, "ms": 0.8}]
    table["threads"][0] |= {"constant_ms": 4.0, "attention": attention, "ffn": ffn, "head": heads}
    path.write_text(json.dumps(table))
    return path


def test_a_head_is_one_option_among_others(tiny_model, costs, tmp_path):
    model, options = tiny_model(), PruneOptions(costs=costs, speedup=1.2, keep=frozenset({"blocks"}))
    result = prune(model, options, output=tmp_path / "slim", calibration=IDS, words=[HALF, FEW])
    record, config = read_record(tmp_path / "slim"), read_config(tmp_path / "slim")
    assert result.plan.words == 0 and record["vocabulary"]["rows"] == 160 and head_vocabulary(config)
    assert shape_of(config).layers == shape_of(read_config(model)).layers  # nothing else goes
    plan, whole = record["plan"], record["plan"]["dense"]["ms_per_token"]
    assert plan["achieved"]["ms_per_token"] == pytest.approx(whole - 2)
    assert plan["achieved"]["speedup"] == plan["planned"]["speedup"] == pytest.approx(whole / (whole - 2) / 1.05)
    assert record["lineage"]["words"]["source"] == "dice"
    assert plan["reasons"]["words"] == {
        "count": 160,
        "saved": pytest.approx(2 - whole / 1.2 * (1 - 1 / 1.05)),
        "price": 0,
    }
    export(tmp_path / "slim", output=tmp_path / "bundle", options=ExportOptions(parity="none"))
    fixed = prune(model, options, output=tmp_path / "fixed", calibration=IDS, words=HALF)
    assert fixed.achieved == pytest.approx(result.achieved)


def test_a_head_that_costs_too_much_is_left_whole(tiny_model, costs, tmp_path):
    dear = [replace(HALF, price=50.0), replace(FEW, price=60.0)]
    options = PruneOptions(costs=costs, speedup=1.2)
    result = prune(tiny_model(), options, output=tmp_path / "slim", calibration=IDS, words=dear)
    assert result.plan.words is None and "vocabulary" not in read_record(tmp_path / "slim")
    assert result.achieved["speedup"] >= 1.2 and not head_vocabulary(read_config(tmp_path / "slim"))
    # What layers alone do not reach is reached with fewer words.
    options = replace(options, speedup=1.1 * result.budget.total(result.budget.dense) / 4)
    with pytest.raises(UserError, match="the largest that these options allow"):
        budget_of(tiny_model(), options)
    far = prune(tiny_model(), options, output=tmp_path / "far", calibration=IDS, words=dear)
    assert far.plan.words is not None and far.achieved["speedup"] >= options.speedup


def test_milliseconds_are_of_a_token_and_bytes_are_bytes(tiny_model, costs, tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    options = PruneOptions(costs=costs, ms_per_token=7.2, keep=frozenset({"blocks"}))
    timed = budget_of(model, options, [HALF])
    assert timed.outside_cost(timed.base, timed.words[0]) == pytest.approx(-2)
    result = prune(model, options, output=tmp_path / "ms", calibration=IDS, words=[HALF])
    assert result.plan.words == 0 and result.achieved["ms_per_token"] == pytest.approx(timed.total(timed.dense) - 2)
    whole = budget_of(model, PruneOptions(ratio=0.1)).report_dense()["bytes"]
    fewer = [replace(HALF, input=True)]
    options = PruneOptions(max_bytes=int(0.85 * whole))
    result = prune(model, options, output=tmp_path / "bytes", calibration=IDS, words=fewer)
    export(tmp_path / "bytes", output=tmp_path / "bundle", options=ExportOptions(parity="none"))
    real = (tmp_path / "bundle/model.onnx.data").stat().st_size
    assert real == result.achieved["bytes"] <= 0.85 * whole


@torch.no_grad()
def test_the_price_is_what_the_text_takes_more(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("saap.prune.vocabulary.SHARES", (0.93, 0.9))
    model, text = tiny_model(), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and the cat sat on the mat\n" * 400)
    found = words_to_try(model, load_documents(text, split="calibration"))
    assert [len(words.words) for words in found] == [298, 288]
    held = load_documents(text, split="calibration").text
    held = held[int(len(held) * 0.75) :]
    pieces = [held[i : i + PIECE] for i in range(0, len(held) - PIECE + 1, max(PIECE, len(held) // PIECES))]

    def nats(directory, tokenizer):
        total, tokens = 0.0, 0
        for piece in pieces:
            ids = torch.tensor([tokenizer(piece, add_special_tokens=False)["input_ids"]])
            said = load_model(directory)(input_ids=ids).logits[0].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])
            total, tokens = total - float(said.sum()), tokens + ids.shape[1]
        return total, tokens

    whole, tokens = nats(model, load_tokenizer(model))
    for place, words in enumerate(found):
        slim = trim(model, words, tmp_path / str(place))
        own, _ = nats(slim, writing_tokenizer(slim))
        assert words.price == pytest.approx(max(0.0, (own - whole) / tokens), rel=1e-3, abs=1e-5)


def test_auto_with_a_time_is_one_search(tiny_model, costs, tmp_path, monkeypatch):
    monkeypatch.setattr("saap.prune.vocabulary.SHARES", (0.93, 0.9))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and the cat sat on the mat\n" * 400)
    asked = ("--costs", costs, "--calibration", text, "--sequences", 8, "--length", 16, "--explain")
    done = here("prune", tiny_model(), "-o", tmp_path / "slim", "--speedup", 1.1, "--vocabulary", "auto", *asked)
    record = read_record(tmp_path / "slim")
    rows = record["vocabulary"]["rows"]
    assert f"vocabulary: the head predicts {rows} of 320 tokens; such text takes" in done.stdout
    assert rows in (288, 298) and "words of the head" in done.stdout

"""Answers of a model against the dense one's."""

import json

import pytest
import torch
from support.command_line import here, refused

from export import export
from saap.base.errors import UserError
from saap.evaluate.answers import read_prompts, repetition, score_answers
from saap.evaluate.perplexity import torch_scorer
from saap.evaluate.subjects import subject_of
from saap.models.checkpoint import load_model
from saap.models.resolve import load_tokenizer
from saap.prune import PruneOptions, prune
from saap.system.gpu import CPU


def scripted(answers, logits):
    """A model that writes these answers, and says next what ``logits`` gives."""
    left = iter(answers)
    return lambda prompt, tokens: next(left)[:tokens], logits


def saying(answer):
    """Logits that are largest at the next token of one text."""

    def logits(ids):
        full = torch.tensor([*answer, 0])
        return torch.nn.functional.one_hot(full[1 : ids.shape[1] + 1], 10).float()[None]

    return logits


def test_numbers_by_hand():
    prompt, dense, other = [1, 2], [3, 4, 5, 6], [3, 4, 7, 6]
    models = {
        "dense": scripted([dense], saying([*prompt, *dense])),
        "other": scripted([other], saying([*prompt, *other])),
    }
    first, second = score_answers(models, [prompt], 8, "dense")
    assert (first.agreement, first.same, first.repetition) == (1.0, 4.0, 0.0)
    assert (second.agreement, second.same) == (0.75, 2.0)
    alone = score_answers({"other": scripted([other], None)}, [prompt], 8, None)
    assert alone[0].agreement is None and alone[0].same is None


def test_repeated_grams():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1, 2, 3]) == 0
    assert repetition([7] * 11) == pytest.approx(7 / 8)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_answers_of_directories_and_bundles(tiny_model, tmp_path):
    path = tiny_model()
    ids = torch.randint(320, (8, 16), generator=torch.Generator().manual_seed(0))
    prune(path, PruneOptions(ratio=0.4), output=tmp_path / "slim", calibration=ids)
    export(path, output=tmp_path / "bundle")
    out = tmp_path / "q.json"
    done = here("eval", tmp_path / "slim", tmp_path / "bundle", "--reference", path, "--answers", 3, "--json", out,
                "--answer-tokens", 8)  # fmt: skip
    assert "agreement" in done.stdout and "perplexity" not in done.stdout
    found = json.loads(out.read_text())
    dense, slim, bundle = found["answers"]["scores"]
    assert (dense["agreement"], dense["same"]) == (1.0, 8.0)
    assert slim["agreement"] < 1 and slim["same"] < 8
    assert found["answers"]["prompts"] == 3 and found["answers"]["tokens"] == 8
    assert bundle["model"].endswith("bundle") and 0 <= bundle["agreement"] <= 1 and 0 <= bundle["same"] <= 8

    model = load_model(path)
    prompts = read_prompts(None, 3)
    write = subject_of(path).writer(CPU, [], 512)
    for prompt in prompts.ids(load_tokenizer(path)):
        answer = write(prompt, 8)
        logits = torch_scorer(model)(torch.tensor([[*prompt, *answer]]))[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_prompts_of_a_file(tiny_model, tmp_path):
    place = tmp_path / "prompts.txt"
    place.write_text("One?\n\nTwo?\n")
    assert read_prompts(place, 2).texts == ("One?", "Two?")
    assert len(read_prompts(None, 32).texts) == 32
    with pytest.raises(UserError, match=r"prompts.txt has 2 prompts: give --answers 2 or fewer, or --prompts FILE"):
        read_prompts(place, 3)
    path = tiny_model()
    assert "has 2 prompts" in refused("eval", path, "--answers", 3, "--prompts", place)
    assert "cannot be read as UTF-8 text" in refused("eval", path, "--answers", 3, "--prompts", tmp_path / "none.txt")
    assert "--prompts is for answers: leave it out, or give --answers" in refused("eval", path, "--prompts", place)
    message = refused("eval", "llama.cpp:model.gguf", "--answers", 3)
    assert "llama.cpp:model.gguf: only ONNX Runtime is given prompts: leave --answers out" in message

"""A model is opened as memory allows, and says the same in every way."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import here

from saap.base import needs
from saap.base.errors import UserError
from saap.evaluate import evaluation
from saap.models import streaming
from saap.models.checkpoint import load_model
from saap.models.modeling_slim import GroupQuantLinear
from saap.models.streaming import is_streamed, open_model, whole_needs
from saap.tune import tuning
from saap.tune.options import TrainOptions, TuneOptions
from saap.tune.tuning import tune

IDS = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(needs, "available_memory", lambda: needs.PROCESS)


def test_a_model_that_does_not_fit_is_read_layer_by_layer(tiny_model, little_memory):
    path = tiny_model()
    model = open_model(path)
    assert is_streamed(model)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, load_model(path)(input_ids=IDS).logits)


def test_one_that_fits_is_not(tiny_model):
    path = tiny_model()
    assert not is_streamed(open_model(path))
    assert whole_needs(path).memory["weights"] == 4 * load_model(path).num_parameters()


def test_integers_stay_integers_where_floats_do_not_fit(tiny_model, tmp_path, monkeypatch):
    path = tiny_model()
    tune(path, TuneOptions(held_out=0, training=TrainOptions(rows_per_step=2)), output=tmp_path / "tuned", data=IDS)
    floats = open_model(tmp_path / "tuned")
    monkeypatch.setattr(needs, "available_memory", lambda: needs.PROCESS)
    integers = open_model(tmp_path / "tuned")
    held = [[m for m in model.modules() if isinstance(m, GroupQuantLinear)] for model in (floats, integers)]
    assert not held[0] and held[1]
    with torch.inference_mode():
        assert torch.allclose(floats(input_ids=IDS).logits, integers(input_ids=IDS).logits, atol=1e-4)


def test_eval_gives_the_same_numbers(tiny_model, tmp_path, monkeypatch):
    path, text = tiny_model(), tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 400)
    common = ("eval", path, "--text", text, "--chunk", "32", "--max-chunks", "6", "--json")
    here(*common, tmp_path / "whole.json")
    for module in (evaluation, streaming):  # of a model this small the logits are what would not fit
        monkeypatch.setattr(module, "fits", lambda wanted: "weights" not in wanted.memory)
    here(*common, tmp_path / "layers.json")
    whole, layers = (json.loads((tmp_path / f"{name}.json").read_text())["rows"][0] for name in ("whole", "layers"))
    assert whole["nll"] == pytest.approx(layers["nll"], rel=1e-5)
    assert whole["window_nll"] == pytest.approx(layers["window_nll"], rel=1e-5)


@pytest.mark.parametrize("integers", ["gptq", "nearest"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_tuning_from_files_gives_the_same_integers(integers, family, tiny_family, tmp_path, monkeypatch):
    path = tiny_family(family)
    options = TuneOptions(held_out=0, integers=integers, training=TrainOptions(rows_per_step=2, precision="fp32"))
    tune(path, options, output=tmp_path / "whole", data=IDS)
    seen = []
    load = tuning.load_streamed
    monkeypatch.setattr(tuning, "load_streamed", lambda source, **given: seen.append(source) or load(source, **given))
    monkeypatch.setattr("saap.tune.needs.fits", lambda needs: False)
    tune(path, options, output=tmp_path / "layers", data=IDS)
    assert seen == [path]
    whole, layers = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "layers"))
    assert whole.keys() == layers.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in layers.items())
    assert any(name.endswith("qweight") for name in layers)


def test_what_needs_all_floats_is_refused(tiny_model, tmp_path, monkeypatch, little_memory):
    with pytest.raises(UserError, match=r"tuning needs .* --max-bytes needs all floats at once"):
        tune(tiny_model(), TuneOptions(max_bytes=10**6), output=tmp_path / "tuned", data=IDS)
    with pytest.raises(UserError, match=r"tuning needs .* give a smaller --length"):
        tune(tiny_model(), TuneOptions(), output=tmp_path / "tuned", data=IDS)

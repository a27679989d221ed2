"""`saap prune` by every method, with every compensation, and what each of them refuses."""

import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import here, prune_words, refused
from support.cost_files import cost_file

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.models.record import read_record
from saap.prune.options import COMPENSATIONS, METHODS

IDS = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(tiny_model):
    return tiny_model()


def weights_of(directory):
    return load_file(directory / "model.safetensors")


def count(directory):
    return sum(tensor.numel() for tensor in weights_of(directory).values())


# Every method once, and every compensation with SAAP and with FLAP.
PAIRS = {(method, COMPENSATIONS[n % len(COMPENSATIONS)]) for n, method in enumerate(METHODS)}
PAIRS |= {("flap", compensation) for compensation in COMPENSATIONS} | {("saap", "refit"), ("saap", "none")}


@pytest.mark.parametrize(("method", "compensation"), sorted(PAIRS))
def test_every_method_and_every_compensation(model, tmp_path, river, method, compensation):
    asked = ["--ratio", "0.3", "--method", method, "--compensate", compensation]
    here(*prune_words(model, tmp_path / "slim", river, *asked))
    record = read_record(tmp_path / "slim")
    assert (record["method"], record["options"]["compensate"]) == (method, compensation)
    shape = shape_of(read_config(tmp_path / "slim"))
    assert shape.layer_weights <= 0.7 * shape_of(read_config(model)).layer_weights * (1 + 0.02)  # added biases
    assert shape.added_bias is (compensation == "bias")
    assert record["plan"]["achieved"]["ratio"] >= 0.3
    assert torch.isfinite(load_model(tmp_path / "slim")(input_ids=IDS).logits).all()
    priced = [block["price"] is not None for block in record["plan"]["reasons"]["blocks"]]
    assert priced == [method == "saap"] * 6


def test_the_biases_that_flap_adds_count(model, tmp_path, river):
    """A count that the plan meets without its biases, and misses by one with them, takes a smaller plan."""
    here(*prune_words(model, tmp_path / "slim", river, "--max-params", "190k", "--method", "flap"))
    plan = read_record(tmp_path / "slim")["plan"]
    names = [name for name in weights_of(tmp_path / "slim") if name.endswith("bias")]
    assert len(names) == 6 and all("o_proj" in name or "down_proj" in name for name in names)
    found = count(tmp_path / "slim")
    assert found == plan["planned"]["parameters"] == plan["achieved"]["parameters"] <= 190_000
    here(*prune_words(model, tmp_path / "same", river, "--max-params", str(found), "--method", "flap"))
    here(*prune_words(model, tmp_path / "less", river, "--max-params", str(found - 1), "--method", "flap"))
    assert count(tmp_path / "same") == found
    assert count(tmp_path / "less") < found - 1


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A slim model with added biases whose layers differ, made once."""
    return tmp_path_factory.mktemp("uneven") / "slim"


@pytest.mark.parametrize("method", ["saap", "param_mix", "flap", "shortgpt"])
def test_an_uneven_slim_model_with_biases_prunes_again(model, tmp_path, river, uneven, method):
    if not uneven.exists():
        here(*prune_words(model, uneven, river, "--ratio", "0.2", "--method", "flap", "--keep-layers", "1"))
    before = shape_of(read_config(uneven))
    assert before.added_bias and len(set(before.layers)) > 1
    here(*prune_words(uneven, tmp_path / "again", river, "--ratio", "0.2", "--method", method))
    after = shape_of(read_config(tmp_path / "again"))
    assert after.added_bias
    assert after.layer_weights <= 0.8 * before.layer_weights
    biases = [name for name in weights_of(tmp_path / "again") if name.endswith("bias")]
    assert len(biases) == sum(bool(layer.query_heads) + bool(layer.ffn) for layer in after.layers)
    assert torch.isfinite(load_model(tmp_path / "again")(input_ids=IDS).logits).all()


def test_weights_that_are_not_numbers_are_refused(model, tmp_path, river):  # other methods: baselines/test_methods.py
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = weights_of(broken)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    options = ["--ratio", "0.2", "--compensate", "none"]
    message = refused(*prune_words(broken, tmp_path / "slim", river, *options))
    assert "has NaN or infinite numbers in model.layers.1.mlp.up_proj.weight" in message
    assert not (tmp_path / "slim").exists()


@pytest.mark.parametrize(("method", "compensation"), [("saap", "refit"), ("flap", "bias")])
def test_the_same_seed_twice_gives_the_same_bytes(model, tmp_path, river, method, compensation):
    for name in ("one", "two"):
        here(*prune_words(model, tmp_path / name, river, "--ratio", "0.3", "--method", method, "--seed", "5"))
    assert read_record(tmp_path / "one")["options"]["compensate"] == compensation  # the method's own
    hashes = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert hashes[0] == hashes[1] and "model.safetensors" in hashes[0]


def test_why_is_told_on_demand(model, tmp_path, river):
    explain = ("--ratio", "0.3", "--explain")
    brief = here(*prune_words(model, tmp_path / "brief", river, *explain)).stdout
    assert "  The plan saves 0.0" in brief and "  Layer " in brief and "  Next would go" in brief
    assert "Why each layer lost" not in brief and "What each kind" not in brief
    assert "--wide is for --explain" in refused(*prune_words(model, tmp_path / "no", river, *explain[:2], "--wide"))
    told = here(*prune_words(model, tmp_path / "told", river, *explain, "--wide")).stdout
    assert max(map(len, told.splitlines())) <= 100
    words = " ".join(told.split())
    assert "Why each layer lost what it lost: prices in nats and in nats per million weights" in words
    assert "Next would go" in words and "the dearest step taken, " in words
    flap = here(*prune_words(model, tmp_path / "flap", river, *explain, "--wide", "--method", "flap")).stdout
    assert "What each layer lost" in flap and "nats" not in flap
    assert "The method predicts no losses, so there is no next step." in flap


def test_a_table_of_this_machine_has_to_be_of_its_onnxruntime(model, tmp_path, river):
    from devices.probe.host import fingerprint, probe

    device, asked = probe(), ["--speedup", "1.5", "--costs"]
    here(*prune_words(model, tmp_path / "slim", river, *asked, cost_file(tmp_path / "ours.json", device=device)))
    assert read_record(tmp_path / "slim")["plan"]["costs"]["fingerprint"] == device["fingerprint"]
    older = {**device, "onnxruntime": "1.23.0"}
    older["fingerprint"] = fingerprint(older)
    message = refused(*prune_words(model, tmp_path / "other", river, *asked, cost_file(tmp_path / "a", device=older)))
    assert f"was measured for ONNX Runtime 1.23.0, not {device['onnxruntime']}" in message
    for damage, told in (({"kind": "x"}, "'x' is no table of costs"), ({"device": 5}, "is damaged")):
        path = cost_file(tmp_path / "damaged.json", **{"device": device, **damage})
        assert told in refused(*prune_words(model, tmp_path / "other", river, *asked, path))
    assert not (tmp_path / "other").exists()

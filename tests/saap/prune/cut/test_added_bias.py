"""Biases that pruning adds to the output and down projections: the slim model, its bundles, and pruning it again."""

import gguf
import numpy as np
import pytest
import torch
from support import llama_cpp_run
from support.exported import export_bundle, export_portable
from support.family_cuts import (
    CASES,
    EXPORTED,
    FULL,
    IDS,
    check_generation,
    compensated,
    cut,
    dense_dir,
    fitting,
    logits,
    masked_logits,
    shipped,
)

from export.engine.scoring import BundleScorer
from export.gguf.write import export_gguf
from saap.base.errors import UserError
from saap.models.architectures import architecture_of, shape_of
from saap.models.checkpoint import load_model, read_config, slim_config
from saap.prune.plan import LayerPlan, PrunePlan
from saap.tune import TuneOptions, tune

__all__ = ["compensated", "dense_dir"]


@pytest.mark.parametrize("case", CASES)
def test_a_compensated_model_is_what_was_asked(compensated, tmp_path, case):
    directory, expected = compensated(case)
    config = read_config(directory)
    assert config["slim_bias"] is True
    assert config["model_type"] == f"saap_{CASES[case][0]}"
    slim = load_model(directory)
    assert (logits(slim) - expected).abs().max() <= 1e-5
    assert (logits(shipped(directory)) - expected).abs().max() <= 1e-5
    shape = shape_of(config)
    assert shape.added_bias
    assert shape.parameters == sum(p.numel() for p in slim.parameters())
    check_generation(slim)
    slim.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("case", [case for case in CASES if case != "gemma4"])  # which loses no layers
def test_a_compensated_model_is_pruned_again(compensated, tmp_path, case):
    directory, _ = compensated(case)
    half = LayerPlan((0, 1), (0,), tuple(range(0, 64, 2)))
    no_ffn = LayerPlan((0, 1), (0, 1), ())
    plan = fitting(directory, PrunePlan((half, no_ffn, LayerPlan((), (), (1, 5)), LayerPlan((), (), ()), half)))
    expected = masked_logits(directory, plan)
    again = load_model(cut(directory, tmp_path / "again", plan))
    assert again.config.slim_bias is True
    assert (logits(again) - expected).abs().max() <= 1e-5
    assert "model.layers.1.mlp.down_proj.bias" not in again.state_dict()
    architecture = architecture_of(again.config)
    writes = [architecture.writing(kind) for kind in plan.layers[1].blocks]
    assert all(again.model.layers[1].get_submodule(name).bias.abs().max() > 0.1 for name in writes)


@pytest.mark.parametrize("case", CASES)
def test_bundles_carry_the_biases(compensated, tmp_path, case):
    directory, expected = compensated(case)
    for name, write in (("cpu", export_bundle), ("portable", export_portable)):
        manifest = write(directory, tmp_path / name, bits=32, ids=IDS)
        assert np.abs(BundleScorer(tmp_path / name).logits(IDS.numpy()) - expected.numpy()).max() <= 1e-4
        assert manifest.parameters == shape_of(read_config(directory)).parameters


@pytest.mark.parametrize("case", ["llama", "gemma3"])  # biases of a family's own, and norms behind the blocks
def test_bundles_of_4_bit_carry_the_biases(compensated, tmp_path, case):
    directory, _ = compensated(case)
    export_portable(directory, tmp_path / "portable", bits=4, ids=IDS)
    export_bundle(directory, tmp_path / "cpu", bits=4, dotprod=False, ids=IDS)
    export_bundle(directory, tmp_path / "cuda", bits=4, target="cuda")
    float32, float16 = (BundleScorer(tmp_path / name).logits(IDS.numpy()) for name in ("cpu", "cuda"))
    assert np.abs(float32 - float16).max() <= 0.05


def test_a_compensated_llama_is_tuned_and_exported(compensated, tmp_path):
    directory, _ = compensated("llama")
    tune(directory, TuneOptions(), output=tmp_path / "tuned", data=IDS.repeat(2, 1))
    config, state = read_config(tmp_path / "tuned"), load_model(directory).state_dict()
    assert config["slim_bias"] is True
    tuned = load_model(tmp_path / "tuned")
    for name, bias in state.items():
        if name.endswith("bias"):
            assert torch.equal(tuned.state_dict()[name], bias)
    export_bundle(tmp_path / "tuned", tmp_path / "bundle", ids=IDS)


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2"])
def test_gguf_carries_the_biases(compensated, tmp_path, case):
    directory, expected = compensated(case)
    report = export_gguf(directory, tmp_path / "model.gguf", kind="F32")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    state = load_model(directory).state_dict()
    for index in (0, 1, 3, 4):
        found, wanted = tensors[f"blk.{index}.attn_output.bias"], state[f"model.layers.{index}.self_attn.o_proj.bias"]
        assert (found == wanted.numpy()).all()
    assert (tensors["blk.2.ffn_down.bias"] == state["model.layers.2.mlp.down_proj.bias"].numpy()).all()
    assert report.architecture == "deci"
    row = IDS[0, :8].tolist()  # within the window, which llama.cpp does not know
    found = llama_cpp_run.run(tmp_path / "model.gguf", ids=row)["logits"]
    assert np.abs(found - expected[0, :8].numpy()).max() <= 2e-3


@pytest.mark.parametrize("case", ["phi3", "gemma3", "smollm3"])
def test_gguf_refuses_what_it_cannot_hold(compensated, tmp_path, case):
    directory, _ = compensated(case)
    with pytest.raises(UserError, match=f"is of type '{CASES[case][0]}': .* export it for the cpu target"):
        export_gguf(directory, tmp_path / "model.gguf")


@pytest.mark.parametrize("native", [{"attention_bias": True, "mlp_bias": True}, {"attention_bias": True}, {}])
def test_biases_that_the_family_has_need_no_class_of_ours(dense_dir, tmp_path, native):
    path = dense_dir("llama", **{**FULL, **native})
    keep = LayerPlan((0, 2, 4), (0, 1, 2), tuple(range(32)))
    plan = PrunePlan((keep,) * 6)
    modules = [f"model.layers.{i}.{name}" for i in range(6) for name in ("self_attn.o_proj", "mlp.down_proj")]
    added = {f"{module}.bias": torch.full((96,), 0.5) for module in modules}
    directory = cut(path, tmp_path / "slim", plan, added, added_bias=True)
    plain = len(native) == 2
    assert read_config(directory)["model_type"] == ("llama" if plain else "saap_llama")
    assert read_config(directory).get("slim_bias", False) is not plain
    slim = load_model(directory)
    assert shape_of(slim.config).parameters == sum(p.numel() for p in slim.parameters())
    assert (slim.model.layers[5].self_attn.o_proj.bias == 0.5).all()


def test_the_key_goes_with_the_biases(dense_dir):
    config = read_config(dense_dir("qwen2")) | {"slim_bias": True}
    shape = shape_of(config)
    assert shape.added_bias
    assert slim_config(config, shape)["slim_bias"] is True
    assert "slim_bias" not in slim_config(config, shape_of(read_config(dense_dir("qwen2"))))


def test_a_replacement_that_is_no_tensor_of_the_slim_model(dense_dir, tmp_path):
    wrong = {"model.layers.2.self_attn.o_proj.bias": torch.zeros(96)}  # there are channels only
    with pytest.raises(ValueError, match=r"model\.layers\.2\.self_attn\.o_proj\.bias is no tensor of the slim model"):
        cut(dense_dir("mistral"), tmp_path / "slim", EXPORTED, wrong, added_bias=True)
    assert not (tmp_path / "slim").exists()

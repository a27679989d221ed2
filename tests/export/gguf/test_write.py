"""GGUF files of tiny models, read back number by number and run by a real llama.cpp."""

import gguf
import numpy as np
import pytest
import torch
from support import llama_cpp_run
from support.cuts import EMPTY, PLANS, WHOLE, cut
from support.export_cases import IDS as TWO_ROWS
from support.export_cases import LLAMA3, UNEVEN, YARN, draw_biases
from support.slim_integers import WIDE, write_integers

from export.gguf.layout import rotary_order
from export.gguf.tensors import take_columns
from export.gguf.write import WrittenMatrix, export_gguf
from saap.models.checkpoint import load_model
from saap.models.weight_files import tensor_reader
from saap.prune.plan import LayerPlan, PrunePlan
from saap.quantize.groups import QuantMatrix, quantize
from saap.tune import TuneOptions, tune

IDS = TWO_ROWS[:1]
# name: (config, plan, llama.cpp's architecture)
CASES = {
    "dense": ({}, None, "llama"),
    "untied, wide heads": ({"tie_word_embeddings": False, "head_dim": 32, "rope_theta": 5e5}, None, "llama"),
    "biased": ({"attention_bias": True, "mlp_bias": True}, None, "llama"),
    "linear rope": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, None, "llama"),
    "yarn rope": ({"rope_scaling": YARN}, None, "llama"),
    "uneven": ({}, UNEVEN, "deci"),
    "uneven, biased": ({"attention_bias": True, "mlp_bias": True}, UNEVEN, "deci"),
    "uneven, llama3 rope": ({"rope_scaling": LLAMA3}, UNEVEN, "deci"),
    "no FFN first, no attention last": (
        {"tie_word_embeddings": False},
        (LayerPlan((0, 1, 2, 3), (0, 1), ()), WHOLE, LayerPlan((), (), tuple(range(64)))),
        "deci",
    ),
    "attention only, all alike": ({}, (LayerPlan((0, 1), (0,), ()),) * 3, "deci"),
    "a layer dropped": ({}, (WHOLE, EMPTY, LayerPlan((1, 4), (0, 2), tuple(range(5)))), "deci"),
    "odd widths": ({}, PLANS["random 3"], "deci"),
}


def model_of(tiny_model, tmp_path, config, plan):
    path = tiny_model(**config)
    if "attention_bias" in config:
        draw_biases(path)
    return cut(path, tmp_path / "slim", PrunePlan(plan)) if plan else path


def torch_run(path, new):
    model = load_model(path)
    with torch.inference_mode():
        logits = model(input_ids=IDS, use_cache=False).logits[0].numpy()
        tokens = model.generate(IDS, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=2)
    return logits, tokens[0, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("config, plan, architecture", CASES.values(), ids=CASES.keys())
def test_llama_cpp_computes_at_float32_what_torch_does(tiny_model, tmp_path, config, plan, architecture):
    path = model_of(tiny_model, tmp_path, config, plan)
    report = export_gguf(path, tmp_path / "model.gguf", kind="F32")
    assert (report.architecture, report.notes) == (architecture, [])
    found = llama_cpp_run.run(tmp_path / "model.gguf", ids=IDS[0].tolist(), greedy=16)
    expected, tokens = torch_run(path, 16)
    assert np.abs(found["logits"] - expected).max() <= 2e-3
    assert (found["tokens"], found["architecture"]) == (tokens, architecture)


def tensors_of(file):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def floats(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape[::-1]))


def order_of(name, rows, heads):
    """Rows of the directory's matrix in the order of the file; ``heads``: of queries and of keys."""
    part = name.split(".")[-2]
    if part not in ("attn_q", "attn_k"):
        return torch.arange(rows)
    return rotary_order(rows, heads[part == "attn_k"])


NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}  # fmt: skip


def module_of(name):
    if name == "token_embd.weight":
        return "model.embed_tokens"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}"


def worst_group(found, wanted):
    found, wanted = (array.reshape(len(array), -1, 32) for array in (found, wanted))
    return (np.abs(found - wanted).max(-1) / np.abs(wanted).max(-1)).max()


# Half a step over the largest weight of a group (Q4_0 cuts one end off by a whole one), and d and m in float16.
@pytest.mark.parametrize("kind, bound", [("F16", 0), ("Q8_0", 0.5 / 127), ("Q4_0", 1 / 8), ("Q4_1", 1 / 15)])
def test_the_numbers_in_the_file_are_off_by_what_the_report_says(tiny_model, tmp_path, kind, bound):
    path = tiny_model()
    report = export_gguf(path, tmp_path / "model.gguf", kind=kind)
    read, tensors = tensor_reader(path)[1], tensors_of(tmp_path / "model.gguf")
    assert len(report.tensors) == 1 + 3 * 7
    for name, entry in report.tensors.items():
        tensor = tensors[name]
        weight = read(f"{module_of(name)}.weight")
        wanted = weight[order_of(name, len(weight), (6, 3))].numpy()
        assert tensor.tensor_type.name == entry.type == kind
        assert entry.relative_error == pytest.approx(worst_group(floats(tensor), wanted), rel=1e-5)
        assert 0 < entry.relative_error <= bound + 2**-10 and entry.carried == 0
    assert report.worst_error_rounded == max(entry.relative_error for entry in report.tensors.values())
    assert report.worst_error_carried is None
    assert report.bytes == (tmp_path / "model.gguf").stat().st_size


FILLED_IN = {"blk.0.attn_output.weight", *(f"blk.2.ffn_{part}.weight" for part in ("gate", "up", "down"))}
UNEVEN_HEADS = {"blk.1": (4, 2), "blk.2": (2, 2)}


@pytest.mark.parametrize("kind, bar", [("F16", 1e-3), ("Q8_0", 0.05), ("Q4_0", 0.05), ("Q4_1", 0.05)])
def test_llama_cpp_computes_what_torch_does_with_the_numbers_in_the_file(tiny_model, tmp_path, kind, bar):
    path = cut(tiny_model(), tmp_path / "slim", PrunePlan(UNEVEN))
    report = export_gguf(path, tmp_path / "model.gguf", kind=kind)
    model, tensors = load_model(path), tensors_of(tmp_path / "model.gguf")
    for name in FILLED_IN:
        assert not floats(tensors[name]).any()
    for name in report.tensors:
        weight = model.get_submodule(module_of(name)).weight
        order = order_of(name, len(weight), UNEVEN_HEADS.get(name[:5]))
        weight.data[order] = torch.from_numpy(floats(tensors[name]))
    found = llama_cpp_run.run(tmp_path / "model.gguf", ids=IDS[0].tolist())["logits"]
    with torch.inference_mode():
        expected = model(input_ids=IDS, use_cache=False).logits[0].numpy()
    assert np.sqrt(np.square(found - expected).mean()) <= bar * expected.std()  # its activations are int8


def nibbles(blocks):
    """[..., 16] uint8 -> [..., 32], as ggml defines a block: low nibbles first."""
    return np.concatenate([blocks & 15, blocks >> 4], axis=-1)


BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # bytes


def stored(tensor):
    """(integers [rows, groups, 32], scales d, minima m) of a matrix; m is None for a type without minima."""
    kind = tensor.tensor_type.name
    blocks = tensor.data.reshape(len(tensor.data), -1, BLOCKS[kind])
    d, m = (blocks[..., at : at + 2].copy().view(np.float16)[..., 0] for at in (0, 2))
    integers = blocks[..., 2:].view(np.int8) if kind == "Q8_0" else nibbles(blocks[..., 4 if kind == "Q4_1" else 2 :])
    return integers, d.astype(np.float32), m if kind == "Q4_1" else None


def packed(read, name, bits=4, group_size=32):
    """(codes, scales) of a tuned matrix in the order of the file and in groups of 32."""
    module = module_of(name)
    codes, scales = (read(f"{module}.{part}").numpy() for part in ("qweight", "scales"))
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1)
    rows = len(scales)
    codes = codes.reshape(rows, -1, 32)
    order = order_of(name, rows, UNEVEN_HEADS.get(name[:5])).numpy()
    return codes[order], np.repeat(scales, group_size // 32, axis=1)[order]


@pytest.mark.parametrize(("bits", "kind", "zero"), [(4, "Q4_0", 0), (8, "Q8_0", 128)])
def test_tuned_integers_lose_nothing(tiny_model, tmp_path, bits, kind, zero):
    path = cut(tiny_model(), tmp_path / "slim", PrunePlan(UNEVEN))
    tune(path, TuneOptions(bits=bits, learning_rate=2e-2), output=tmp_path / "tuned", data=IDS.repeat(8, 1))
    report = export_gguf(tmp_path / "tuned", tmp_path / "model.gguf")
    read, tensors = tensor_reader(tmp_path / "tuned")[1], tensors_of(tmp_path / "model.gguf")
    signs = set()
    for name, entry in report.tensors.items():
        assert entry == WrittenMatrix(kind, 0.0, 1.0), name
        codes, scales = packed(read, name, bits)
        integers, d, _ = stored(tensors[name])
        assert np.array_equal(integers + np.int16(zero), codes) and np.array_equal(d, scales), name
        signs |= set(np.sign(scales).flatten().tolist())
    assert signs == {-1.0, 1.0}
    assert report.worst_error_carried == 0 and report.notes == []


def test_wider_groups_repeat_their_scale(tiny_model, tmp_path):
    write_integers(tiny_model(**WIDE), tmp_path / "tuned", group_size=64)
    report = export_gguf(tmp_path / "tuned", tmp_path / "model.gguf")
    read, tensors = tensor_reader(tmp_path / "tuned")[1], tensors_of(tmp_path / "model.gguf")
    assert {entry.carried for entry in report.tensors.values()} == {1.0}
    for name in ("blk.1.attn_v.weight", "blk.0.ffn_down.weight"):
        codes, scales = packed(read, name, group_size=64)
        integers, d, _ = stored(tensors[name])
        assert np.array_equal(integers, codes) and np.array_equal(d, scales)


def test_another_type_holds_tuned_integers_exactly_or_says_how_far_off(tiny_model, tmp_path):
    path = write_integers(cut(tiny_model(), tmp_path / "slim", PrunePlan(UNEVEN)), tmp_path / "tuned")
    for kind in ("Q8_0", "Q4_1"):
        exact = export_gguf(path, tmp_path / "exact.gguf", kind=kind)
        assert exact.worst_error_carried == 0 and exact.worst_error_rounded is None
    write_integers(tmp_path / "slim", tmp_path / "eight", 8)
    coarse = export_gguf(tmp_path / "eight", tmp_path / "q4.gguf", kind="Q4_0")
    assert 0.01 < coarse.worst_error_rounded <= 1 / 8 + 2**-10 and "rounded again, worst error" in coarse.notes[0]
    export_gguf(path, tmp_path / "f32.gguf", kind="F32")
    found = llama_cpp_run.run(tmp_path / "f32.gguf", ids=IDS[0].tolist(), greedy=8)
    expected, tokens = torch_run(path, 8)
    assert np.abs(found["logits"] - expected).max() <= 2e-3 and found["tokens"] == tokens


def test_rows_that_are_not_whole_blocks_are_float16_and_said(tiny_model, tmp_path):
    plan = (WHOLE, WHOLE, LayerPlan((0,), (0,), tuple(range(37))))
    path = cut(tiny_model(), tmp_path / "slim", PrunePlan(plan))
    report = export_gguf(path, tmp_path / "model.gguf", kind="Q8_0")
    found = {name for name, entry in report.tensors.items() if entry.type == "F16"}
    assert found == {"blk.2.attn_output.weight", "blk.2.ffn_down.weight"}
    assert [note.split(":")[0] for note in report.notes] == [
        "blk.2.attn_output has 16 input columns, not a multiple of 32",
        "blk.2.ffn_down has 37 input columns, not a multiple of 32",
    ]
    found = llama_cpp_run.run(tmp_path / "model.gguf", ids=IDS[0].tolist())["logits"]
    expected, _ = torch_run(path, 1)
    assert np.sqrt(np.square(found - expected).mean()) <= 0.05 * expected.std()


def test_the_head_may_have_a_type_of_its_own(tiny_model, tmp_path):
    report = export_gguf(tiny_model(tie_word_embeddings=False), tmp_path / "model.gguf", kind="Q4_1", head_kind="Q8_0")
    types = {name: entry.type for name, entry in report.tensors.items()}
    assert types.pop("token_embd.weight") == types.pop("output.weight") == "Q8_0"
    assert set(types.values()) == {"Q4_1"}


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_change_places_with_their_groups_or_become_floats(bits):
    matrix = quantize(torch.randn(5, 7 * 32, generator=torch.Generator().manual_seed(0)), bits, 32)
    groups = torch.tensor([3, 0, 6, 1, 2, 5, 4])
    order = (groups[:, None] * 32 + torch.arange(32)).flatten()
    moved = take_columns(matrix, order)
    assert isinstance(moved, QuantMatrix) and torch.equal(moved.dequantize(), matrix.dequantize()[:, order])
    torn = order.roll(16)
    assert torch.equal(take_columns(matrix, torn), matrix.dequantize()[:, torn])

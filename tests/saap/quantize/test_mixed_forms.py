"""Integers of a tuned directory in every file that is exported from it: bit for bit, of several bits and groups."""

import json
from collections import Counter

import gguf
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.edited import edited
from support.export_cases import bytes_read, check_standard, feed, logits_of, tensors_of
from support.exported import export_bundle, export_portable
from support.onnx_reference import reference
from support.references import reference_model, streamed_logits
from support.slim_integers import (
    IDS,
    MIXED,
    PARTS,
    QKV_OF_LAYER_1,
    UNEVEN,
    WIDE,
    Level0,
    eight,
    stacked,
    write_integers,
)
from transformers import AutoModelForCausalLM

from export.bundle.inspect import inspect_bundle
from export.bundle.manifest import read_manifest
from export.engine.scoring import BundleScorer
from export.gguf.write import export_gguf
from export.source import ModelSource
from saap.base.errors import UserError
from saap.models.checkpoint import load_model, read_config
from saap.models.modeling_slim import GroupQuantLinear, unpack_codes
from saap.models.slim_quant import MatrixForm
from saap.models.weight_files import tensor_reader
from saap.quantize.bundle_size import tuned_bundle_size
from saap.quantize.groups import quantize, quantize_model
from saap.tune import TuneOptions, tune

KINDS = {  # bits, group, forms by module: both bits in groups of 32, 64 and 128
    "4, 32": (4, 32, {}), "8, 128": (8, 128, {}), "mixed": (4, 64, eight()), "uneven": (4, 32, UNEVEN),
}  # fmt: skip


@pytest.fixture
def mixed(tiny_model, tmp_path):
    return write_integers(tiny_model(**WIDE), tmp_path / "mixed", own=eight())


def entry_of(directory):
    return read_config(directory)["slim_quant"]


def form_of(entry, layer, part):
    name = f"model.layers.{layer}.{PARTS[part][0]}"
    return MatrixForm(
        *(entry.get(of, {}).get(name, entry[as_all]) for of, as_all in (("matrices", "bits"), ("blocks", "block")))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_graph_holds_the_integers_of_the_directory(kind, tiny_model, tmp_path, monkeypatch):
    bits, group_size, own = KINDS[kind]
    path = tiny_model(**WIDE, attention_bias=True)
    integers = write_integers(path, tmp_path / "tuned", bits, group_size, own=own)
    for target, floats in (("cpu", np.float32), ("cuda", np.float16)):
        manifest = export_bundle(integers, tmp_path / target, target=target)
        check_graph(integers, tmp_path / target, floats)
        if target == "cpu":
            check_nodes(integers, tmp_path / "cpu")
            size = tuned_bundle_size(read_config(integers))
            assert size == manifest.files["model.onnx.data"].bytes
    export_portable(integers, tmp_path / "portable", ids=IDS)
    check_portable_graph(integers, tmp_path / "portable")
    monkeypatch.setattr("export.graph_writer.Target", Level0)
    export_bundle(integers, tmp_path / "level0")
    expected = logits_of(load_model(integers), IDS)
    assert np.abs(BundleScorer(tmp_path / "level0").logits(IDS.numpy()) - expected).max() <= 2e-3
    assert expected.std() > 0.3
    assert np.abs(logits_of(reference_model(integers, 0, 0, 0), IDS) - expected).max() <= 1e-4
    manifest = read_manifest(tmp_path / "portable")
    found = reference(tmp_path / "portable/scoring.onnx").run(["logits"], feed(manifest, IDS[:, :6].numpy()))
    assert np.abs(found[0] - expected[:, :6]).max() <= 1e-4


def check_graph(integers, bundle, floats):
    entry, found = entry_of(integers), tensors_of(bundle)
    for layer in range(2):
        for part in PARTS:
            name, (bits, group_size) = f"layers.{layer}.{part}", form_of(entry, layer, part)
            qweight, scales = (stacked(integers, layer, part, tensor).numpy() for tensor in ("qweight", "scales"))
            assert np.array_equal(found[f"{name}.qweight"], qweight)
            assert qweight.shape[2] * 8 == bits * group_size
            assert found[f"{name}.scales"].dtype == floats
            assert np.array_equal(found[f"{name}.scales"].astype(np.float32), scales.flatten())
            assert f"{name}.zero_points" not in found


def check_nodes(integers, bundle):
    """Each matrix product has the form of its matrix, and so has the gather."""
    entry, nodes = entry_of(integers), onnx.load(bundle / "model.onnx", load_external_data=False).graph.node
    attributes = [(n.op_type, n.input, {a.name: a.i for a in n.attribute}) for n in nodes]
    found = {i[1]: MatrixForm(a["bits"], a["block_size"]) for kind, i, a in attributes if kind == "MatMulNBits"}
    expected = {f"layers.{i}.{part}.qweight": form_of(entry, i, part) for i in range(2) for part in PARTS}
    table = MatrixForm(entry["embedding_bits"], entry.get("blocks", {}).get("model.embed_tokens", entry["block"]))
    assert found == expected | {"embedding.qweight": table}
    gathers = [MatrixForm(a["bits"], a["block_size"]) for kind, _, a in attributes if kind == "GatherBlockQuantized"]
    assert gathers == [table]


def check_portable_graph(integers, bundle):
    check_standard(bundle)
    entry, found = entry_of(integers), tensors_of(bundle)
    for layer in range(2):
        for part in PARTS:
            name, (bits, group_size) = f"layers.{layer}.{part}", form_of(entry, layer, part)
            scales = stacked(integers, layer, part, "scales").numpy()
            codes = unpack_codes(stacked(integers, layer, part, "qweight"), bits, group_size).flatten(1).numpy().T
            assert np.array_equal(found[f"{name}.scales"], scales.T)
            assert np.array_equal(found[f"{name}.codes"].astype(np.int16), codes.astype(np.int16) - 2 ** (bits - 1))


def test_gguf_has_a_type_for_each_tensor(mixed, tmp_path):
    report = export_gguf(mixed, tmp_path / "model.gguf")
    types = {name: entry.type for name, entry in report.tensors.items()}
    eight = {"blk.0.ffn_down.weight", *(f"blk.1.attn_{part}.weight" for part in "qkv")}
    assert {name for name, kind in types.items() if kind == "Q8_0"} == eight
    assert set(types.values()) == {"Q8_0", "Q4_0"}
    assert {entry.carried for entry in report.tensors.values()} == {1.0} and report.worst_error_carried == 0
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, module in (("blk.0.ffn_down", "0.mlp.down_proj"), ("blk.1.ffn_down", "1.mlp.down_proj")):
        tensor = tensors[f"{name}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        holder = load_model(mixed).get_submodule(f"model.layers.{module}")
        assert np.array_equal(values, holder.dequantize().numpy())


def test_the_directory_loads_with_the_bits_of_each_matrix(mixed):
    assert entry_of(mixed) == {"bits": 4, "block": 32, "embedding_bits": 4, "tied": True, "matrices": MIXED}
    model = load_model(mixed)
    found = {n: m.bits for n, m in model.named_modules() if isinstance(m, GroupQuantLinear)}
    assert found == {name: MIXED.get(name, 4) for name in found} and len(found) == 14
    whole = torch.from_numpy(logits_of(model, IDS))
    precision = ModelSource(mixed).precision(None, None, None)
    assert precision.all_bits == (4, 8)
    assert (torch.stack(list(streamed_logits(mixed, IDS, precision))) - whole).abs().max() <= 1e-5


def test_eight_bits_come_closer_where_they_are_given(tiny_model, tmp_path):
    path = tiny_model(**WIDE)
    dense = load_model(path)
    model = load_model(path)
    entry = quantize_model(
        model, 4, 32, 4, own={**eight(QKV_OF_LAYER_1), "model.layers.0.mlp.up_proj": MatrixForm(4, 32)}
    )
    assert entry["matrices"] == QKV_OF_LAYER_1, "what is as all others is not said"
    errors = {}
    for name, linear in dense.named_modules():
        if isinstance(linear, torch.nn.Linear) and "layers" in name:
            error = model.get_submodule(name).dequantize() - linear.weight
            errors[name] = float(error.detach().norm() / linear.weight.detach().norm())
    wide = [errors.pop(name) for name in QKV_OF_LAYER_1]
    assert max(wide) < 0.01 < min(errors.values())
    assert "matrices" not in quantize_model(load_model(path), 4, 32, 4)


def test_bits_that_no_graph_holds_are_refused(tiny_model, tmp_path):
    path, query = tiny_model(**WIDE), "model.layers.1.self_attn.q_proj"
    gate, down, both = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj", ("model.embed_tokens", "lm_head")
    for own, message in (
        (
            {query: (8, 32)},
            r"layer 1 .* one matrix .*q_proj 8 bit in groups of 32, .*k_proj 4 bit.*: give them the same",
        ),
        ({gate: (4, 64)}, "mlp.gate_proj 4 bit in groups of 64, mlp.up_proj 4 bit in groups of 32"),
        ({"model.layers.7.mlp.down_proj": (8, 32)}, "model.layers.7.mlp.down_proj, which is no linear"),
        ({down: (6, 32)}, "6 bits; allowed: 4, 8"),
        ({down: (4, 512)}, r"mlp.down_proj has 256 input columns, not a multiple of the group size 512"),
        (
            {both[0]: (4, 64)},
            "tied table is 4 bit in groups of 64 as the embedding and 4 bit in groups of 32 as the head",
        ),
    ):
        with pytest.raises(UserError, match=message):
            quantize_model(load_model(path), 4, 32, 4, own={name: MatrixForm(*form) for name, form in own.items()})
    matrices = {query: quantize(load_model(path).get_submodule(query).weight, 4, 64)}
    with pytest.raises(UserError, match=r"q_proj 4 bit in groups of 64, self_attn\.k_proj 4 bit in groups of 32"):
        quantize_model(load_model(path), 4, 32, 4, matrices)
    table = {name: quantize(load_model(path).get_parameter("lm_head.weight"), 8, 32) for name in both}
    with pytest.raises(ValueError, match="8 bits in groups of 32 are given to a module of 4 bits in groups of 32"):
        quantize_model(load_model(path), 4, 32, 4, table)


def test_a_config_that_does_not_fit_its_integers_is_refused(mixed, tmp_path):
    config = json.loads((mixed / "config.json").read_text())
    matrices = config["slim_quant"]["matrices"]
    for changed, message in (
        ({k: v for k, v in matrices.items() if "q_proj" not in k}, "layer 1 has linears that are one matrix"),
        (
            {k: v for k, v in matrices.items() if "down" not in k},
            "0.mlp.down_proj holds other integers than the 4 bit in groups",
        ),
    ):
        config["slim_quant"]["matrices"] = changed
        (mixed / "config.json").write_text(json.dumps(config))
        edited(mixed / "saap.json")
        for write in (export_bundle, export_portable):
            with pytest.raises(UserError, match=message):
                write(mixed, tmp_path / "bundle")
        with pytest.raises(UserError, match="cannot be loaded"):
            load_model(mixed)
    edited(mixed / "config.json", slim_quant={"bits": "four"})
    edited(mixed / "saap.json")
    with pytest.raises(UserError, match=r"config.json has a damaged slim_quant \(.*bits`\): make the directory again"):
        export_bundle(mixed, tmp_path / "bundle")


def test_eight_bits_anywhere_need_the_int8_kernels(mixed, tmp_path):
    with pytest.raises(UserError, match="without dot product has no 8-bit kernel"):
        export_bundle(mixed, tmp_path / "bundle", dotprod=False)


def test_zero_points_of_a_directory_of_saap_0_1_are_refused(mixed, tmp_path):
    tensors = load_file(mixed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.zero_points"].fill_(0x66)
    save_file(tensors, mixed / "model.safetensors")
    edited(mixed / "saap.json")
    for write in (export_bundle, export_portable, lambda path, out: export_gguf(path, out / "model.gguf")):
        with pytest.raises(UserError, match=r"up_proj has zero points of its own, as saap 0.1 .*: tune the slim dir"):
            write(mixed, tmp_path / "out")


def test_the_bundle_says_what_it_holds(mixed, tmp_path):
    manifest = export_bundle(mixed, tmp_path / "bundle", ids=IDS)
    assert (manifest.bits, manifest.lineage["matrices"], manifest.lineage["head_bits"]) == (4, MIXED, 4)
    assert manifest.parity.kl < 0.05
    inspected = inspect_bundle(tmp_path / "bundle")
    nodes = onnx.load(tmp_path / "bundle/model.onnx", load_external_data=False).graph.node
    bits = [{a.name: a.i for a in node.attribute}["bits"] for node in nodes if node.op_type == "MatMulNBits"]
    assert Counter(bits) == {4: 2 * 4 - 2 + 1, 8: 2}
    assert bytes_read(tmp_path / "bundle") == manifest.weight_bytes_per_token
    assert "  mixed: of the model's linears 4 of 8 bits, the others of 4" in inspected.lines()
    assert " 4 and 8 bit, " in inspected.lines()[0]
    with pytest.raises(UserError, match="tuned integers, of --bits 4 and not 8"):
        export_bundle(mixed, tmp_path / "other", bits=8)


def test_it_can_be_planned_before_there_are_integers(mixed, tiny_model, tmp_path):
    real = export_bundle(mixed, tmp_path / "bundle").files["model.onnx.data"].bytes
    assert tuned_bundle_size(read_config(tiny_model(**WIDE)), entry_of(mixed)) == real
    fewer = {**entry_of(mixed), "matrices": QKV_OF_LAYER_1}
    assert tuned_bundle_size(read_config(mixed), fewer) == real - 128 * 256 // 2


def test_a_wider_vocabulary_table_is_kept(tiny_model, tmp_path):
    tune(tiny_model(), TuneOptions(head_bits=8, learning_rate=1e-2), output=tmp_path / "tuned", data=IDS.repeat(4, 1))
    assert (entry_of(tmp_path / "tuned")["bits"], entry_of(tmp_path / "tuned")["embedding_bits"]) == (4, 8)
    table = tensor_reader(tmp_path / "tuned")[1]("model.embed_tokens.qweight").numpy()
    assert table.shape == (320, 3, 32)
    for target in ("cpu", "cuda"):
        manifest = export_bundle(tmp_path / "tuned", tmp_path / target, target=target)
        assert (manifest.bits, manifest.lineage["head_bits"]) == (4, 8)
        assert np.array_equal(tensors_of(tmp_path / target)["embedding.qweight"], table)
    export_portable(tmp_path / "tuned", tmp_path / "portable")
    codes = tensors_of(tmp_path / "portable")["head.codes"]
    assert np.array_equal(codes.astype(np.int16), table.reshape(320, 96).T.astype(np.int16) - 128)
    size = tuned_bundle_size(read_config(tmp_path / "tuned"))
    assert size == (tmp_path / "cpu/model.onnx.data").stat().st_size
    tensors = export_gguf(tmp_path / "tuned", tmp_path / "model.gguf").tensors
    assert {e.type for name, e in tensors.items() if name != "token_embd.weight"} == {"Q4_0"}
    assert tensors["token_embd.weight"].type == "Q8_0"


@pytest.mark.parametrize("rank", [16, {"model.layers.0.mlp.down_proj": 3}])
def test_a_directory_of_an_older_version_with_a_branch_is_refused(mixed, tmp_path, rank):
    edited(mixed / "config.json", lambda config: config["slim_quant"].update(branch=rank))
    edited(mixed / "saap.json")
    message = r"mixed was tuned with --fold branch, which saap no longer has: tune the slim directory again"
    for use in (
        load_model,
        lambda path: export_bundle(path, tmp_path / "out"),
        lambda path: export_portable(path, tmp_path / "out"),
        lambda path: export_gguf(path, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=message):
            use(mixed)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="tuned with a branch, which this version does not compute"):
        AutoModelForCausalLM.from_pretrained(mixed)

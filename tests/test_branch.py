"""The low-rank branch on group sums, beside integers: in torch, in every graph, and where it is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx_reference import reference
from safetensors.torch import load_file, save_file
from slim_integers import IDS, MIXED, PARTS, WIDE, Level0, write_integers
from test_export import logits_of, tensors_of
from test_portable import check_standard, feed

from bench.runtime import OrtDecoder
from export.branch import stack_branches
from export.export import export_bundle
from export.gguf_write import export_gguf
from export.inspect import inspect_bundle, inspection_lines
from export.portable import export_portable
from export.run import BundleScorer
from export.targets import Target
from export.verify import check_parity, reference_model
from saap.bundle_size import tuned_bundle_size
from saap.checkpoint import load_model, read_config
from saap.errors import SaapError
from saap.group_quant import branch_entry, merged, quantize
from saap.modeling_slim import GroupQuantLinear
from saap.weight_files import tensor_reader
from tests.edited import edited

SOME = ("0.mlp.down_proj", "1.self_attn.k_proj")  # the only ones with a branch in "some"


def random_pair(name, rank, rows, groups):
    generator = torch.Generator().manual_seed(len(name) + rows + int(name.split(".")[2]))
    a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((rank, groups), (rows, rank)))
    return a.half().float(), b.half().float()


def low_rank(name, rows, groups):
    return random_pair(name, 3, rows, groups)


def number_per_group(name, rows, groups):
    return torch.eye(groups), random_pair(name, groups, rows, groups)[1]


def beside_some(name, rows, groups):
    return random_pair(name, 2 + ("down" in name), rows, groups) if name.endswith(SOME) else None


KINDS = {"low rank": low_rank, "a number per group": number_per_group, "some": beside_some}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def branched(kind, tiny_model, tmp_path):
    path = tiny_model(**WIDE, attention_bias=kind == "low rank")
    if kind == "low rank":
        biased = load_model(path)
        for name, parameter in biased.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        biased.save_pretrained(path)
    return write_integers(path, tmp_path / "branched", branches=KINDS[kind])


@pytest.fixture
def low(tiny_model, tmp_path):
    return write_integers(tiny_model(**WIDE), tmp_path / "low", branches=low_rank)


def test_the_linear_adds_the_branch_of_the_group_sums():
    generator = torch.Generator().manual_seed(0)
    linear = GroupQuantLinear(96, 10, 4, 32, bias=True, branch=2)
    assert linear.branch_a.shape == (2, 3) and linear.branch_b.shape == (10, 2)
    matrix = quantize(torch.randn(10, 96, generator=generator), 4, 32)
    linear.qweight, linear.scales, linear.zero_points = matrix.qweight, matrix.scales, matrix.zero_points
    linear.branch_a, linear.branch_b = (torch.randn(s, generator=generator) for s in ((2, 3), (10, 2)))
    linear.bias.data.normal_(generator=generator)
    x = torch.randn(4, 5, 96, generator=generator)
    expected = np.zeros((4, 5, 10))
    weight, a, b = (t.double().numpy() for t in (matrix.dequantize(), linear.branch_a, linear.branch_b))
    for group in range(3):
        columns = x[..., 32 * group : 32 * group + 32].double().numpy()
        expected += columns @ weight[:, 32 * group : 32 * group + 32].T
        expected += columns.sum(-1)[..., None] * (b @ a)[:, group]
    expected += linear.bias.detach().double().numpy()
    with torch.inference_mode():
        assert np.abs(linear(x).numpy() - expected).max() < 1e-4
        one_matrix = torch.nn.functional.linear(x, merged(linear), linear.bias)
        assert np.abs(one_matrix.numpy() - expected).max() < 1e-4
        linear.branch_a = linear.branch_b = None
        assert np.abs(linear(x).numpy() - expected).max() > 1


def test_a_linear_without_a_branch_saves_none():
    assert set(GroupQuantLinear(64, 8, 4, 32).state_dict()) == {"qweight", "scales", "zero_points"}
    assert set(GroupQuantLinear(64, 8, 4, 32, branch=1).state_dict()) > {"branch_a", "branch_b"}


def test_the_directory_says_the_ranks_and_loads_them(branched, kind):
    entry, model = read_config(branched)["slim_quant"], load_model(branched)
    holders = {n: m for n, m in model.named_modules() if isinstance(m, GroupQuantLinear)}
    if kind == "low rank":
        assert entry["branch"] == 3
    elif kind == "a number per group":
        assert entry["branch"] == {n: 8 if "down" in n else 4 for n in holders}
    else:
        assert entry["branch"] == {"model.layers.0.mlp.down_proj": 3, "model.layers.1.self_attn.k_proj": 2}
    read, given = tensor_reader(branched)[1], KINDS[kind]
    for name, holder in holders.items():
        pair = given(name, *holder.scales.shape)
        assert (holder.branch_a is None) == (pair is None)
        if pair is not None:
            assert torch.equal(holder.branch_a, pair[0]) and torch.equal(holder.branch_b, pair[1])
            assert torch.equal(read(f"{name}.branch_b"), pair[1])
    assert branch_entry(model) == {"branch": entry["branch"]}


def test_ordinary_linears_hold_the_branch_too(branched):
    model = load_model(branched)
    expected = logits_of(model, IDS)
    whole = load_model(branched, materialise=True)
    assert not any(isinstance(m, GroupQuantLinear) for m in whole.modules())
    assert np.abs(logits_of(whole, IDS) - expected).max() <= 1e-4
    for module in model.modules():
        if isinstance(module, GroupQuantLinear):
            module.branch_a = None
    assert np.abs(logits_of(model, IDS) - expected).max() > 0.1, "the branch does nothing here"


def test_the_graph_at_level_0_computes_what_torch_does(branched, tmp_path):
    export_bundle(branched, tmp_path / "bundle", target=Level0())
    expected = logits_of(load_model(branched), IDS)
    assert np.abs(BundleScorer(tmp_path / "bundle").logits(IDS.numpy()) - expected).max() <= 2e-3
    row, decoder = IDS[0].numpy(), OrtDecoder(tmp_path / "bundle", 1, 32)
    decoder.prefill(row[:17])
    for position in range(17, 24):
        assert np.abs(decoder.step(int(row[position])) - expected[0, position]).max() <= 2e-3


def test_mixed_bits_and_zero_points_beside_it(tiny_model, tmp_path):
    path = write_integers(
        tiny_model(**WIDE), tmp_path / "all", block=64, symmetric=False, bits_of=MIXED, head_bits=8, branches=low_rank
    )
    export_bundle(path, tmp_path / "bundle", target=Level0())
    expected = logits_of(load_model(path), IDS)
    assert np.abs(BundleScorer(tmp_path / "bundle").logits(IDS.numpy()) - expected).max() <= 2e-3
    size = tuned_bundle_size(read_config(path), zero_points=True)
    assert size == (tmp_path / "bundle/model.onnx.data").stat().st_size


@pytest.mark.parametrize("target", ["cpu", "cuda", "portable"])
def test_the_two_matrices_are_in_the_file_unmerged(low, tmp_path, target):
    if target == "portable":
        export_portable(low, tmp_path / "bundle")
        check_standard(tmp_path / "bundle")
    else:
        export_bundle(low, tmp_path / "bundle", target=Target(target))
    found, read = tensors_of(tmp_path / "bundle"), tensor_reader(low)[1]
    for layer in range(2):
        for part, modules in PARTS.items():
            a, b = (found[f"layers.{layer}.{part}.branch_{which}"].copy() for which in "ab")
            assert a.dtype == b.dtype == (np.float16 if target == "cuda" else np.float32)
            row = 0
            for at, module in enumerate(modules):
                name, columns = f"model.layers.{layer}.{module}", slice(3 * at, 3 * at + 3)
                assert np.array_equal(a[:, columns].astype(np.float32), read(f"{name}.branch_a").numpy().T)
                own = read(f"{name}.branch_b").numpy().T
                assert np.array_equal(b[columns, row : row + own.shape[1]].astype(np.float32), own)
                b[columns, row : row + own.shape[1]] = 0
                row += own.shape[1]
            assert b.shape == (3 * len(modules), row) and not b.any(), "nothing stands beside the diagonal"


def test_a_number_per_group_costs_one_product(tiny_model, tmp_path):
    path = write_integers(tiny_model(**WIDE), tmp_path / "free", branches=number_per_group)
    export_bundle(path, tmp_path / "bundle")
    found, read = tensors_of(tmp_path / "bundle"), tensor_reader(path)[1]
    assert not [name for name in found if name.endswith("branch_a")]
    expected = torch.cat([read(f"model.layers.1.{module}.branch_b") for module in PARTS["qkv"]])
    assert np.array_equal(found["layers.1.qkv.branch_b"], expected.numpy().T)
    kinds = [n.op_type for n in onnx.load(tmp_path / "bundle/model.onnx", load_external_data=False).graph.node]
    assert (kinds.count("MatMul"), kinds.count("ReduceSum")) == (8, 8 + 1), "one sum is over the mask"


def test_stacked_branches_are_those_of_each_matrix():
    generator = torch.Generator().manual_seed(0)

    def product(branches, rows):
        a, b = stack_branches(branches, rows)
        return b if a is None else b @ a

    def random(*shape):
        return torch.randn(shape, generator=generator)

    shared, first, third = random(2, 4), (random(2, 4), random(5, 2)), (random(1, 4), random(3, 1))
    eye = torch.eye(4)
    for branches in (
        [first, None, third],
        [(shared, random(5, 2)), None, (shared, random(3, 2))],
        [(eye, random(5, 4)), (eye, random(6, 4)), (eye, random(3, 4))],
    ):
        rows = [5, 6, 3]
        expected = [torch.zeros(n, 4) if x is None else x[1] @ x[0] for x, n in zip(branches, rows, strict=True)]
        assert torch.allclose(product(branches, rows), torch.cat(expected), atol=1e-6)
    assert stack_branches([None, None], [5, 6]) is None
    assert stack_branches([(eye, random(5, 4))] * 2, [5, 5])[0] is None


def test_parity_at_the_deployed_precision(branched, tmp_path):
    for write in (export_bundle, export_portable):
        manifest = write(branched, tmp_path / "bundle", parity=lambda b: check_parity(b, branched, IDS, "dice"))
        assert manifest.parity["kl"] <= 0.05 and manifest.lineage["branch"]
    nll = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits_of(reference_model(branched, 0, 0, 0), IDS))[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
    )
    assert manifest.parity["nll_torch"] == pytest.approx(float(nll), rel=1e-5)


def test_the_portable_graph_computes_what_torch_does(branched, tmp_path):
    manifest = export_portable(branched, tmp_path / "bundle")
    check_standard(tmp_path / "bundle")
    ids = IDS[:, :6]
    found = reference(tmp_path / "bundle/scoring.onnx").run(["logits"], feed(manifest, ids.numpy()))[0]
    assert np.abs(found - logits_of(load_model(branched), ids)).max() <= 1e-4


def test_the_cuda_graph_computes_the_same_in_half_precision(branched, tmp_path):
    export_bundle(branched, tmp_path / "cuda", target=Target("cuda"))
    found = BundleScorer(tmp_path / "cuda").logits(IDS.numpy())
    expected = logits_of(load_model(branched), IDS)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_the_bundle_counts_and_shows_it(branched, kind, tmp_path):
    manifest = export_bundle(branched, tmp_path / "bundle")
    assert tuned_bundle_size(read_config(branched)) == manifest.files["model.onnx.data"].bytes
    report = inspect_bundle(tmp_path / "bundle")
    read, stored = report["bytes_per_token"], tensors_of(tmp_path / "bundle")
    assert read["layers"] + read["head"] + 4 * 128 == manifest.weight_bytes_per_token
    branch_bytes = sum(a.nbytes for name, a in stored.items() if ".branch_" in name)
    plain = export_bundle(write_without(branched, tmp_path), tmp_path / "plain")
    assert manifest.weight_bytes_per_token - plain.weight_bytes_per_token == branch_bytes > 0
    assert "branch" not in plain.lineage
    of_plain = inspect_bundle(tmp_path / "plain")["layers"]
    assert [x["parameters"] for x in report["layers"]] == [x["parameters"] for x in of_plain]
    words = {
        "low rank": "rank 3 beside every linear",
        "a number per group": "rank 4, 8 beside 14 linears",
        "some": "rank 2, 3 beside 2 linears",
    }
    assert f"  branch: of {words[kind]}, computed in floats" in inspection_lines(report)


def write_without(directory, tmp_path):
    """The same integers with their branch left out."""
    plain = tmp_path / "without"
    shutil.copytree(directory, plain)
    config = json.loads((plain / "config.json").read_text())
    del config["slim_quant"]["branch"]
    (plain / "config.json").write_text(json.dumps(config))
    weights = load_file(plain / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".branch_" not in name}
    save_file(kept, plain / "model.safetensors", metadata={"format": "pt"})
    edited(plain / "saap.json")
    return plain


def test_gguf_has_no_place_for_it(low, tmp_path):
    with pytest.raises(SaapError, match=r"has a branch .* GGUF file has no place: tune with --fold scale or"):
        export_gguf(low, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_branch_that_is_promised_and_not_there_is_refused(low, tmp_path):
    weights = load_file(low / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.branch_b"]
    save_file(weights, low / "model.safetensors", metadata={"format": "pt"})
    edited(low / "saap.json")
    with pytest.raises(SaapError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.branch_b, which its config"):
        export_bundle(low, tmp_path / "bundle")

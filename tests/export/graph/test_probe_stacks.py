import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

pytest.importorskip("onnx_ir")

from support.exported import export_bundle

from bench.costs.worker import UnfilledStack
from export.bundle.manifest import WEIGHTS, read_manifest
from export.engine.protocol import EngineOptions
from export.graph.probe_model import LEAST_LAYERS, read_probe_model
from export.graph.probe_stacks import ProbeStack, stack_layers, stacks_of, write_probe_stacks
from saap.base.errors import UserError
from saap.models.shape import LayerSizes

SMOLLM2 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "head_dim": 64, "max_position_embeddings": 8192, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e5,
    "tie_word_embeddings": True,
}  # fmt: skip


SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def config_only(directory: Path, **overrides: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**SMOLLM2, **overrides}))
    return directory


def test_stacks_vary_every_second_layer_and_a_large_model_has_as_many_as_fill_the_limit(tmp_path: Path) -> None:
    directory = config_only(tmp_path / "m")
    stacks = stack_layers(read_probe_model(directory))
    full = LayerSizes(9, 3, 1536)
    assert stacks[0] == (full,) * 30
    assert all(stack[::2] == (full,) * 15 and len(set(stack[1::2])) == 1 for stack in stacks[1:])
    options = [stack[1] for stack in stacks[1:]]
    assert [o.ffn for o in options[:8]] == [0, 64, 256, 512, 704, 896, 1088, 1344]
    heads = [(o.query_heads, o.kv_heads) for o in options[8:]]
    assert heads == [(0, 0), (1, 1), (2, 1), (3, 1), (2, 2), (4, 2), (6, 2), (3, 3), (6, 3)]
    layer, head = 3540096 * 0.625, 49152 * 576 * 0.625
    assert len(read_probe_model(directory, weight_limit=int(head + 10.5 * layer)).shape.layers) == 10
    assert len(read_probe_model(directory, weight_limit=1).shape.layers) == LEAST_LAYERS


def facts(directory: Path) -> tuple[list[str], dict[str, tuple[int, tuple[int, ...]]]]:
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    return [n.op_type for n in graph.node], {t.name: (t.data_type, tuple(t.dims)) for t in graph.initializer}


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_the_first_stack_is_the_graph_that_export_writes(
    tiny_model: Callable[..., Path], tmp_path: Path, bits: int
) -> None:
    model = tiny_model(num_hidden_layers=4)
    exported = export_bundle(model, tmp_path / "bundle", bits=bits)
    (stacks := tmp_path / "stacks").mkdir()
    written = write_probe_stacks(read_probe_model(model, bits), stacks)
    assert facts(written[0]) == facts(tmp_path / "bundle")
    manifest = read_manifest(written[0])
    assert manifest.weight_bytes_per_token == exported.weight_bytes_per_token
    assert manifest.layers == exported.layers and manifest.lineage["nodes"] == len(facts(written[0])[0])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text", "phi3"])
def test_norms_and_biases_of_other_families_are_in_the_stack(
    tiny_family: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    model = tiny_family(family, num_hidden_layers=4, tie_word_embeddings=False)
    export_bundle(model, tmp_path / "bundle")
    (stacks := tmp_path / "stacks").mkdir()
    source = read_probe_model(model)
    written = write_probe_stacks(source, stacks, stacks=[ProbeStack(source.shape.layers)])
    assert facts(written[0]) == facts(tmp_path / "bundle")


def test_a_slim_model_gives_the_sizes_of_its_largest_layer_and_a_bundle_none(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(num_hidden_layers=5)
    raw = json.loads((model / "config.json").read_text())
    sizes = [[6, 3, 64], [0, 0, 96], [2, 1, 128], [2, 2, 0], [6, 3, 32]]
    (model / "config.json").write_text(json.dumps({**raw, "model_type": "saap_llama", "slim_layers": sizes}))
    probed = read_probe_model(model)
    assert probed.shape.layers == (LayerSizes(6, 3, 128),) * 5 and probed.precision.bits == 4
    (tmp_path / "bundle.json").write_text("{")
    with pytest.raises(UserError, match="is a bundle: give the model that it was made of"):
        read_probe_model(tmp_path)


def test_every_stack_runs_and_all_share_one_file(tmp_path: Path) -> None:
    directory = config_only(tmp_path / "m", **SMALL)
    (out := tmp_path / "stacks").mkdir()
    seen: list[tuple[float, float]] = []
    source = read_probe_model(directory)
    stacks = write_probe_stacks(source, out, progress=lambda _, done, total: seen.append((done, total)))
    assert len(stacks) == len(stacks_of(source)) == seen[-1][0] == seen[-1][1]
    heads = []
    for path in stacks:
        decoder = UnfilledStack(path, EngineOptions(1, 40))
        decoder.place(31)
        logits = decoder.step(5)
        said = logits[logits > -1000]
        assert decoder.length == 32 and abs(said).max() < 100 and said.std() > 0.01
        heads.append(len(said))
    formed = len([stack for stack in stacks_of(source) if stack.part])
    whole, fewer = heads[: -2 - formed], heads[-2 - formed :]
    assert formed == 7 and fewer == [16, 64, *[128] * 7] and set(whole) == {128}
    assert len({(path / WEIGHTS).stat().st_ino for path in stacks}) == 1


def test_a_part_takes_other_integers_in_all_layers(tmp_path: Path) -> None:
    """Groups of 128 do not divide the hidden state, so only what writes of an FFN has them."""
    directory = config_only(tmp_path / "m", **SMALL)
    source = read_probe_model(directory)
    wanted = [stack for stack in stacks_of(source) if stack.part]
    parts = ("attention", "ffn", "outside")
    forms = {(4, 64): parts, (4, 128): ("ffn",), (8, 64): parts}
    assert [(stack.part, stack.form) for stack in wanted] == [(part, form) for form in forms for part in forms[form]]
    (out := tmp_path / "stacks").mkdir()
    for path, stack in zip(write_probe_stacks(source, out, wanted), wanted, strict=True):
        found: dict[str, tuple[int, int]] = {}
        for node in onnx.load(path / "model.onnx", load_external_data=False).graph.node:
            sizes = {each.name: each.i for each in node.attribute}
            if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
                found[node.name or node.op_type] = sizes["bits"], sizes["block_size"]
        others = 2 if stack.part == "outside" else 4 if stack.form == (4, 128) else 8
        assert sorted(found.values()) == [(4, 32)] * (len(found) - others) + [stack.form] * others
        lineage = read_manifest(path).lineage
        share = 128 * 64 / (3 * 128 * 64 + 64) if stack.form == (4, 128) else 1.0
        assert lineage["form"] == list(stack.form or ()) and lineage["share"] == pytest.approx(share)
    assert not [stack for stack in stacks_of(read_probe_model(directory, 32)) if stack.part]


def test_without_links_the_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    directory = config_only(tmp_path / "m", vocab_size=128, num_hidden_layers=4, intermediate_size=64)
    (out := tmp_path / "stacks").mkdir()
    source = read_probe_model(directory)
    (path,) = write_probe_stacks(source, out, stacks=[ProbeStack(source.shape.layers)])
    assert (path / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    shutil.rmtree(out)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"model_type": "gpt2"}, {}, "model type 'gpt2' is not supported"),
        ({}, {"bits": 3}, "3 bits cannot be probed on a CPU; allowed: 4, 8, 32"),
        ({"intermediate_size": 1500}, {}, "down_proj has 1500 input columns, not a multiple of the group size 32"),
        ({"hidden_size": 540}, {"group_size": 64}, "the hidden state has 540 input columns"),
    ],
)
def test_what_cannot_be_probed_is_refused(
    tmp_path: Path, config: dict[str, Any], options: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_probe_model(config_only(tmp_path / "m", **config), **options)
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_probe_model(tmp_path)

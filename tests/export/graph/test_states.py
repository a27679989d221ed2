"""What a bundle's layers remember is carried over as transformers carries it.

Short convolutions and delta nets keep states, and layers of Gemma 4 read the keys and values of earlier ones.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.export_cases import check_standard
from support.exported import export_bundle
from support.family_cuts import cut
from support.genai_run import greedy

from bench.costs.fit import read_stacks
from export.bundle.manifest import read_manifest
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineOptions
from export.generate.loop import CachedSequence
from export.generate.ort_model import BundleForCausalLM
from export.graph.probe_model import read_probe_model
from export.graph.probe_stacks import write_probe_stacks
from saap.models.architectures import FAMILIES, LAYER_TYPES, shape_of
from saap.models.checkpoint import load_model, read_config
from saap.prune.plan import LayerPlan, PrunePlan, whole_layer

SHARED = "gemma4_text"
CUTS = {  # two layers of each family's own kind
    "lfm2": (LayerPlan(conv=tuple(range(0, 96, 3)), ffn=tuple(range(64))), LayerPlan(conv=tuple(range(64)))),
    "qwen3_5_text": (LayerPlan(delta=(0, 2), ffn=tuple(range(64))), LayerPlan(delta=(1,))),
}
ATTENDING = LayerPlan((0, 2), (0,), tuple(range(0, 128, 2))), LayerPlan((0, 1, 2), (0,), tuple(range(128)))
KINDS = {family: [LAYER_TYPES[FAMILIES[family].rare], "full_attention"] * 2 for family in CUTS}
IDS = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=[*CUTS, SHARED])
def family(request):
    return request.param


@pytest.fixture
def dense(tiny_family, family):
    return dense_of(tiny_family, family)


def dense_of(tiny_family, family):
    if family == SHARED:
        kinds = ["sliding_attention", "full_attention"] * 3
        return tiny_family(family, num_hidden_layers=6, layer_types=kinds, num_kv_shared_layers=2)
    return tiny_family(family, num_hidden_layers=4, layer_types=KINDS[family])


def plan_of(dense, family):
    """Cut layers of both kinds; of Gemma 4, whose last two layers read, a third of the FFNs."""
    if family == SHARED:
        layers = [whole_layer(sizes) for sizes in shape_of(read_config(dense)).layers]
        return PrunePlan(tuple(replace(each, ffn=each.ffn[: 64 if n in (0, 2, 4) else None])
                               for n, each in enumerate(layers)))  # fmt: skip
    (first, third), (second, last) = CUTS[family], ATTENDING
    return PrunePlan((first, second, third, last))


@pytest.fixture(params=[*((target, family) for target in ("cpu", "portable") for family in CUTS), ("cpu", SHARED)])
def slim(request, tiny_family, tmp_path):
    """(slim directory, its bundle)."""
    target, family = request.param
    dense, bundle = dense_of(tiny_family, family), tmp_path / "bundle"
    path = cut(dense, tmp_path / "slim", plan_of(dense, family))
    export_bundle(path, bundle, bits=32, target=target)
    if target == "portable":
        check_standard(bundle)
    return path, bundle


def test_a_conversation_goes_on_where_it_was_and_another_starts_anew(slim):
    """Three turns, each longer than the last; then one that differs early, which no state can go back to."""
    model, decoder = load_model(slim[0]), OnnxRuntimeEngine(slim[1], EngineOptions(1, 256))
    sequence, ids = CachedSequence(decoder), [5, 6, 7, 8]
    for turn in range(3):  # the third is beyond Gemma's window
        logits, read = sequence.continue_to(ids, lambda: False)
        assert read == (4 if turn == 0 else 3)
        for _ in range(5):
            ids = [*ids, int(np.argmax(logits))]
            logits = sequence.step(ids[-1])
        check(model, ids, logits)
        ids = [*ids, 20 + turn, 30, 40]
    other = [*ids[:9], 10, 11]
    logits, read = sequence.continue_to(other, lambda: False)
    assert read == (2 if decoder.can_rewind else 11)
    check(model, other, logits)


def check(model, ids, logits):
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    assert np.abs(logits - expected).max() <= 1e-4


def test_it_generates_as_in_transformers(slim):
    model, bundle = load_model(slim[0]), BundleForCausalLM.from_bundle(slim[1])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    assert bundle.generate(IDS[:1], **options).tolist() == model.generate(IDS[:1], **options).tolist()


def test_an_int8_cache_leaves_states_as_floats(dense, family, tmp_path):
    ids = torch.randint(320, (4, 40), generator=torch.Generator().manual_seed(5))
    manifest = export_bundle(dense, tmp_path / "bundle", bits=8, kv_bits=8, ids=ids)
    states = {"qwen3_5_text": ["float32"] * 2, "lfm2": ["float32"]}.get(family, [])
    assert [part.dtype for part in manifest.cache] == [*states, "int8", "int8"] * (2 if states else 4)
    assert manifest.parity.perplexity_ratio == pytest.approx(1, abs=0.02)
    if family == SHARED:
        assert [layer.reads for layer in manifest.layers] == [False] * 4 + [True] * 2
        assert [part.shape for part in manifest.cache] == [(1, None, dim) for dim in (32, 32, 64, 64) * 2]


def test_genai_runs_layers_that_are_alike_in_their_states(dense, family, tmp_path):
    bundle = tmp_path / "bundle"
    export_bundle(dense, bundle, bits=32)
    tokens = greedy(bundle, IDS[0], 24)
    expected = load_model(dense).generate(IDS[:1], max_length=24, do_sample=False, pad_token_id=2)[0].tolist()
    assert tokens[: len(expected)] == expected
    decoder = json.loads((bundle / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder.get("layer_types") == KINDS.get(family)


@pytest.mark.parametrize("family", CUTS, indirect=True)
def test_stacks_for_costs_have_other_mixers_in_the_place_of_attention(dense, family, tmp_path):
    out = tmp_path / "stacks"
    out.mkdir()
    stacks = write_probe_stacks(read_probe_model(dense), out)
    options = [stack.option for stack in read_stacks([read_manifest(stack) for stack in stacks])]
    (field,) = FAMILIES[family].rare.sizes
    sizes = [getattr(option, field) for option in options]
    assert (options[0].query_heads, sizes[0]) == (3, 0)
    assert [size for size in sizes if size] == ([32, 64, 96] if field == "conv" else [1, 2, 3])
    for stack, option in zip(stacks, options, strict=True):
        decoder = OnnxRuntimeEngine(stack, EngineOptions(1, 16))
        assert np.isfinite(decoder.prefill(np.array([3, 4]))).all(), option
        assert np.isfinite(decoder.step(5)).all(), option
